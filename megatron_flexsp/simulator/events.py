"""A plan run on paper: when each micro-batch's forward and backward starts and ends on each pipeline stage.

Every rank works off its own list of operations in order, as the executor does. An operation starts when all
ranks of its block have come to it and what it needs from the neighbouring stage is there. That is all that
is assumed, so what a pipeline or a straggler does to a plan shows without a formula for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.planner import Plan
from megatron_flexsp.planner.laws import rounds
from megatron_flexsp.trace_format import Kind

# A backward does two matrix products for each one of its forward, and that one again where it recomputes.
_SHARES = {Kind.BOTH: 1.0, Kind.FORWARD: 1 / 3, Kind.BACKWARD: 2 / 3}
_RECOMPUTED_SHARES = {Kind.BOTH: 1.0, Kind.FORWARD: 1 / 4, Kind.BACKWARD: 3 / 4}


@dataclass(frozen=True)
class Operation:
    """One pass of one micro-batch through one pipeline stage, on all ranks of its block at once."""

    micro_batch: int
    """Its place in the plan."""

    stage: int
    kind: Kind
    ranks: range
    """Ranks of the domain."""

    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """One step."""

    plan: Plan
    pipeline_stages: int
    operations: tuple[Operation, ...]
    step_seconds: float
    """Until the last rank of the last stage is done, and gradients are reduced."""

    @property
    def busy_share(self) -> float:
        """Mean share of the step that a rank runs sequences, 0 to 1; fillers and waits are the rest."""
        if self.step_seconds == 0:
            return 1.0
        busy = sum(
            len(operation.ranks) * (operation.end_seconds - operation.start_seconds)
            for operation in self.operations
            if not self.plan.micro_batches[operation.micro_batch].is_filler
        )
        return busy / (self.plan.domain_size * self.pipeline_stages * self.step_seconds)


def simulate(
    plan: Plan,
    micro_batch_seconds: ArrayLike,
    *,
    pipeline_stages: int = 1,
    slowdowns: ArrayLike | None = None,
    reduction_seconds: float = 0.0,
) -> Timeline:
    """Run one step of a plan on paper.

    Parameters
    ----------
    plan
        The plan.
    micro_batch_seconds
        What each micro-batch takes on one stage, shape (micro-batches,), as ``planner.micro_batch_seconds`` gives it.
    pipeline_stages
        With more than one, each rank runs Megatron's 1F1B order: forwards until the pipeline is full, then a
        backward after each forward. Transfers between stages take no time.
    slowdowns
        How many times longer each rank takes than the cost model says, shape (domain,) or (domain, stages). A
        group takes as long as its slowest rank.
    reduction_seconds
        What the end of the step takes, once all ranks have come there.
    """
    factors = np.ones((plan.domain_size, pipeline_stages))
    if slowdowns is not None:
        given = np.asarray(slowdowns, dtype=np.float64)
        factors *= given[:, None] if given.ndim == 1 else given
    seconds = np.asarray(micro_batch_seconds, dtype=np.float64).tolist()
    durations = np.array(
        [
            alone * factors[item.ranks.start : item.ranks.stop].max(axis=0)
            for item, alone in zip(plan.micro_batches, seconds, strict=True)
        ]
    )
    items = _items(plan)
    held = np.array([durations[list(item.micro_batches)].max(axis=0) for item in items])
    ends = _Shop(items, held, plan.domain_size, pipeline_stages).run()
    operations = tuple(
        Operation(
            micro_batch=index,
            stage=stage,
            kind=kind,
            ranks=plan.micro_batches[index].ranks,
            start_seconds=start,
            end_seconds=start + items[item].share(kind) * float(durations[index, stage]),
        )
        for (item, stage, kind), (start, _) in ends.items()
        for index in items[item].micro_batches
    )
    finished = max(end for _, end in ends.values())
    return Timeline(plan, pipeline_stages, operations, finished + reduction_seconds)


@dataclass(frozen=True)
class _Item:
    """What is run as one: a micro-batch, or a whole round of a lockstep plan."""

    ranks: range
    micro_batches: tuple[int, ...]
    recomputed: bool = False

    def share(self, kind: Kind) -> float:
        """Which part of its time a pass takes."""
        return (_RECOMPUTED_SHARES if self.recomputed else _SHARES)[kind]


def _items(plan: Plan) -> list[_Item]:
    """In lockstep all ranks meet in every layer of a round, in collectives that the plan knows nothing of."""
    if plan.schedule != "lockstep":
        return [_Item(item.ranks, (index,), item.recomputed) for index, item in enumerate(plan.micro_batches)]
    numbers = iter(range(len(plan.micro_batches)))
    return [
        _Item(range(plan.domain_size), tuple(next(numbers) for _ in together), together[0].recomputed)
        for together in rounds(plan)
    ]


_Key = tuple[int, int, Kind]


class _Shop:
    """Ranks and stages, each with its list of operations: run each as soon as all that it waits for is done."""

    def __init__(
        self, items: Sequence[_Item], durations: NDArray[np.float64], domain_size: int, pipeline_stages: int
    ) -> None:
        self._items = items
        self._stages = pipeline_stages
        self._durations = durations
        self._free_at = np.zeros((domain_size, pipeline_stages))
        self._done: dict[_Key, tuple[float, float]] = {}
        of_rank: list[list[int]] = [[] for _ in range(domain_size)]
        for number, item in enumerate(items):
            for rank in item.ranks:
                of_rank[rank].append(number)
        self._queues = {
            (rank, stage): deque(one_forward_one_backward(mine, stage, pipeline_stages))
            for rank, mine in enumerate(of_rank)
            for stage in range(pipeline_stages)
        }

    def run(self) -> dict[_Key, tuple[float, float]]:
        """Start and end of every operation."""
        waiting = deque(self._queues)
        while waiting:
            rank, stage = waiting.popleft()
            queue = self._queues[rank, stage]
            while queue:
                number, kind = queue[0]
                if not self._run((number, stage, kind)):
                    break
                waiting.extend((member, stage) for member in self._items[number].ranks if member != rank)
                waiting.extend((rank, near) for near in (stage - 1, stage + 1) if 0 <= near < self._stages)
        stuck = [key for key, queue in self._queues.items() if queue]
        assert not stuck, f"ranks wait for each other: {stuck[:4]}; a plan that keeps its laws can't do that"
        return self._done

    def _run(self, key: _Key) -> bool:
        """Run an operation if nothing keeps it waiting."""
        number, stage, kind = key
        ranks = self._items[number].ranks
        queues = [self._queues[rank, stage] for rank in ranks]
        if any(not queue or queue[0] != (number, kind) for queue in queues):
            return False
        ready = 0.0
        for needed in self._needed(key):
            if needed not in self._done:
                return False
            ready = max(ready, self._done[needed][1])
        block = slice(ranks.start, ranks.stop)
        start = max(ready, float(self._free_at[block, stage].max()))
        end = start + self._items[number].share(kind) * float(self._durations[number, stage])
        self._free_at[block, stage] = end
        self._done[key] = start, end
        for queue in queues:
            queue.popleft()
        return True

    def _needed(self, key: _Key) -> list[_Key]:
        """The operations of other stages that must be done first."""
        number, stage, kind = key
        if kind is Kind.FORWARD and stage > 0:
            return [(number, stage - 1, Kind.FORWARD)]
        if kind is Kind.BACKWARD and stage < self._stages - 1:
            return [(number, stage + 1, Kind.BACKWARD)]
        return []


def one_forward_one_backward(items: Sequence[int], stage: int, stages: int) -> list[tuple[int, Kind]]:
    """The order in which a stage runs forwards and backwards (PipeDream-Flush, Narayanan et al., arXiv 2006.09503).

    >>> [f"{kind[0]}{item}" for item, kind in one_forward_one_backward([0, 1, 2], stage=0, stages=2)]
    ['f0', 'f1', 'b0', 'f2', 'b1', 'b2']
    """
    if stages == 1:
        return [(item, Kind.BOTH) for item in items]
    ahead = min(stages - 1 - stage, len(items))
    order = [(item, Kind.FORWARD) for item in items[:ahead]]
    for number, item in enumerate(items[ahead:]):
        order += [(item, Kind.FORWARD), (items[number], Kind.BACKWARD)]
    return order + [(item, Kind.BACKWARD) for item in items[len(items) - ahead :]]
