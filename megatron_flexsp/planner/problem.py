"""One planning problem: checked arguments in, sorted lengths and tables of seconds out.

Every solver of this package takes a ``Problem`` and need not look at a flag or a cost model again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.blocks import is_legal_degree, legal_degrees
from megatron_flexsp.planner.capacity import usable_capacity
from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.laws import slice_tokens

GAP_WORTH_ANOTHER_SEARCH = 0.05
"""A plan that lies further above its bound, as a share of the bound, is worth searching again by other means."""


@dataclass(frozen=True)
class Problem:
    """A global batch to plan. Sequences are numbered by length, shortest first."""

    positions: NDArray[np.int64]
    """Position in the global batch of each sequence, shape (sequences,)."""

    tokens: list[int]
    """Tokens of each sequence, never decreasing."""

    domain_size: int
    """Ranks in the domain."""

    degrees: tuple[int, ...]
    """Degrees that may be used, narrowest first."""

    tokens_per_rank: int
    """What a slice may hold: the token capacity, or the batch if it is less, as a multiple of the slice multiple."""

    recomputed_tokens_per_rank: int | None
    """The same where activations are recomputed; None: nowhere."""

    count_multiple: int
    """Every rank runs a multiple of so many micro-batches."""

    pipeline_stages: float
    """Stages of the pipeline that every micro-batch passes, those beside the slowest by what they add to a step."""

    overhead_seconds: float
    """What every micro-batch costs."""

    latency_seconds: dict[int, float]
    """What a micro-batch of each degree costs beside its overhead."""

    recomputing_seconds: dict[int, float]
    """What it costs on top of both where it recomputes."""

    sequence_seconds: dict[int, list[float]]
    """What each sequence adds to a group of each degree, recomputed where it fits no other pack of that degree; never
    decreasing, like the tokens."""

    recomputed_seconds: dict[int, list[float]]
    """The same where every sequence is recomputed; empty where none may be."""

    @cached_property
    def kept(self) -> "Problem":
        """The problem if nothing may be recomputed."""
        return self if self.recomputed_tokens_per_rank is None else replace(self, recomputed_tokens_per_rank=None)

    @cached_property
    def recomputing(self) -> "Problem | None":
        """The problem if every micro-batch is recomputed; None where none may be."""
        if self.recomputed_tokens_per_rank is None:
            return None
        return replace(
            self,
            tokens_per_rank=self.recomputed_tokens_per_rank,
            recomputed_tokens_per_rank=None,
            latency_seconds={
                degree: seconds + self.recomputing_seconds[degree] for degree, seconds in self.latency_seconds.items()
            },
            sequence_seconds=self.recomputed_seconds,
        )

    @cached_property
    def kinds(self) -> tuple["Problem", ...]:
        """The problem of rounds that are kept and, where rounds may be recomputed, of those that are."""
        return (self.kept,) if self.recomputing is None else (self.kept, self.recomputing)

    def of(self, recomputed: bool) -> "Problem":
        """The problem of rounds that are recomputed, or of those that are not."""
        return self.kinds[recomputed]

    @cached_property
    def tokens_array(self) -> NDArray[np.int64]:
        """``tokens`` as an array."""
        return np.array(self.tokens, dtype=np.int64)

    @cached_property
    def seconds_arrays(self) -> dict[int, NDArray[np.float64]]:
        """``sequence_seconds`` as arrays."""
        return {degree: np.array(row) for degree, row in self.sequence_seconds.items()}

    def pack_tokens(self, degree: int, *, recomputed: bool = False) -> int:
        """Tokens that a pack of this degree can hold."""
        return degree * (self.recomputed_tokens_per_rank or 0 if recomputed else self.tokens_per_rank)

    def holds(self, degree: int, sequence: int) -> bool:
        """Whether a pack of this degree can hold a sequence, recomputed or not."""
        return self.tokens[sequence] <= degree * (self.recomputed_tokens_per_rank or self.tokens_per_rank)

    def is_recomputed(self, degree: int, sequence: int) -> bool:
        """Whether a pack of this degree is recomputed if it holds this sequence."""
        return self.tokens[sequence] > self.pack_tokens(degree)

    def micro_batch_latency(self, degree: int, *, recomputed: bool = False) -> float:
        """What a micro-batch costs beside the common overhead, before it holds a sequence."""
        return self.latency_seconds[degree] + (self.recomputing_seconds[degree] if recomputed else 0.0)

    def opening_seconds(self, degree: int, count: int, *, recomputed: bool = False) -> float:
        """What a further micro-batch costs ranks that run ``count`` already, before it holds a sequence.

        The first of every ``count_multiple`` pays the overheads of them all: fillers will take the places
        that no further micro-batch takes.
        """
        overheads = self.count_multiple if count % self.count_multiple == 0 else 0
        return self.micro_batch_latency(degree, recomputed=recomputed) + overheads * self.overhead_seconds


def topping_up_pays(problem: Problem, degree: int) -> bool:
    """Whether a short token costs less in a wide micro-batch than in a further narrow one, overhead and all."""
    narrow = problem.degrees[0]
    dearer = degree * problem.sequence_seconds[degree][0] - narrow * problem.sequence_seconds[narrow][0]
    return dearer / problem.tokens[0] * problem.tokens_per_rank < problem.overhead_seconds


def degrees_that_pay(problem: Problem) -> tuple[int, ...]:
    """The degrees on which full packs of the batch take fewer rank-seconds than on any wider one."""
    tokens = problem.tokens_array

    def rank_seconds(degree: int, held: int) -> float:
        """Of all sequences that a narrower degree holds."""
        opening = problem.overhead_seconds + problem.latency_seconds[degree]
        work = degree * float(problem.seconds_arrays[degree][:held].sum())
        return work + opening * float(tokens[:held].sum()) / problem.tokens_per_rank

    paying = []
    for place, degree in enumerate(problem.degrees):
        held = int(np.searchsorted(tokens, problem.pack_tokens(degree), side="right"))
        own = rank_seconds(degree, held)
        if all(own < rank_seconds(wider, held) for wider in problem.degrees[place + 1 :]):
            paying.append(degree)
    return tuple(paying)


def make_problem(
    lengths: ArrayLike,
    cost_model: CostModel,
    domain_size: int,
    *,
    degrees: Iterable[int] | None = None,
    token_capacity: int | None = None,
    recomputed_token_capacity: int | None = None,
    slice_multiple: int = 1,
    count_multiple: int = 1,
    pipeline_stages: int = 1,
) -> Problem:
    """Check the arguments of ``plan`` and tabulate what solvers need.

    Raises
    ------
    FlexSPError
        For every argument that makes no sense, and where no allowed degree holds the longest sequence.
    """
    domain_size = _count("domain_size", domain_size)
    slice_multiple = _count("slice_multiple", slice_multiple)
    count_multiple = _count("count_multiple", count_multiple)
    pipeline_stages = _count("pipeline_stages", pipeline_stages)
    tokens = _checked_lengths(lengths)
    allowed = _checked_degrees(degrees, cost_model, domain_size)
    if token_capacity is None:
        token_capacity = cost_model.token_capacity
    capacity = _count("token_capacity", token_capacity)
    if capacity < slice_multiple:
        raise FlexSPError(
            f"a token capacity of {capacity} per rank is less than the {slice_multiple} tokens that "
            "every slice is padded to a multiple of",
            "raise `token_capacity`",
        )
    # No slice holds more than the whole batch, padded: greater capacities change nothing, and might overflow.
    most_tokens = slice_tokens(int(tokens.sum()), 1, slice_multiple)
    tokens_per_rank = min(usable_capacity(capacity, slice_multiple), most_tokens)
    recomputed_tokens_per_rank = None
    if recomputed_token_capacity is not None:
        recomputed = _count("recomputed_token_capacity", recomputed_token_capacity)
        if recomputed < capacity:
            raise FlexSPError(
                f"a rank can hold {recomputed} tokens where activations are recomputed and {capacity} where they are "
                "kept, so nothing is gained",
                "raise `recomputed_token_capacity`, or don't recompute",
            )
        recomputed_tokens_per_rank = min(usable_capacity(recomputed, slice_multiple), most_tokens)
    if recomputed_tokens_per_rank is None:
        _check_longest(tokens, allowed, tokens_per_rank, "token_capacity")
    else:
        _check_longest(tokens, allowed, recomputed_tokens_per_rank, "recomputed_token_capacity")
    positions = np.argsort(tokens, kind="stable")
    in_order = tokens[positions]
    with np.errstate(over="ignore"):
        seconds = {degree: cost_model.sequence_seconds(in_order, degree) for degree in allowed}
        recomputed_seconds = {}
        if recomputed_tokens_per_rank is not None:
            recomputed_seconds = {
                degree: cost_model.sequence_seconds(in_order, degree, recomputed=True) for degree in allowed
            }
        for degree, row in recomputed_seconds.items():
            seconds[degree] = np.where(in_order > degree * tokens_per_rank, row, seconds[degree])
    if not np.isfinite(sum(row.sum() for row in seconds.values())):
        raise FlexSPError("the cost model's constants give no finite time for this batch", "correct them")
    return Problem(
        positions=positions,
        tokens=in_order.tolist(),
        domain_size=domain_size,
        degrees=allowed,
        tokens_per_rank=tokens_per_rank,
        recomputed_tokens_per_rank=recomputed_tokens_per_rank,
        count_multiple=count_multiple,
        pipeline_stages=cost_model.stages_counted(pipeline_stages),
        overhead_seconds=float(cost_model.micro_batch_overhead_seconds),
        latency_seconds={degree: cost_model.latency_seconds(degree) for degree in allowed},
        recomputing_seconds={degree: cost_model.recomputing_seconds(degree) for degree in allowed},
        sequence_seconds={degree: row.tolist() for degree, row in seconds.items()},
        recomputed_seconds={degree: row.tolist() for degree, row in recomputed_seconds.items()},
    )


def _count(name: str, value: int) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise FlexSPError(f"{name} is {value!r}; expected a whole number of at least 1")
    return int(value)


def _checked_lengths(lengths: ArrayLike) -> NDArray[np.int64]:
    """The lengths as one row of whole numbers of at least 1."""
    tokens = np.asarray(lengths)
    if tokens.ndim != 1 or tokens.size == 0:
        raise FlexSPError(f"lengths has the shape {tokens.shape}; expected one row of at least one sequence")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise FlexSPError(f"lengths holds {tokens.dtype} values; expected whole numbers of tokens")
    if tokens.min() < 1:
        position = int(tokens.argmin())
        raise FlexSPError(f"sequence {position} has {tokens[position]} tokens", "leave empty sequences out")
    return tokens.astype(np.int64)


def _checked_degrees(degrees: Iterable[int] | None, cost_model: CostModel, domain_size: int) -> tuple[int, ...]:
    """The degrees that may be used: those asked for, or all legal ones that the cost model prices."""
    if degrees is None:
        priced = {1, *cost_model.exchange_bandwidth_bytes_per_second}
        return tuple(degree for degree in legal_degrees(domain_size) if degree in priced)
    if not isinstance(degrees, Iterable):
        raise FlexSPError(f"degrees is {degrees!r}; expected several whole numbers", f"pass `[{degrees!r}]`")
    asked = tuple(sorted({_count("a degree", degree) for degree in degrees}))
    if not asked:
        raise FlexSPError("degrees is empty", "name at least one, or leave it out to allow all of them")
    for degree in asked:
        if not is_legal_degree(degree, domain_size):
            raise FlexSPError(
                f"degree {degree} does not exist in a domain of {domain_size} ranks; "
                f"it has {', '.join(map(str, legal_degrees(domain_size)))}"
            )
        cost_model.sequence_seconds(1, degree)  # refuses a degree without a bandwidth
    return asked


def _check_longest(tokens: NDArray[np.int64], degrees: tuple[int, ...], tokens_per_rank: int, capacity: str) -> None:
    """Refuse a batch whose longest sequence fits no allowed group; ``capacity`` is the parameter that limits it."""
    position, widest = int(tokens.argmax()), degrees[-1]
    if tokens[position] > widest * tokens_per_rank:
        raise FlexSPError(
            f"sequence {position} has {tokens[position]} tokens, but the widest allowed group holds "
            f"{widest * tokens_per_rank} ({widest} ranks x {tokens_per_rank} tokens)",
            "allow a wider degree (`degrees`; the cost model must have its bandwidth), use more ranks, shorten what is "
            f"longer (`lengths`), or raise `{capacity}` if memory allows",
        )
