"""``--flexsp-profile``: the job measures itself instead of training, and writes its cost model.

It takes the place of Megatron's second training step, when overlaps and everything else are as in training. What it
runs are Megatron's own steps, on the job's own model, groups and options, with a learning rate of 0; so pipelines,
recomputation, precision and gradient reduction are measured with whatever they cost.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.training import get_args, print_rank_0
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.batches import PlannedBatch
from megatron_flexsp.megatron.context import Context, on_cpu
from megatron_flexsp.megatron.estimate import exchange_bytes_per_token, exchanges_per_micro_batch
from megatron_flexsp.megatron.measured_memory import MeasuredMemory, MemoryConstants, memory_constants
from megatron_flexsp.megatron.measured_steps import MeasuredBytes, RandomText, StepRunner
from megatron_flexsp.megatron.planned_steps import PlannedSteps, repeated
from megatron_flexsp.megatron.provenance import describe_job, describe_machine
from megatron_flexsp.megatron.sequences import Sequences
from megatron_flexsp.planner import CostModel, slice_tokens
from megatron_flexsp.profiler.fit import Sample, fit, quality
from megatron_flexsp.profiler.interruption import EndsAtOnce
from megatron_flexsp.profiler.outcome import fit_record, point_record, print_result, seconds_per_byte
from megatron_flexsp.profiler.points import Point, choose_points, plan_of
from megatron_flexsp.profiler.progress import Show, StagesShown
from megatron_flexsp.profiler.record import check_writable, write_whole
from megatron_flexsp.runtime import ring_size_of

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 9
"""Rounds over all points, whatever --flexsp-profile-seconds says."""
_EXCHANGE_REPEATS = 5
_PLANS_UNDER_WAY_SECONDS = 120.0
"""What plans that are still under way may take before measuring begins."""
_SAMPLED_LENGTHS = 4096
_SAMPLED_BATCHES = 4
"""Of samples that must be read for their lengths."""
_LEAST_EXCHANGE = 0.5
"""Of the bare all-to-all's seconds that a token's exchange takes at least: the fit may not forget it altogether."""


def prepare_arguments(args: argparse.Namespace) -> None:
    """Make a run of the job's arguments that measures and leaves nothing behind but the cost model."""
    if args.rank == 0:
        check_writable(args.flexsp_profile)
    args.save = args.load = args.flexsp_trace = None
    args.eval_iters = 0
    args.exit_interval = args.exit_duration_in_mins = None
    # Steps run as in training, and the weights stay: random text would drive them anywhere.
    args.lr = args.min_lr = args.lr_warmup_init = 0.0
    if args.train_iters is not None:
        args.train_iters = max(args.train_iters, 2)


class Profiler:
    """Measures, fits, writes, checks.

    Parameters
    ----------
    run
        The training run whose steps it takes; a ``FlexSPTraining``.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._steps = 0

    def wrap_train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``train_step`` whose second call measures and ends the run."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            self._steps += 1
            if self._steps == 1:
                return original(*args, **kwargs)
            context: Context = self._run.context
            if not self._run.settle(_PLANS_UNDER_WAY_SECONDS):
                raise FlexSPError(
                    f"--flexsp-profile: after {_PLANS_UNDER_WAY_SECONDS:.0f} s the first batches are not planned and "
                    "read yet, so that nothing can be measured. Profile with data that is read faster, or with "
                    "--mock-data and --flexsp-mock-lengths"
                )
            runner = StepRunner(original, signature.bind(*args, **kwargs), context)
            _Measurement(self._run, runner, context).take()
            context.hosts.barrier()
            dist.destroy_process_group()
            raise SystemExit(0)

        return train_step


class _Measurement:
    """One run of the profiler."""

    def __init__(self, run: Any, runner: StepRunner, context: Context) -> None:
        self._runner = runner
        self._context = context
        self._settings = context.settings
        self._source = run.training_source
        self._reader = run.reader
        self._path: str = run.context.settings.profile
        self._writes = context.channel.plans_here
        self._has_written = False
        count = _SAMPLED_LENGTHS if self._source.has_index else _SAMPLED_BATCHES * get_args().global_batch_size
        count = min(len(self._source), count)
        self._lengths: NDArray[np.int64] = self._source.sequences(range(count), context.channel).lengths
        self._tokens_per_sample = float(self._lengths.sum()) / count
        longest = max(part.longest for part in self._source.parts)
        self._longest = min(longest, max(self._settings.degrees) * context.token_capacity)
        args = get_args()
        self._text = run.reader(RandomText(args.vocab_size or args.padded_vocab_size, self._longest))
        self._capacity = context.token_capacity
        """Tokens that a rank can hold; estimated until memory is measured."""

    def take(self) -> None:
        """Everything; a signal ends it at once."""
        with EndsAtOnce(lambda: self._last_words("was interrupted")) as signals:
            try:
                self._take(signals)
            except RuntimeError:  # of a collective, most likely: the launcher names the rank that failed first
                if words := self._last_words("failed here, or lost a rank that failed"):
                    print(f"\n{words}\n", file=sys.stderr, flush=True)
                raise

    def _last_words(self, what: str) -> str:
        if not self._writes:
            return ""
        state = "was written" if self._has_written else "is as it was: nothing was written"
        return f"megatron-flexsp: --flexsp-profile {what}. {self._path} {state}."

    def _take(self, signals: EndsAtOnce) -> None:
        with StagesShown(self._writes, print_rank_0) as show:
            measured = self._measure_memory(show)
            settings = self._settings
            in_flight, given = settings.micro_batches_in_flight, self._context.token_capacity
            memory = memory_constants(measured, in_flight, given, self._context.hosts)
            tokens_per_rank = self._tokens_per_rank(memory)
            self._planned_steps = PlannedSteps(
                self._runner,
                self._context,
                self._source,
                self._reader(self._source),
                self._capacity,
                self._recomputed_tokens_per_rank(memory),
            )
            exchanges = self._measure_exchanges(tokens_per_rank, show)
            points = self._points(tokens_per_rank)
            fit_to = functools.partial(self._fit, memory, measured, exchanges, points)
            seconds, planned, taken = self._measure_steps(points, fit_to, show)
        cost_model = fit_to(seconds)
        if cost_model is not None:
            checks = self._planned_steps.compared(cost_model, planned, taken)
            measurement = {**cost_model.measurement, "check": checks}
            with signals.undisturbed():
                write_whole(self._path, replace(cost_model, measurement=measurement))
                self._has_written = True
            print_result(self._path, cost_model, checks)

    def _measure_memory(self, show: Show) -> list[MeasuredMemory]:
        """Steps with as many micro-batches as the pipeline holds at once, and with one where that tells more.

        Of the narrowest degree, and of those that keep most of a token: the widest, and the widest blocks of a ring.
        """
        settings = self._settings
        filling = -(-settings.micro_batches_in_flight // settings.count_multiple) * settings.count_multiple
        kinds = {"kept": (filling, False)}
        if settings.recompute:
            kinds["recomputed"] = (filling, True)
            if settings.micro_batches_in_flight > 1 and settings.count_multiple == 1:
                kinds |= {"kept_alone": (1, False), "recomputed_alone": (1, True)}
        degrees = settings.degrees
        widest_blocks = max(degrees, key=lambda degree: degree // ring_size_of(degree, settings.query_heads))
        found: dict[int, dict[str, Any]] = {degree: {} for degree in sorted({degrees[0], widest_blocks, degrees[-1]})}
        runs = [(degree, name) for degree in found for name in kinds]
        for done, (degree, name) in enumerate(runs):
            found[degree][name] = self._measure_sizes(degree, *kinds[name])
            show("memory", (done + 1) / len(runs))
        return [MeasuredMemory(degree, **sizes) for degree, sizes in found.items()]

    def _measure_sizes(self, degree: int, rounds: int, recomputed: bool) -> list[tuple[int, MeasuredBytes]]:
        """Bytes of steps of so many micro-batches, of two sizes."""
        measured = []
        for share in (0.25, 0.5, 0.5):  # the first is a warm-up too: what libraries allocate once is not a token's
            tokens = self._rounded(self._useful_tokens() * share) * degree
            pack = (min(tokens, self._longest),) * max(1, tokens // self._longest)
            point = Point(degree, pack, rounds, recomputed)
            batch = self._batch(point)
            self._runner.bytes(batch)
            slice_of_pack = slice_tokens(point.tokens, degree, self._settings.slice_multiple)
            measured.append((slice_of_pack, self._runner.bytes(batch)))
        return [measured[0], measured[2]]

    def _rounded(self, tokens: float) -> int:
        """A rank's slice of at most so many tokens."""
        multiple = self._settings.slice_multiple
        return max(1, int(tokens) // multiple) * multiple

    def _batch(self, point: Point) -> PlannedBatch:
        settings = self._settings
        plan, lengths = plan_of(point, settings.domain_size, settings.in_rounds)
        return self._runner.batch(plan, Sequences(lengths, range(len(lengths)), len(lengths)), self._text)

    def _tokens_per_rank(self, memory: MemoryConstants) -> int:
        """How full the fullest measured micro-batch is, once it is known what memory holds."""
        settings = self._settings
        if settings.max_tokens_per_rank is None:
            self._capacity = memory.capacity(settings.micro_batches_in_flight)
            if self._capacity < settings.slice_multiple:
                raise FlexSPError(
                    f"--flexsp-profile: the device that is full first has {memory.budget:.0f} bytes for the job. Its "
                    f"state takes {memory.state:.0f} of them, and a token takes {memory.per_token:.0f} more. Spread "
                    "the model over more ranks or recompute activations"
                )
        return self._rounded(self._useful_tokens())

    def _recomputed_tokens_per_rank(self, memory: MemoryConstants) -> int | None:
        """The same of a micro-batch that recomputes its activations; None where none may."""
        if not self._settings.recompute:
            return None
        given = self._settings.max_recomputed_tokens_per_rank
        if given is None:
            # A ratio of 1 must leave the capacity as it is.
            return int(self._capacity * (memory.per_token / memory.recomputed_per_token))
        if given < self._capacity:
            raise FlexSPError(
                f"--flexsp-profile: a rank holds {self._capacity:,} tokens of a micro-batch that recomputes nothing, "
                f"more than --flexsp-max-recomputed-tokens-per-rank {given}, so nothing is gained. Raise that, or take "
                "--flexsp-recompute out"
            )
        return given

    def _useful_tokens(self) -> float:
        """What memory holds, but no more than a plan would give one micro-batch of a rank."""
        batch_tokens = get_args().global_batch_size * self._tokens_per_sample
        even_share = batch_tokens / self._settings.domain_size
        return min(self._capacity, max(even_share, self._longest / max(self._settings.degrees)))

    def _measure_exchanges(self, tokens_per_rank: int, show: Show) -> list[dict[str, Any]]:
        """Bare all-to-alls of each degree, at the sizes of a layer's."""
        args = get_args()
        bytes_per_token = exchange_bytes_per_token(args) / exchanges_per_micro_batch(args)
        wide = [degree for degree in self._settings.degrees if degree > 1]
        measured = []
        for number, degree in enumerate(wide):
            for share in (0.25, 1.0):
                size = int(bytes_per_token * tokens_per_rank * share)
                seconds = self._runner.exchange_seconds(degree, size, _EXCHANGE_REPEATS)
                measured.append({"degree": degree, "bytes": size, "seconds": seconds})
            show("all-to-alls", (number + 1) / len(wide))
        return measured

    def _points(self, tokens_per_rank: int) -> list[Point]:
        settings = self._settings
        return choose_points(
            settings.degrees,
            tokens_per_rank,
            self._lengths,
            self._longest,
            settings.count_multiple,
            settings.pipeline_stages,
            settings.recompute,
        )

    def _measure_steps(
        self, points: list[Point], fit_to: Callable[[list[list[float]]], CostModel | None], show: Show
    ) -> tuple[list[list[float]], list[PlannedBatch], list[list[float]]]:
        """Seconds of every point; batches planned with the first round's fit, and their seconds.

        Round after round, in orders that differ: a slow minute is then neither one point's alone nor the check's.
        """
        batches = [self._batch(point) for point in points]
        # Kernels are chosen and memory is found: not what steps cost later. A CPU has nothing to choose.
        fullest = {(point.degree, point.recomputed): number for number, point in reversed(list(enumerate(points)))}
        for done, number in enumerate(fullest.values() if on_cpu() else range(len(points))):
            self._runner.seconds(batches[number])
            show("warm-up", (done + 1) / len(points))
        seconds: list[list[float]] = [[] for _ in points]
        planned: list[PlannedBatch] = []
        taken: list[list[float]] = []
        limit, spent, rounds = self._settings.profile_seconds, 0.0, 0
        while rounds < _FEWEST_ROUNDS or (rounds < _MOST_ROUNDS and spent * (rounds + 1) / rounds < limit):
            if rounds == 1:
                planned = self._planned_steps.plan(fit_to(seconds))
                taken = [[] for _ in planned]
            runs = [(batch, own) for batch, own in zip(batches, seconds, strict=True)]
            runs += [(planned[number], taken[number]) for number in repeated(taken, limit)]
            # A different order in each round, the same on all ranks.
            for done, index in enumerate(np.random.default_rng(rounds).permutation(len(runs)).tolist()):
                batch, own = runs[index]
                own.append(self._runner.seconds(batch))
                show("steps", min(1.0, (rounds + (done + 1) / len(runs)) / _FEWEST_ROUNDS))
            spent = sum(map(sum, seconds))
            rounds += 1
        return seconds, planned, taken

    def _fit(
        self,
        memory: MemoryConstants,
        measured: list[MeasuredMemory],
        exchanges: list[dict[str, Any]],
        points: list[Point],
        seconds: list[list[float]],
    ) -> CostModel | None:
        """The cost model, on the rank that writes it."""
        if not self._writes:
            return None
        args = get_args()
        further = self._settings.pipeline_stages - 1
        samples = [
            [
                Sample(point.degree, point.tokens, point.tokens_squared, point.rounds, taken, further, point.recomputed)
                for taken in repeats
            ]
            for point, repeats in zip(points, seconds, strict=True)
        ]
        every = [sample for repeats in samples for sample in repeats]
        bytes_per_token = exchange_bytes_per_token(args)
        least = {
            degree: _LEAST_EXCHANGE * bytes_per_token * seconds
            for degree, seconds in seconds_per_byte(exchanges).items()
        }
        constants = fit(every, least)
        found = quality(constants, every)
        return CostModel(
            memory_budget_bytes=memory.budget,
            model_state_bytes=memory.state,
            activation_bytes_per_token=memory.per_token,
            attention_seconds_per_token_squared=constants.token_squared,
            linear_seconds_per_token=constants.token,
            micro_batch_overhead_seconds=constants.micro_batch,
            exchange_bytes_per_token=bytes_per_token,
            exchange_bandwidth_bytes_per_second={
                degree: bytes_per_token / taken for degree, taken in constants.exchanged_token.items()
            },
            exchange_latency_seconds=dict(constants.latency),
            step_overhead_seconds=constants.step,
            pipeline_fill_share=constants.fill_share,
            recomputed_activation_bytes_per_token=memory.recomputed_per_token,
            recompute_share=constants.recompute_share,
            note=f"measured on {describe_machine()['device']}, R^2 {found.r_squared:.4f}",
            measurement={
                **describe_machine(),
                "job": describe_job(args),
                "world_size": dist.get_world_size(),
                "domain_size": self._settings.domain_size,
                "fit": fit_record(found),
                "points": [
                    point_record(point, repeats, constants) for point, repeats in zip(points, samples, strict=True)
                ],
                "exchanges": exchanges,
                "memory": [record for of_degree in measured for record in of_degree.records()],
            },
        )
