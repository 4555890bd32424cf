"""The laws of plans, one function each, and the arithmetic of slices and rounds that they rest on.

Each check takes a plan and raises ``PlanError`` naming the law that is broken and where.
"""

from typing import TYPE_CHECKING

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.blocks import is_aligned_block, legal_degrees
from megatron_flexsp.planner.endings import ranks_that_end_early

if TYPE_CHECKING:
    from megatron_flexsp.planner.plans import MicroBatch, Plan

SCHEDULES = ("nested", "lockstep", "static")


class PlanError(FlexSPError):
    """A plan that breaks one of its laws, or text that is no plan."""


def check_blocks(plan: "Plan") -> None:
    """Every micro-batch stands on an aligned block of the domain; a filler on a single rank."""
    for index, item in enumerate(plan.micro_batches):
        if not is_aligned_block(item.first_rank, item.degree, plan.domain_size):
            raise PlanError(
                f"micro-batch {index} on {item.degree} ranks from rank {item.first_rank} is no aligned block "
                f"of a domain of {plan.domain_size} (degrees {legal_degrees(plan.domain_size)})"
            )
        if item.is_filler and item.degree != 1:
            raise PlanError(f"micro-batch {index} is a filler of degree {item.degree}; fillers have degree 1")


def check_every_sequence_once(plan: "Plan", num_sequences: int) -> None:
    """Every sequence of the global batch stands in exactly one micro-batch."""
    seen: set[int] = set()
    for index, item in enumerate(plan.micro_batches):
        for position in item.sequences:
            if not 0 <= position < num_sequences:
                raise PlanError(f"micro-batch {index} holds sequence {position}; the global batch has {num_sequences}")
            if position in seen:
                raise PlanError(f"sequence {position} stands in more than one place (again in micro-batch {index})")
            seen.add(position)
    if len(seen) < num_sequences:
        missing = next(position for position in range(num_sequences) if position not in seen)
        raise PlanError(f"sequence {missing} stands in no micro-batch")


def check_capacity(
    plan: "Plan", lengths: list[int], token_capacity: int, slice_multiple: int, recomputed_token_capacity: int | None
) -> None:
    """No rank's slice, padding counted, holds more tokens than its capacity; what fits is not recomputed, or all is.

    In lockstep whole rounds are recomputed, with whatever they hold (``check_schedule``).
    """
    is_whole = plan.schedule == "lockstep" or all(item.recomputed or item.is_filler for item in plan.micro_batches)
    for index, item in enumerate(plan.micro_batches):
        capacity = token_capacity
        if item.recomputed:
            if recomputed_token_capacity is None:
                raise PlanError(f"micro-batch {index} is recomputed; nothing may be")
            capacity = recomputed_token_capacity
            if plan.schedule != "lockstep" and item.is_filler:
                raise PlanError(f"micro-batch {index} is a filler and recomputed; fillers are not")
            if not is_whole:
                _check_needs_recomputing(index, item, lengths, token_capacity, slice_multiple)
        total_tokens = sum(lengths[position] for position in item.sequences)
        tokens_per_rank = slice_tokens(total_tokens, item.degree, slice_multiple)
        if tokens_per_rank > capacity:
            raise PlanError(
                f"micro-batch {index} gives each of its {item.degree} ranks {tokens_per_rank} tokens, "
                f"padding counted; the capacity is {capacity}{', recomputed' if item.recomputed else ''}"
            )


def _check_needs_recomputing(
    index: int, item: "MicroBatch", lengths: list[int], token_capacity: int, slice_multiple: int
) -> None:
    """All sequences of a recomputed micro-batch must need it."""
    for position in item.sequences:
        if slice_tokens(lengths[position], item.degree, slice_multiple) <= token_capacity:
            raise PlanError(
                f"micro-batch {index} is recomputed and holds sequence {position} of {lengths[position]} tokens, which "
                f"{item.degree} ranks can hold without, and others are not recomputed"
            )


def check_schedule(plan: "Plan") -> None:
    """The rule of the plan's own schedule."""
    if plan.schedule == "nested":
        _check_nested(plan)
    elif plan.schedule == "static":
        _check_static(plan)
    elif plan.schedule == "lockstep":
        _check_rounds(plan)
    else:
        raise PlanError(f"schedule is {plan.schedule!r}; expected one of {', '.join(SCHEDULES)}")


def _check_nested(plan: "Plan") -> None:
    """Degrees never increase along the list."""
    for index in range(1, len(plan.micro_batches)):
        before, after = plan.micro_batches[index - 1].degree, plan.micro_batches[index].degree
        if after > before:
            raise PlanError(
                f"micro-batch {index} of a nested plan has degree {after} after {before}; degrees never increase"
            )


def _check_rounds(plan: "Plan") -> None:
    """The list falls into rounds, each of which is recomputed as a whole or not at all."""
    for number, members in enumerate(rounds(plan)):
        if len({item.recomputed for item in members}) > 1:
            raise PlanError(f"lockstep round {number} is recomputed in part; its ranks must make the same calls")


def _check_static(plan: "Plan") -> None:
    """All micro-batches that hold sequences have one degree."""
    degrees = sorted({item.degree for item in plan.micro_batches if not item.is_filler})
    if len(degrees) > 1:
        raise PlanError(f"a static plan has the degrees {degrees}; it has one degree")


def check_counts(plan: "Plan", count_multiple: int) -> None:
    """Every rank runs at least one micro-batch, and a multiple of ``count_multiple``."""
    counts = [0] * plan.domain_size
    for item in plan.micro_batches:
        for rank in item.ranks:
            counts[rank] += 1
    for rank, count in enumerate(counts):
        if count == 0:
            raise PlanError(f"rank {rank} runs no micro-batch; every rank runs at least one")
        if count % count_multiple:
            raise PlanError(f"rank {rank} runs {count} micro-batches; expected a multiple of {count_multiple}")


def check_endings(plan: "Plan", count_multiple: int) -> None:
    """No rank ends with a micro-batch that it shares with a rank that runs more (``endings``)."""
    early = ranks_that_end_early(plan.micro_batches, plan.domain_size, count_multiple)
    if early.size:
        raise PlanError(
            f"rank {early[0]} ends with a micro-batch that it shares with a rank that runs more: it would reduce "
            f"gradients while they exchange. It needs {count_multiple} filler(s) at its end"
        )


def slice_tokens(total_tokens: int, degree: int, slice_multiple: int) -> int:
    """Tokens of each rank's slice of a pack, padding counted.

    >>> slice_tokens(total_tokens=21, degree=4, slice_multiple=2)
    6
    """
    return -(-total_tokens // (degree * slice_multiple)) * slice_multiple


def rounds(plan: "Plan") -> list[tuple["MicroBatch", ...]]:
    """The rounds of a lockstep plan: consecutive micro-batches that hold every rank exactly once.

    Raises
    ------
    PlanError
        If the list does not fall into such rounds.
    """
    finished: list[tuple[MicroBatch, ...]] = []
    current: list[MicroBatch] = []
    busy: set[int] = set()
    for index, item in enumerate(plan.micro_batches):
        if not busy.isdisjoint(item.ranks):
            raise PlanError(f"micro-batch {index} meets ranks that are already busy in lockstep round {len(finished)}")
        current.append(item)
        busy.update(item.ranks)
        if len(busy) == plan.domain_size:
            finished.append(tuple(current))
            current, busy = [], set()
    if current:
        raise PlanError(f"lockstep round {len(finished)} leaves {plan.domain_size - len(busy)} ranks without work")
    return finished
