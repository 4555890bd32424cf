"""What to run in order to learn a cost model: steps in which every rank is busy with packs of one kind.

A degree's blocks all run at the same time, as they do in training, so that what ranks share (cores, links,
switches) is shared. A point's step takes a known multiple of one micro-batch's seconds, plus what every step costs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner import MicroBatch, Plan, first_ranks


@dataclass(frozen=True)
class _Kind:
    """A step of each degree."""

    share: float
    """How full a rank's memory is."""

    is_like_data: bool
    """Whether the pack is like the data, or as few sequences as can be."""

    rounds: int
    fills_pipeline: bool = True
    """Whether it runs so many times as many micro-batches as the pipeline has stages; if not, as few as can be."""

    narrowest_alone: bool = False
    """Whether it says nothing of wider groups that the others don't."""

    recomputed: bool = False


_RECOMPUTED = _Kind(1.0, False, 1, recomputed=True)
"""Of the narrowest and the widest degree. It differs from the first of the others in this alone."""

_KINDS = (
    _Kind(1.0, False, 1),
    _Kind(1.0, True, 1, narrowest_alone=True),
    _Kind(0.5, False, 1, fills_pipeline=False),
    _Kind(0.5, True, 2),
    _Kind(0.25, True, 1, fills_pipeline=False, narrowest_alone=True),
    _Kind(0.125, True, 4),
)
"""Numbers of micro-batches tell what a step costs, and a pipeline's fill and drain, from what a micro-batch costs; two
kinds of packs what squared lengths cost from what tokens cost; and sizes what every micro-batch costs."""


@dataclass(frozen=True)
class Point:
    """Equal packs on all blocks of a degree, so many times one after the other."""

    degree: int
    lengths: tuple[int, ...]
    """Tokens of each sequence of one pack."""

    rounds: int
    """Micro-batches that each rank runs."""

    recomputed: bool = False
    """Whether they recompute their activations."""

    @property
    def tokens(self) -> int:
        """Tokens of one pack."""
        return sum(self.lengths)

    @property
    def tokens_squared(self) -> int:
        """Sum of the squared lengths of one pack."""
        return sum(length**2 for length in self.lengths)


def choose_points(
    degrees: Sequence[int],
    tokens_per_rank: int,
    lengths: NDArray[np.int64],
    longest: int,
    count_multiple: int = 1,
    pipeline_stages: int = 1,
    recomputes: bool = False,
) -> list[Point]:
    """Points that tell the cost model's constants apart, in the range that the job's plans will use.

    Parameters
    ----------
    degrees
        The group sizes to measure.
    tokens_per_rank
        Tokens that a rank can hold in one micro-batch.
    lengths
        A sample of the job's own lengths: packs of short sequences are made of its quantiles.
    longest
        Tokens of the longest sequence that can come.
    count_multiple
        What a rank's micro-batch count must divide by.
    pipeline_stages
        Stages that every micro-batch passes: most steps keep all of them busy, as a job's own do.
    recomputes
        Whether the job's plans may recompute micro-batches.
    """
    filling = -(-pipeline_stages // count_multiple) * count_multiple
    lengths = lengths[lengths <= longest]
    points = []
    for degree in degrees:
        for kind in (*_KINDS, _RECOMPUTED) if recomputes and degree in (degrees[0], degrees[-1]) else _KINDS:
            if kind.narrowest_alone and degree != degrees[0]:
                continue
            tokens = max(1, int(tokens_per_rank * kind.share)) * degree
            pack = _like_the_data(tokens, lengths, longest) if kind.is_like_data else _one_long(tokens, longest)
            rounds = kind.rounds * (filling if kind.fills_pipeline else count_multiple)
            points.append(Point(degree, pack, rounds, kind.recomputed))
    return points


def _one_long(tokens: int, longest: int) -> tuple[int, ...]:
    """A pack of as few sequences as can be."""
    whole, rest = divmod(tokens, longest)
    return (longest,) * whole + ((rest,) if rest else ())


def _like_the_data(tokens: int, lengths: NDArray[np.int64], longest: int) -> tuple[int, ...]:
    """A pack of the data's own lengths: its quantiles, as many of them as fill the pack."""
    fitting = np.sort(lengths[lengths <= tokens])
    if not fitting.size:
        return _one_long(tokens, longest)
    count = max(1, round(tokens / float(fitting.mean())))
    quantiles = (np.arange(count) + 0.5) / count
    chosen = np.quantile(fitting, quantiles, method="nearest")
    pack = chosen[np.cumsum(chosen) <= tokens].tolist()
    return (*pack, *_one_long(tokens - sum(pack), longest))


def plan_of(point: Point, domain_size: int, in_rounds: bool = False) -> tuple[Plan, NDArray[np.int64]]:
    """The plan that runs a point, and the lengths of its sequences.

    Where the degree's blocks don't cover the domain, the remaining ranks run half as much, so that they are busy
    and never late. Every rank runs as many micro-batches, so that the plan is a nested one and, ordered by rounds, a
    lockstep one; ``in_rounds`` asks for that.
    """
    starts = list(first_ranks(point.degree, domain_size))
    covered = {rank for start in starts for rank in range(start, start + point.degree)}
    lengths: list[int] = []
    items: list[MicroBatch] = []

    def add(first_rank: int, degree: int, pack: Iterable[int]) -> None:
        begin = len(lengths)
        lengths.extend(pack)
        items.append(MicroBatch(first_rank, degree, tuple(range(begin, len(lengths))), point.recomputed))

    for _ in range(point.rounds):
        for start in starts:
            add(start, point.degree, point.lengths)
        for rank in sorted(set(range(domain_size)) - covered):
            add(rank, 1, [max(1, point.tokens // (2 * point.degree))])
    if not in_rounds:
        items.sort(key=lambda item: -item.degree)
    schedule = "lockstep" if in_rounds else "nested"
    plan = Plan(domain_size, schedule, tuple(items), 0.0, 0.0, 0.0, "heuristic")
    return plan, np.array(lengths, dtype=np.int64)
