"""``--dynamic-context-parallel --sequence-packing-scheduler flexsp``: our planner with Megatron's own executor.

Megatron's dev branch packs sequences by a scheduler that it looks up by name, and runs what the scheduler says in
context-parallel groups of its own. Ours is registered beside its two, where that is there. One rank plans, a step
ahead where the data allows it; all others are told, since a difference between two ranks' plans would train nonsense.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError, named_by_flags
from megatron_flexsp.megatron.context import on_cpu
from megatron_flexsp.megatron.degrees import parse_degrees
from megatron_flexsp.megatron.estimate import estimate_cost_model, with_ring_exchange
from megatron_flexsp.megatron.lookahead import Lookahead, lengths_of
from megatron_flexsp.megatron.provenance import check_same_job
from megatron_flexsp.planner import CostModel, Plan, balance
from megatron_flexsp.planner.full_rounds import FullRoundsRequest
from megatron_flexsp.planner.laws import rounds
from megatron_flexsp.planner.service import PlanningService

NAME = "flexsp"
_TIME_LIMIT_SECONDS = 0.1
_PLANNER_FLAGS = {
    "token_capacity": "--max-seqlen-per-dp-cp-rank",
    "degrees": "--flexsp-degrees",
    "lengths": "--global-batch-size",
}
"""What stands in errors in the place of the planner's parameters. No sequence is too long for all groups here."""


def group_sizes(domain_size: int, narrowest: int = 1) -> tuple[int, ...]:
    """The groups that Megatron makes (``parallel_state.create_dynamic_dp_cp_groups``), narrowest first.

    >>> group_sizes(12, narrowest=2)
    (2, 4, 12)
    """
    powers = (1 << exponent for exponent in range(domain_size.bit_length() - 1))
    return (*(power for power in powers if narrowest <= power < domain_size), domain_size)


@dataclass(frozen=True)
class _Settings:
    """What the job's arguments say of planning."""

    args: argparse.Namespace
    domain_size: int
    degrees: tuple[int, ...]
    cost_model: CostModel | None
    time_limit_seconds: float


class PackingJob:
    """The job that the scheduler plans for. Megatron makes a scheduler anew for each step; this stays."""

    def __init__(self) -> None:
        self._settings: _Settings | None = None
        self._request: FullRoundsRequest | None = None
        self._service: PlanningService | None = None
        self._steps = 0

    def configure(self, args: argparse.Namespace) -> None:
        """Check our flags against Megatron's validated arguments.

        Raises
        ------
        FlexSPError
            Names the flag.
        """
        domain_size = args.data_parallel_size * args.context_parallel_size
        limit = _TIME_LIMIT_SECONDS if args.flexsp_solver_time_limit is None else args.flexsp_solver_time_limit
        if not limit >= 0:
            raise FlexSPError(f"--flexsp-solver-time-limit {limit}: must be at least 0")
        cost_model = None
        if args.flexsp_cost_model is not None:
            cost_model = CostModel.load(args.flexsp_cost_model)
            check_same_job(args, cost_model, domain_size)
        degrees = _degrees(args, domain_size, cost_model)
        self._settings = _Settings(args, domain_size, degrees, cost_model, limit)
        self._request = None
        if args.rank == 0:
            print(
                " > [flexsp] plans for Megatron's dynamic context parallelism, "
                f"groups of {', '.join(map(str, degrees))} ranks with at most "
                f"{args.max_seqlen_per_dp_cp_rank} tokens each, costs "
                f"{'estimated' if cost_model is None else 'of ' + args.flexsp_cost_model}"
            )

    def prepare(self, count_multiple: int) -> FullRoundsRequest:
        """How this job's steps are planned; on the rank that plans them."""
        if self._request is None:
            assert self._settings is not None, "arguments are validated before a scheduler is made"
            args = self._settings.args
            self._request = FullRoundsRequest(
                self._settings.cost_model or _estimate(args, self._settings.degrees),
                self._settings.domain_size,
                args.max_seqlen_per_dp_cp_rank,
                slice_multiple=args.tensor_model_parallel_size if args.sequence_parallel else 1,
                count_multiple=count_multiple,
                time_limit_seconds=self._settings.time_limit_seconds,
                options={
                    "schedule": "lockstep",
                    "degrees": self._settings.degrees,
                    "pipeline_stages": args.pipeline_model_parallel_size,
                },
            )
        return self._request

    def submit(self, ahead: Lookahead, lengths: NDArray[np.int64], count_multiple: int) -> None:
        """Begin to plan the step that comes next out of an iterator."""
        if self._service is None:
            self._service = PlanningService(self.prepare(count_multiple))
        ahead.pending = self._service.submit(lengths)

    @named_by_flags(_PLANNER_FLAGS)
    def plan(self, ahead: Lookahead | None, lengths: NDArray[np.int64], count_multiple: int) -> Plan:
        """The step's plan: the one that was begun ahead, or made here.

        Raises
        ------
        FlexSPError
            If there is no legal plan.
        """
        started = time.monotonic()
        request = self.prepare(count_multiple)
        pending = None if ahead is None else ahead.pending
        if self._service is not None and pending is not None and np.array_equal(pending.lengths, lengths):
            plan = self._service.result(pending)
        else:
            plan = request.make(lengths)
        _check_padding(plan, lengths)
        self._log(plan, lengths, request.cost_model, time.monotonic() - started)
        return plan

    def _log(self, plan: Plan, lengths: NDArray[np.int64], cost_model: CostModel, waited_seconds: float) -> None:
        assert self._settings is not None
        self._steps += 1
        if (self._steps - 1) % self._settings.args.log_interval:
            return
        degrees = Counter(item.degree for item in plan.micro_batches)
        print(
            f" [flexsp] plan {self._steps:8d} | micro-batches of each degree: "
            + ", ".join(f"{count} x {degree}" for degree, count in sorted(degrees.items(), reverse=True))
            + f" | micro-batches a rank: {len(rounds(plan))} | sequences: {len(lengths)} | tokens: {lengths.sum()}"
            f" | predicted balance: {balance(plan, lengths, cost_model):.1%}"
            f" | planning (ms): {plan.solve_seconds * 1e3:.1f} | waited for plan (ms): {waited_seconds * 1e3:.1f} |",
            flush=True,
        )


def scheduler_class(base: Any, job: PackingJob) -> Any:
    """Megatron's ``DefaultDynamicCPScheduler`` with our planner in place of its rule."""

    class FlexSPScheduler(base):  # type: ignore[misc]
        """Plans rounds by a cost model; all else is Megatron's."""

        _meeting: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        _ahead: Lookahead | None = None

        def run(
            self,
            data_iterator: Any,
            num_microbatches: int,
            dp_group: dist.ProcessGroup,
            tp_group: dist.ProcessGroup,
            pp_group: dist.ProcessGroup,
            dp_cp_group: dist.ProcessGroup,
            *rest: Any,
            **named: Any,
        ) -> Any:
            """Collective: schedule a step, then begin to plan the next."""
            self._meeting = (pp_group, dp_cp_group)
            self._ahead = Lookahead.beneath(data_iterator)
            done = super().run(
                data_iterator, num_microbatches, dp_group, tp_group, pp_group, dp_cp_group, *rest, **named
            )
            if self._ahead is not None:
                self._look_ahead(self._ahead, num_microbatches, dp_group)
            return done

        def get_groups_and_subsamples(self, sample_id_seqlens: Sequence[tuple[int, int]]) -> list[list[list[int]]]:
            """Collective while a step is scheduled: for each round, what each rank of the domain holds.

            ``sample_id_seqlens`` are pairs of an id and its padded tokens; the lists hold ids.
            """
            lengths = np.array([tokens for _, tokens in sample_id_seqlens], dtype=np.int64)
            plan = self._agreed(lambda: job.plan(self._ahead, lengths, self._count_multiple))
            ids = [identity for identity, _ in sample_id_seqlens]
            return [
                [[ids[position] for position in item.sequences] for item in members for _ in item.ranks]
                for members in rounds(plan)
            ]

        @property
        def _count_multiple(self) -> int:
            return self.microbatch_group_size_per_vp_stage or 1

        @property
        def _plans_here(self) -> bool:
            return self._meeting is None or all(group.rank() == 0 for group in self._meeting)

        def _agreed(self, make: Callable[[], Plan]) -> Plan:
            """One rank's plan, or its error, on all ranks that schedule: those of tensor-parallel rank 0."""
            if self._meeting is None:
                return make()
            answer: list[Plan | Exception | None] = [None]
            if self._plans_here:
                try:
                    answer = [make()]
                except FlexSPError as error:
                    answer = [error]
                except Exception as error:  # the others must not wait for a rank that is gone
                    answer = [FlexSPError(f"the planner failed ({type(error).__name__}: {error})")]
            pp_group, dp_cp_group = self._meeting
            if dp_cp_group.rank() == 0:
                _broadcast(answer, pp_group)
            _broadcast(answer, dp_cp_group)
            if isinstance(answer[0], Exception):
                raise answer[0]
            assert answer[0] is not None
            return answer[0]

        def _look_ahead(self, ahead: Lookahead, count: int, dp_group: dist.ProcessGroup) -> None:
            here = lengths_of(ahead.peek(count))
            everywhere: list[list[int]] = [[] for _ in range(dp_group.size())]
            dist.all_gather_object(everywhere, here, group=dp_group)
            ahead.pending = None
            if self._plans_here and all(everywhere):
                lengths = np.array([tokens for rank in everywhere for tokens in rank], dtype=np.int64)
                job.submit(ahead, lengths, self._count_multiple)

    return FlexSPScheduler


def _broadcast(answer: list[Any], group: dist.ProcessGroup) -> None:
    """From the group's first rank to all."""
    if group.size() > 1:
        dist.broadcast_object_list(answer, src=dist.get_global_rank(group, 0), group=group)


def _degrees(args: argparse.Namespace, domain_size: int, cost_model: CostModel | None) -> tuple[int, ...]:
    """The groups that Megatron makes, less those that its attention or the cost model can't do."""
    sizes = group_sizes(domain_size, args.min_dynamic_context_parallel_size)
    if "a2a" in (args.cp_comm_type or ()):
        groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
        sizes = tuple(size for size in sizes if groups // args.tensor_model_parallel_size % size == 0)
    priced = sizes
    if cost_model is not None:
        priced = tuple(size for size in sizes if size == 1 or size in cost_model.exchange_bandwidth_bytes_per_second)
    if args.flexsp_degrees is not None:
        asked = tuple(sorted(set(parse_degrees(args.flexsp_degrees))))
        for degree in asked:
            if degree not in sizes:
                raise FlexSPError(
                    f"--flexsp-degrees: Megatron makes no groups of {degree} ranks here; it has "
                    f"{', '.join(map(str, sizes))}"
                )
            if degree not in priced:
                raise FlexSPError(
                    f"--flexsp-degrees: {args.flexsp_cost_model} has no bandwidth for {degree} ranks. Measure it, or "
                    "leave the degree out"
                )
        priced = asked
    widest = max(priced, default=0)
    if args.seq_length > widest * args.max_seqlen_per_dp_cp_rank:
        raise FlexSPError(
            f"a sequence of --seq-length {args.seq_length} doesn't fit: the widest group that may be used has {widest} "
            f"ranks with --max-seqlen-per-dp-cp-rank {args.max_seqlen_per_dp_cp_rank} tokens each. Raise that, or "
            "allow wider groups (--flexsp-degrees, --flexsp-cost-model)"
        )
    return priced


def _estimate(args: argparse.Namespace, degrees: tuple[int, ...]) -> CostModel:
    gpu = None
    if not on_cpu():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = (properties.major, properties.total_memory)
    estimate = estimate_cost_model(
        args,
        degrees,
        gpu=gpu,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "8")),
        micro_batches_in_flight=args.pipeline_model_parallel_size,
    )
    return estimate if "a2a" in (args.cp_comm_type or ()) else with_ring_exchange(estimate, args)


def _check_padding(plan: Plan, lengths: NDArray[np.int64]) -> None:
    """Megatron's executor cuts each sequence into two pieces for each rank of its group."""
    for item in plan.micro_batches:
        if item.degree > 1 and (lengths[list(item.sequences)] % (2 * item.degree)).any():
            raise FlexSPError(
                f"the data set pads sequences to lengths that don't divide by 2 x {item.degree} ranks "
                f"(one has {max(lengths[list(item.sequences)] % (2 * item.degree))} tokens more). Pad them to a "
                f"multiple of 2 x {plan.domain_size}, as Megatron's own data sets do, or leave degrees out "
                "(--flexsp-degrees)"
            )
