"""The paper's planner for one lockstep round, as a mixed-integer program, with its blaster and its buckets.

FlexSP (arXiv 2412.01523), section 4: cut the sorted batch into rounds of equal tokens (blaster), replace
lengths by a few ceilings (bucketing), then choose groups and what each runs so that the slowest ends as
early as can be. What differs here: groups of a degree are interchangeable, so they are counted and not told
apart; HiGHS is told what to beat; and real sequences are dealt out against real lengths.
"""

import time
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.planner.linear_program import LinearProgram
from megatron_flexsp.planner.problem import Problem
from megatron_flexsp.planner.rounds import Group, Round, round_seconds

BUCKETS = 16
_NODES = 50
_GAINS = (0.01, 0.003)


def blast(tokens: list[int], chunks: int) -> list[range]:
    """Cut a row of sequences into consecutive chunks so that the chunk with the most tokens has the fewest.

    The paper does it by dynamic programming (section 4.2). Filling chunks greedily up to a limit needs the
    fewest chunks for that limit, so bisecting the limit finds the same optimum.

    Parameters
    ----------
    tokens
        Tokens of each sequence, in order.
    chunks
        The number of chunks.

    Returns
    -------
    The chunks, as ranges of indices; fewer where there are fewer sequences.
    """
    sums = np.concatenate([[0], np.cumsum(tokens)])

    def cut(limit: int) -> list[range] | None:
        found: list[range] = []
        start = 0
        while start < len(tokens):
            if len(found) == chunks:
                return None
            end = int(np.searchsorted(sums, sums[start] + limit, side="right")) - 1
            found.append(range(start, end))
            start = end
        return found

    low, high = max(tokens) - 1, int(sums[-1])
    while high - low > 1:
        middle = (low + high) // 2
        if cut(middle) is None:
            low = middle
        else:
            high = middle
    found = cut(high)
    assert found is not None, "one chunk holds everything"
    return found


def bucket_ceilings(tokens: list[int], most: int = BUCKETS) -> list[int]:
    """At most ``most`` ceilings so that replacing each length by its ceiling adds the fewest tokens.

    By dynamic programming over the distinct lengths (the paper, section 4.2). Beyond 512 distinct lengths,
    only evenly spread ones may be ceilings.
    """
    lengths, counts = np.unique(np.asarray(tokens, dtype=np.int64), return_counts=True)
    if len(lengths) > 512:
        ends = np.unique(np.linspace(0, len(lengths) - 1, 512).round().astype(int))
        starts = np.concatenate([[0], ends[:-1] + 1])
        counts, lengths = np.add.reduceat(counts, starts), lengths[ends]
    size = len(lengths)
    if size <= most:
        return [int(length) for length in lengths]
    below = np.concatenate([[0], np.cumsum(counts)])
    # padded[i, j]: tokens that lengths i..j come to under the ceiling j.
    padded = (below[1:][None, :] - below[:-1][:, None]) * lengths[None, :]
    padded = np.where(np.triu(np.ones((size, size), dtype=bool)), padded, np.iinfo(np.int64).max // 4)
    best = padded[0]
    choices: list[NDArray[np.int64]] = []
    for _ in range(most - 1):
        # The last bucket starts at i; those before it end at i - 1.
        totals = np.concatenate([[np.iinfo(np.int64).max // 4], best[:-1]])[:, None] + padded
        choice = totals.argmin(axis=0)
        choices.append(choice)
        best = totals[choice, np.arange(size)]
    ceilings, end = [], size - 1
    for choice in reversed(choices):
        ceilings.append(int(lengths[end]))
        end = int(choice[end]) - 1
    ceilings.append(int(lengths[end]))
    return sorted(ceilings)


def plan_round(
    problem: Problem, sequences: list[int], known: Round, time_limit_seconds: float, seed: int = 0
) -> Round | None:
    """A better round for these sequences than the known one, or None where none is found.

    The paper's program (section 4.1) has a row and a column for every group. Groups of a degree are
    interchangeable, so here they are counted instead: whole numbers g[d] of groups and x[b, d] of sequences
    of bucket b on them, which leaves no symmetry at all. The known round enters as the time to beat: for a
    target a little below it, the program asks for the groups that need the fewest ranks,

        minimise sum_d d g[d]   such that   sum_d x[b, d] = size of b   for every bucket b,
        sum_b x[b, d] seconds[b, d] <= g[d] (target - overhead - latency[d])   for every degree d,
        sum_b x[b, d] tokens[b] <= g[d] d capacity   for every degree d,   sum_d d g[d] <= ranks.

    Real sequences are then dealt out to the groups of their degree, longest first, each to the one that ends
    earliest and has room.

    Parameters
    ----------
    problem
        The global batch.
    sequences
        The sequences of the round, shortest first, as numbers in the problem.
    known
        A legal round that holds them.
    time_limit_seconds
        When HiGHS gives up.
    seed
        HiGHS breaks ties by it.
    """
    best, best_seconds = None, round_seconds(problem, known)
    buckets = _buckets(problem, sequences)
    started = time.monotonic()
    for gain in _GAINS:
        target = (1 - gain) * best_seconds
        left = time_limit_seconds - (time.monotonic() - started)
        counts = _choose_groups(problem, buckets, target, left, seed) if left > 0 else None
        groups = None if counts is None else _deal(problem, buckets, counts)
        if groups is not None and round_seconds(problem, groups) < best_seconds:
            best, best_seconds = groups, round_seconds(problem, groups)
    return best


@dataclass(frozen=True)
class _Counts:
    """How many groups of each degree, and how many sequences of each bucket on them."""

    groups: dict[int, int]
    amounts: dict[tuple[int, int], int]


def _buckets(problem: Problem, sequences: list[int]) -> list[list[int]]:
    """The sequences by the ceiling that they fall under, shortest first."""
    tokens = [problem.tokens[index] for index in sequences]
    ceilings = bucket_ceilings(tokens)
    buckets: list[list[int]] = [[] for _ in ceilings]
    for index, length in zip(sequences, tokens, strict=True):
        buckets[bisect_left(ceilings, length)].append(index)
    return [bucket for bucket in buckets if bucket]


def _choose_groups(
    problem: Problem, buckets: list[list[int]], target: float, time_limit_seconds: float, seed: int
) -> _Counts | None:
    """The groups that need the fewest ranks for the target, a bucket counting as its mean; None if too many."""
    if not any(_budget_seconds(problem, degree, target) > 0 for degree in problem.degrees):
        return None
    program = LinearProgram()
    tokens = [float(problem.tokens_array[bucket].mean()) for bucket in buckets]
    placed = [program.add_row(len(bucket), len(bucket)) for bucket in buckets]
    ranks = program.add_row(upper=problem.domain_size)
    groups, amounts = {}, {}
    for degree in problem.degrees:
        budget_seconds = _budget_seconds(problem, degree, target)
        pack_tokens = problem.pack_tokens(degree)
        if budget_seconds <= 0:
            continue
        seconds = problem.seconds_arrays[degree]
        ends, holds = program.add_row(upper=0.0), program.add_row(upper=0.0)
        entries = [(ranks, float(degree)), (ends, -budget_seconds), (holds, -float(pack_tokens))]
        most = problem.domain_size // degree
        groups[degree] = int(program.add_columns(float(degree), entries, upper=most, is_integer=True)[0])
        for number, bucket in enumerate(buckets):
            if problem.tokens[bucket[-1]] <= pack_tokens and seconds[bucket[-1]] <= budget_seconds:
                entries = [(placed[number], 1.0), (ends, float(seconds[bucket].mean())), (holds, tokens[number])]
                column = program.add_columns(0.0, entries, upper=len(bucket), is_integer=True)
                amounts[number, degree] = int(column[0])
    found = program.solve(time_limit_seconds=time_limit_seconds, most_nodes=_NODES, first_will_do=True, seed=seed)
    if found is None:
        return None
    return _Counts(
        {degree: round(found.columns[column]) for degree, column in groups.items()},
        {key: round(found.columns[column]) for key, column in amounts.items()},
    )


def _budget_seconds(problem: Problem, degree: int, target: float) -> float:
    """Seconds that a group of the degree has for work."""
    return target - problem.overhead_seconds - problem.latency_seconds[degree]


def _deal(problem: Problem, buckets: list[list[int]], counts: _Counts) -> Round | None:
    """Give out real sequences, longest first, each to the group of its degree that ends earliest and has room.

    Within a bucket the longest go to the widest degrees.
    """
    members: dict[int, list[list[int]]] = {
        degree: [[] for _ in range(count)] for degree, count in counts.groups.items() if count
    }
    ends = {degree: [0.0] * len(groups) for degree, groups in members.items()}
    left = {degree: [problem.pack_tokens(degree)] * len(groups) for degree, groups in members.items()}
    for number in range(len(buckets) - 1, -1, -1):
        waiting = list(buckets[number])
        for degree in reversed(problem.degrees):
            for _ in range(counts.amounts.get((number, degree), 0)):
                sequence = waiting.pop()
                tokens = problem.tokens[sequence]
                able = [group for group, room in enumerate(left.get(degree, ())) if room >= tokens]
                if not able:
                    return None
                group = min(able, key=ends[degree].__getitem__)
                members[degree][group].append(sequence)
                ends[degree][group] += problem.sequence_seconds[degree][sequence]
                left[degree][group] -= tokens
    return tuple(Group(degree, tuple(held)) for degree, groups in members.items() for held in groups if held)
