"""``--flexsp-profile``: the job measures itself instead of training, and writes its cost model.

It takes the place of Megatron's second training step, when overlaps and everything else are as in training. What it
runs are Megatron's own steps, on the job's own model, groups and options, with a learning rate of 0; so pipelines,
recomputation, precision and gradient reduction are measured with whatever they cost.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.training import get_args, print_rank_0
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.context import Context, on_cpu
from megatron_flexsp.megatron.estimate import exchange_bytes_per_token, exchanges_per_micro_batch
from megatron_flexsp.megatron.measured_steps import MeasuredBytes, RandomText, StepRunner
from megatron_flexsp.megatron.provenance import describe_job, describe_machine
from megatron_flexsp.planner import CostModel, Plan
from megatron_flexsp.profiler.fit import Constants, Quality, Sample, fit, quality
from megatron_flexsp.profiler.points import Point, choose_points, plan_of
from megatron_flexsp.profiler.record import check_writable, write_whole

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 9
"""Rounds over all points, whatever --flexsp-profile-seconds says."""
_EXCHANGE_REPEATS = 5
_MOST_CHECKS = 3
_PLANS_UNDER_WAY_SECONDS = 120.0
"""What plans that are still under way may take before measuring begins."""
_SAMPLED_LENGTHS = 4096
_USABLE_MEMORY = 0.94
"""Of a GPU's memory that nothing outside the allocator takes: the rest is for its fragments."""
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
            self._run.settle(_PLANS_UNDER_WAY_SECONDS)
            runner = StepRunner(original, signature.bind(*args, **kwargs), context)
            _Measurement(self._run, runner, context).take()
            context.hosts.barrier()
            dist.destroy_process_group()
            raise SystemExit(0)

        return train_step


Show = Callable[[str, float], None]
"""Tells which stage is under way, and how much of it is done, 0 to 1."""


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
        count = min(len(self._source), _SAMPLED_LENGTHS)
        self._lengths: NDArray[np.int64] = self._source.lengths(np.arange(count))
        longest = max(part.longest for part in self._source.parts)
        self._longest = min(longest, max(self._settings.degrees) * context.token_capacity)
        args = get_args()
        self._text = run.reader(RandomText(args.vocab_size or args.padded_vocab_size, self._longest))
        self._capacity = context.token_capacity
        """Tokens that a rank can hold; estimated until memory is measured."""

    def take(self) -> None:
        """Everything, in order; the file is written before the check and once more after it."""
        with self._progress() as show:
            memory = self._measure_memory(show)
            tokens_per_rank = self._tokens_per_rank(memory)
            exchanges = self._measure_exchanges(tokens_per_rank, show)
            points = self._points(tokens_per_rank)
            seconds = self._measure_points(points, show)
            cost_model = self._fit(memory, exchanges, points, seconds)
            if cost_model is not None:
                write_whole(self._path, cost_model)
            checks = self._check(cost_model, show)
        if cost_model is not None:
            measurement = {**cost_model.measurement, "check": checks}
            write_whole(self._path, replace(cost_model, measurement=measurement))
            _print_result(self._path, cost_model, checks)

    def _measure_memory(self, show: Show) -> list[tuple[int, MeasuredBytes]]:
        """Bytes of steps of two sizes with as many micro-batches as the pipeline holds at once."""
        settings = self._settings
        rounds = -(-settings.micro_batches_in_flight // settings.count_multiple) * settings.count_multiple
        measured = []
        for share in (0.25, 0.5, 0.5):  # the first is a warm-up too: what libraries allocate once is not a token's
            tokens = self._rounded(self._useful_tokens() * share)
            point = Point(1, (min(tokens, self._longest),) * max(1, tokens // self._longest), rounds)
            batch = self._runner.batch(*plan_of(point, settings.domain_size), self._text)
            self._runner.bytes(batch)
            measured.append((point.tokens, self._runner.bytes(batch)))
            show("memory", len(measured) / 3)
        return [measured[0], measured[2]]

    def _rounded(self, tokens: float) -> int:
        """A rank's slice of at most so many tokens."""
        multiple = self._settings.slice_multiple
        return max(1, int(tokens) // multiple) * multiple

    def _memory_constants(self, memory: list[tuple[int, MeasuredBytes]]) -> tuple[float, float, float]:
        """Budget, state and activations for each token of a slice, in bytes."""
        in_flight = self._settings.micro_batches_in_flight
        (few, small), (many, large) = memory
        if many == few:  # too small a job to tell; all of it is the tokens'
            per_token, fixed = large.activations / many / in_flight, 0.0
        else:
            per_token = (large.activations - small.activations) / (many - few) / in_flight
            fixed = max(0.0, large.activations - per_token * many * in_flight)
        per_token = max(per_token, 1.0)
        state = large.state + fixed
        if on_cpu():
            # No limit to measure: the budget says what the run was given.
            return state + per_token * (self._context.token_capacity * in_flight + 0.5), state, per_token
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        budget = torch.tensor(_USABLE_MEMORY * (total - outside), dtype=torch.float64)
        self._context.hosts.all_reduce(budget, dist.ReduceOp.MIN)
        return float(budget), state, per_token

    def _tokens_per_rank(self, memory: list[tuple[int, MeasuredBytes]]) -> int:
        """How full the fullest measured micro-batch is, once it is known what memory holds."""
        settings = self._settings
        if settings.max_tokens_per_rank is None:
            budget, state, per_token = self._memory_constants(memory)
            self._capacity = int((budget - state) / per_token) // settings.micro_batches_in_flight
            if self._capacity < settings.slice_multiple:
                raise FlexSPError(
                    f"--flexsp-profile: this device has {budget:.0f} bytes for the job, and its state takes "
                    f"{state:.0f} of them; a token takes {per_token:.0f} more. Spread the model over more ranks or "
                    "recompute activations"
                )
        return self._rounded(self._useful_tokens())

    def _useful_tokens(self) -> float:
        """What memory holds, but no more than a plan would give one micro-batch of a rank."""
        batch_tokens = get_args().global_batch_size * float(self._lengths.mean())
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
        return choose_points(settings.degrees, tokens_per_rank, self._lengths, self._longest, settings.count_multiple)

    def _measure_points(self, points: list[Point], show: Show) -> list[list[float]]:
        """Seconds of every point, round after round, so that a slow minute is not one point's."""
        domain_size = self._settings.domain_size
        batches = [self._runner.batch(*plan_of(point, domain_size), self._text) for point in points]
        for number, batch in enumerate(batches):
            self._runner.seconds(batch)  # kernels are chosen and memory is found: not what steps cost later
            show("warm-up", (number + 1) / len(batches))
        seconds: list[list[float]] = [[] for _ in points]
        spent, rounds = 0.0, 0
        limit = self._settings.profile_seconds
        while rounds < _FEWEST_ROUNDS or (rounds < _MOST_ROUNDS and spent * (rounds + 1) / rounds < limit):
            # A different order in each round, the same on all ranks.
            for done, index in enumerate(np.random.default_rng(rounds).permutation(len(points)).tolist()):
                seconds[index].append(self._runner.seconds(batches[index]))
                spent += seconds[index][-1]
                part = (rounds + (done + 1) / len(points)) / _FEWEST_ROUNDS
                show("steps", min(part, spent / max(limit, 1.0), 1.0))
            rounds += 1
        return seconds

    def _fit(
        self,
        memory: list[tuple[int, MeasuredBytes]],
        exchanges: list[dict[str, Any]],
        points: list[Point],
        seconds: list[list[float]],
    ) -> CostModel | None:
        """The cost model, on the rank that writes it."""
        budget, state, per_token = self._memory_constants(memory)  # collective
        if not self._writes:
            return None
        args = get_args()
        fill = self._settings.pipeline_stages - 1
        samples = [
            [Sample(point.degree, point.tokens, point.tokens_squared, point.rounds + fill, taken) for taken in repeats]
            for point, repeats in zip(points, seconds, strict=True)
        ]
        every = [sample for repeats in samples for sample in repeats]
        bytes_per_token = exchange_bytes_per_token(args)
        least = {
            degree: _LEAST_EXCHANGE * bytes_per_token * seconds_per_byte
            for degree, seconds_per_byte in _seconds_per_byte(exchanges).items()
        }
        constants = fit(every, least)
        found = quality(constants, every)
        return CostModel(
            memory_budget_bytes=budget,
            model_state_bytes=state,
            activation_bytes_per_token=per_token,
            attention_seconds_per_token_squared=constants.token_squared,
            linear_seconds_per_token=constants.token,
            micro_batch_overhead_seconds=constants.micro_batch,
            exchange_bytes_per_token=bytes_per_token,
            exchange_bandwidth_bytes_per_second={
                degree: bytes_per_token / taken for degree, taken in constants.exchanged_token.items()
            },
            exchange_latency_seconds=dict(constants.latency),
            step_overhead_seconds=constants.step,
            note=f"measured on {describe_machine()['device']}, R^2 {found.r_squared:.4f}",
            measurement={
                **describe_machine(),
                "job": describe_job(args),
                "world_size": dist.get_world_size(),
                "domain_size": self._settings.domain_size,
                "fit": _fit_record(found),
                "points": [
                    _point_record(point, repeats, constants) for point, repeats in zip(points, samples, strict=True)
                ],
                "exchanges": exchanges,
                "memory": [
                    {"tokens": tokens, "state_bytes": x.state, "activation_bytes": x.activations}
                    for tokens, x in memory
                ],
            },
        )

    def _check(self, cost_model: CostModel | None, show: Show) -> list[dict[str, Any]]:
        """Run real batches as that cost model plans them, over several choices of degrees."""
        chosen = list(self._check_batches())
        batches = []
        for degrees, samples in chosen:
            lengths = self._source.lengths(np.array(samples))
            plan = self._context.channel.share(lengths, self._planned(cost_model, degrees, lengths))
            batches.append(self._runner.batch(plan, lengths, self._reader(self._source), samples))
        seconds: list[list[float]] = [[] for _ in batches]
        spent, repeats = 0.0, 0
        while not repeats or (
            repeats < _MOST_CHECKS and spent * (repeats + 1) / repeats < self._settings.profile_seconds / 2
        ):
            # One step differs from the next, as in training.
            for number, batch in enumerate(batches):
                seconds[number].append(self._runner.seconds(batch))
                spent += seconds[number][-1]
                show("check", (repeats + (number + 1) / len(batches)) / _MOST_CHECKS)
            repeats += 1
        overhead = 0.0 if cost_model is None else cost_model.step_overhead_seconds
        return [
            {
                "degrees": sorted({item.degree for item in batch.plan.micro_batches if not item.is_filler}),
                "micro_batches": len(batch.plan.micro_batches),
                "tokens": int(batch.lengths.sum()),
                "predicted_seconds": batch.plan.predicted_seconds + overhead,
                "measured_seconds": float(np.median(taken)),
            }
            for batch, taken in zip(batches, seconds, strict=True)
        ]

    def _planned(
        self, cost_model: CostModel | None, degrees: tuple[int, ...], lengths: NDArray[np.int64]
    ) -> Plan | FlexSPError | None:
        """On the planning rank a plan under the new cost model, or why there is none."""
        if cost_model is None:
            return None
        request = self._context.request
        options = {**request.options, "degrees": degrees}
        try:
            return replace(request, cost_model=cost_model, token_capacity=self._capacity, options=options).make(lengths)
        except FlexSPError as error:
            return error

    def _check_batches(self) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """Degrees that a plan may use, and sequences that they can hold: all, the widest and others, narrow ones."""
        settings, size = self._settings, get_args().global_batch_size
        degrees = settings.degrees
        widest = degrees[-1]
        choices = [degrees, degrees, degrees, (widest,)]
        choices += [(degree, widest) for degree in degrees[:-1] if len(degrees) > 2]
        choices += [degrees[:count] for count in range(1, len(degrees))]
        total, begin = len(self._source), 0
        static = settings.schedule == "static"
        for allowed in choices[:1] if static else choices:
            samples = [(begin + k) % total for k in range(size)]
            begin += size
            room = allowed[-1] * self._rounded(self._capacity)
            lengths = self._source.lengths(np.array(samples))
            samples = [sample for sample, length in zip(samples, lengths, strict=True) if length <= room]
            if samples:
                yield allowed, samples

    def _progress(self) -> _Progress:
        return _Progress(self._writes)


class _Progress:
    """A bar on the writing rank's terminal; without a terminal, a line for each stage."""

    _STAGES = ("memory", "all-to-alls", "warm-up", "steps", "check")
    _WEIGHTS = (0.04, 0.04, 0.17, 0.55, 0.2)

    def __init__(self, shows: bool) -> None:
        console = Console(stderr=True)
        self._shows = shows
        self._on_terminal = shows and console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not self._on_terminal, transient=True)
        self._task = self._bar.add_task("profiling", total=1.0)
        self._stage = ""

    def __enter__(self) -> Show:
        self._bar.start()
        return self._show

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def _show(self, stage: str, part: float) -> None:
        number = self._STAGES.index(stage)
        done = sum(self._WEIGHTS[:number]) + self._WEIGHTS[number] * part
        self._bar.update(self._task, completed=done, description=f"profiling: {stage}")
        if stage != self._stage and self._shows and not self._on_terminal:
            print_rank_0(f" > [flexsp] profiling: {stage}")
        self._stage = stage


def _seconds_per_byte(exchanges: Iterable[dict[str, Any]]) -> dict[int, float]:
    """By degree, what a further byte of an all-to-all takes; 0 where it can't be seen."""
    by_degree: dict[int, list[tuple[int, float]]] = {}
    for item in exchanges:
        by_degree.setdefault(item["degree"], []).append((item["bytes"], float(np.median(item["seconds"]))))
    slopes = {}
    for degree, ((few, short), (many, long)) in by_degree.items():
        slopes[degree] = max(0.0, (long - short) / (many - few)) if many > few else 0.0
    return slopes


def _fit_record(found: Quality) -> dict[str, Any]:
    return {
        "method": "least absolute relative deviations, constants not negative",
        "r_squared": found.r_squared,
        "median_error": found.median_error,
        "largest_error": found.largest_error,
    }


def _point_record(point: Point, repeats: Sequence[Sample], constants: Constants) -> dict[str, Any]:
    median = float(np.median([sample.seconds for sample in repeats]))
    predicted = constants.seconds(repeats[0])
    return {
        "degree": point.degree,
        "rounds": point.rounds,
        "sequences": len(point.lengths),
        "tokens": point.tokens,
        "tokens_squared": point.tokens_squared,
        "seconds": [sample.seconds for sample in repeats],
        "predicted_seconds": predicted,
        "residual_seconds": median - predicted,
    }


def _print_result(path: str, cost_model: CostModel, checks: list[dict[str, Any]]) -> None:
    console = Console(highlight=False, width=None)
    fitted = cost_model.measurement["fit"]
    console.print(
        f"[flexsp] cost model written to {path}: R^2 {fitted['r_squared']:.4f}, median error "
        f"{fitted['median_error']:.1%}, largest {fitted['largest_error']:.1%}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("step", "degrees", "micro-batches", "tokens", "predicted s", "measured s", "ratio"):
        table.add_column(name, justify="right")
    for number, check in enumerate(checks, start=1):
        table.add_row(
            str(number),
            ",".join(map(str, check["degrees"])),
            str(check["micro_batches"]),
            f"{check['tokens']:,}",
            f"{check['predicted_seconds']:.3f}",
            f"{check['measured_seconds']:.3f}",
            f"{check['predicted_seconds'] / check['measured_seconds']:.2f}",
        )
    console.print(table)
    if checks:
        errors = [abs(check["predicted_seconds"] / check["measured_seconds"] - 1) for check in checks]
        console.print(
            f"[flexsp] predicted against measured, {len(checks)} steps that were not fitted: "
            f"mean error {np.mean(errors):.1%}, largest {max(errors):.1%}",
            markup=False,
            soft_wrap=True,
        )
