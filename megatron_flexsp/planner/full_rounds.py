"""Lockstep rounds in which every rank holds a sequence, for executors that can't run an empty micro-batch.

A lockstep plan goes in, whose fillers stand on ranks that are left over; a lockstep plan without fillers comes out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.laws import rounds
from megatron_flexsp.planner.plans import MicroBatch, Plan
from megatron_flexsp.planner.rounds import Group, Round
from megatron_flexsp.planner.service import PlanRequest
from megatron_flexsp.planner.timing import step_seconds


def without_fillers(
    plan: Plan,
    lengths: ArrayLike,
    cost_model: CostModel,
    *,
    degrees: Iterable[int],
    token_capacity: int,
    pipeline_stages: int = 1,
) -> Plan:
    """The plan with its fillers' ranks put to work: groups become wider, packs of several sequences are parted.

    Parameters
    ----------
    plan
        A lockstep plan.
    lengths
        Tokens of each sequence of the global batch, shape (sequences,).
    cost_model
        Prices what may be done; it has a bandwidth for every one of ``degrees``.
    degrees
        The degrees that may be used.
    token_capacity
        Tokens that one rank can hold in one micro-batch.
    pipeline_stages
        Stages of the pipeline, for the predicted seconds.

    Returns
    -------
    A lockstep plan of as many rounds, priced anew; the same one where there are no fillers.

    Raises
    ------
    FlexSPError
        If the batch has fewer sequences than the plan has rounds, or the degrees don't fill the domain.
    """
    if not any(item.is_filler for item in plan.micro_batches):
        return plan
    tokens = np.asarray(lengths, dtype=np.int64)
    filling = _Filling(plan.domain_size, tokens.tolist(), cost_model, tuple(sorted(set(degrees))), token_capacity)
    found = [_holding(members) for members in rounds(plan)]
    full = [filling.fill(groups) for groups in filling.spread(found)]
    full.sort(key=lambda groups: -filling.round_seconds(groups))
    micro_batches = tuple(item for groups in full for item in _on_blocks(groups))
    filled = replace(plan, micro_batches=micro_batches)
    seconds = step_seconds(filled, tokens, cost_model, pipeline_stages=pipeline_stages)
    return replace(
        filled, predicted_seconds=seconds, status="optimal" if seconds <= plan.lower_bound_seconds else "feasible"
    )


@dataclass(frozen=True)
class FullRoundsRequest(PlanRequest):
    """A request whose lockstep plans have no fillers. ``options`` names the degrees."""

    def make(self, lengths: NDArray[np.int64], *, quick: bool = False) -> Plan:
        """Plan one batch, put fillers' ranks to work, and check the plan's laws."""
        full = without_fillers(
            super().make(lengths, quick=quick),
            lengths,
            self.cost_model,
            degrees=self.options["degrees"],
            token_capacity=self.token_capacity,
            pipeline_stages=self.options.get("pipeline_stages", 1),
        )
        full.validate(
            lengths, self.token_capacity, slice_multiple=self.slice_multiple, count_multiple=self.count_multiple
        )
        return full


def _holding(members: Iterable[MicroBatch]) -> Round:
    """The groups of a round that hold sequences."""
    return tuple(Group(item.degree, item.sequences) for item in members if not item.is_filler)


def _on_blocks(groups: Round) -> list[MicroBatch]:
    """Widest first, which puts every power of two on an aligned block."""
    items, first = [], 0
    for group in sorted(groups, key=lambda group: -group.degree):
        items.append(MicroBatch(first, group.degree, tuple(sorted(group.sequences))))
        first += group.degree
    return items


class _Filling:
    """What filling rounds takes: the batch, the degrees and what they cost. Groups name positions in the batch."""

    def __init__(
        self, domain_size: int, tokens: list[int], cost_model: CostModel, degrees: tuple[int, ...], token_capacity: int
    ) -> None:
        self._domain_size = domain_size
        self._tokens = tokens
        self._degrees = degrees
        self._capacity = token_capacity
        self._opening = {
            degree: cost_model.micro_batch_overhead_seconds + cost_model.latency_seconds(degree) for degree in degrees
        }
        self._seconds = {degree: cost_model.sequence_seconds(tokens, degree).tolist() for degree in degrees}

    def group_seconds(self, group: Group) -> float:
        row = self._seconds[group.degree]
        return float(self._opening[group.degree] + sum(row[sequence] for sequence in group.sequences))

    def round_seconds(self, groups: Round) -> float:
        return max(map(self.group_seconds, groups), default=0.0)

    def spread(self, found: list[Round]) -> list[Round]:
        """Part the longest rounds until none is empty."""
        found = list(found)
        while () in found:
            partable = [
                index for index, groups in enumerate(found) if sum(len(group.sequences) for group in groups) > 1
            ]
            if not partable:
                raise FlexSPError(
                    f"a step of {len(self._tokens)} sequences can't fill {len(found)} micro-batches on each rank, the "
                    "multiple that the interleaved pipeline needs",
                    "plan more sequences in a step (`lengths`)",
                )
            longest = max(partable, key=lambda index: self.round_seconds(found[index]))
            empty = found.index(())
            found[longest], found[empty] = self._parted(found[longest])
        return found

    def fill(self, groups: Round) -> Round:
        """The cheapest of what can be done, step by step, until no rank is left over."""
        merged = self._merged(groups)
        while free := self._domain_size - sum(group.degree for group in groups):
            choices = [*self._widened(groups, free), *self._split(groups, free)]
            if not choices:
                groups = ()
                break
            groups = min(choices, key=self._price)
        whole = [candidate for candidate in (groups, merged) if candidate]
        if not whole:
            raise FlexSPError(
                f"groups of {', '.join(map(str, self._degrees))} ranks can't fill {self._domain_size} ranks with "
                f"{len(self._tokens)} sequences",
                "allow wider groups (`degrees`), or plan more sequences in a step (`lengths`)",
            )
        return min(whole, key=self._price)

    def _price(self, groups: Round) -> tuple[float, float]:
        """Seconds of the round, and as a tie-break those that all ranks spend."""
        seconds = [self.group_seconds(group) for group in groups]
        return max(seconds), math.fsum(group.degree * each for group, each in zip(groups, seconds, strict=True))

    def _parted(self, groups: Round) -> tuple[Round, Round]:
        """Two rounds out of one: its groups are shared out, or its one group's sequences."""
        if len(groups) == 1:
            (group,) = groups
            in_order = sorted(group.sequences, key=lambda sequence: -self._tokens[sequence])
            return (Group(group.degree, tuple(in_order[::2])),), (Group(group.degree, tuple(in_order[1::2])),)
        halves: tuple[list[Group], list[Group]] = ([], [])
        ranks = [0, 0]
        for group in sorted(groups, key=lambda group: -group.degree):
            half = 0 if ranks[0] <= ranks[1] else 1
            halves[half].append(group)
            ranks[half] += group.degree
        return tuple(halves[0]), tuple(halves[1])

    def _merged(self, groups: Round) -> Round:
        """One pack on the whole domain, if that is a group."""
        if self._domain_size not in self._degrees:
            return ()
        return (Group(self._domain_size, tuple(sequence for group in groups for sequence in group.sequences)),)

    def _widened(self, groups: Round, free: int) -> Iterable[Round]:
        """Each group on the next wider degree that the free ranks allow."""
        for index, group in enumerate(groups):
            wider = next((degree for degree in self._degrees if degree > group.degree), None)
            if wider is not None and wider - group.degree <= free:
                yield (*groups[:index], Group(wider, group.sequences), *groups[index + 1 :])

    def _split(self, groups: Round, free: int) -> Iterable[Round]:
        """The longest or the shortest sequence of each pack of several in a group of its own."""
        for index, group in enumerate(groups):
            if len(group.sequences) == 1:
                continue
            for sequence in {pick(group.sequences, key=self._tokens.__getitem__) for pick in (min, max)}:
                degree = next((each for each in self._degrees if self._tokens[sequence] <= each * self._capacity), None)
                if degree is None or degree > free:
                    continue
                rest = tuple(other for other in group.sequences if other != sequence)
                yield (
                    *groups[:index],
                    Group(group.degree, rest),
                    Group(degree, (sequence,)),
                    *groups[index + 1 :],
                )
