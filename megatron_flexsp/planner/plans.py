"""The plan of one global batch: what it is, its JSON, and the laws that every plan keeps.

Plans come from the planner (or from JSON) and go to the executor, which runs them as they stand.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_flexsp.planner import laws
from megatron_flexsp.planner.laws import SCHEDULES, PlanError

SCHEMA = "flexsp.plan/1"
STATUSES = ("optimal", "feasible", "heuristic")


@dataclass(frozen=True)
class MicroBatch:
    """One pack on one aligned block of ranks: one forward and one backward.

    Without sequences it is a filler: one rank runs a slice of padding with zero loss. Fillers give ranks
    without work something to run, and bring a rank's count to a multiple that its pipeline needs.
    """

    first_rank: int
    """The block's first rank in the domain."""

    degree: int
    """Ranks in the block."""

    sequences: tuple[int, ...]
    """Positions in the global batch."""

    recomputed: bool = False
    """Whether activations are recomputed in the backward pass, so that a rank can hold more tokens. Either only
    sequences that fit no other micro-batch of the degree are in such a one, or all are; in lockstep, whole rounds are
    recomputed."""

    @property
    def is_filler(self) -> bool:
        """Whether it holds no sequence."""
        return not self.sequences

    @property
    def ranks(self) -> range:
        """The ranks of the domain that run it."""
        return range(self.first_rank, self.first_rank + self.degree)


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one global batch in execution order.

    A rank runs, in list order, every micro-batch whose block contains it.
    """

    domain_size: int
    """Ranks in the domain."""

    schedule: str
    """``nested``, ``lockstep`` or ``static``."""

    micro_batches: tuple[MicroBatch, ...]
    """In execution order."""

    predicted_seconds: float
    """The step's time under the cost model that it was planned with."""

    lower_bound_seconds: float
    """No plan of this schedule can take less, under the same cost model."""

    solve_seconds: float
    """What planning took."""

    status: str
    """``optimal`` if no plan is faster: the prediction meets the bound. ``feasible`` if the search ended by itself
    short of the bound: the gap between the two is what a better plan could gain at most. ``heuristic`` if the
    time limit ended it."""

    def micro_batches_of_rank(self, rank: int) -> tuple[MicroBatch, ...]:
        """What one rank of the domain runs, in order."""
        return tuple(item for item in self.micro_batches if rank in item.ranks)

    def counted_by_degree(self, *, recomputed: bool = False) -> str:
        """How many micro-batches have each degree, widest first, without fillers: ``2 x 8, 5 x 1``.

        Of all of them, or of those that are recomputed.
        """
        chosen = (item for item in self.micro_batches if not item.is_filler and (item.recomputed or not recomputed))
        counts = Counter(item.degree for item in chosen)
        return ", ".join(f"{count} x {degree}" for degree, count in sorted(counts.items(), reverse=True))

    def to_json(self) -> str:
        """The plan as one line of JSON that ``from_json`` reads back to an equal one."""
        data = {"schema": SCHEMA, **asdict(self)}
        for item in data["micro_batches"]:
            if not item["recomputed"]:
                del item["recomputed"]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan") -> "Plan":
        """Read a plan from JSON text; ``source`` is what errors call it. ``validate`` checks its laws.

        Raises
        ------
        PlanError
            If the text is no JSON or does not have the shape of a plan; names the key.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(f"{source}: not JSON ({error}); expected a {SCHEMA} object") from None
        try:
            return _plan_from(data)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from None

    def digest(self) -> str:
        """A hex digest of what is executed; predictions and solve times do not change it."""
        executed = [
            self.domain_size,
            self.schedule,
            [
                [item.first_rank, item.degree, *(["recomputed"] if item.recomputed else []), *item.sequences]
                for item in self.micro_batches
            ],
        ]
        return hashlib.sha256(json.dumps(executed).encode()).hexdigest()

    def validate(
        self,
        lengths: ArrayLike,
        token_capacity: int,
        *,
        recomputed_token_capacity: int | None = None,
        slice_multiple: int = 1,
        count_multiple: int = 1,
    ) -> None:
        """Check every law of plans.

        Parameters
        ----------
        lengths
            Tokens of each sequence of the global batch, shape (sequences,).
        token_capacity
            Tokens that one rank can hold in one micro-batch, padding counted.
        recomputed_token_capacity
            The same where activations are recomputed; None: nowhere.
        slice_multiple
            Each rank's slice is padded up to a multiple of so many tokens (the tensor-parallel size).
        count_multiple
            Each rank runs a multiple of so many micro-batches (interleaved pipelines).

        Raises
        ------
        PlanError
            Names the law that is broken and where.
        """
        tokens = np.asarray(lengths, dtype=np.int64).tolist()
        laws.check_blocks(self)
        laws.check_every_sequence_once(self, len(tokens))
        laws.check_capacity(self, tokens, token_capacity, slice_multiple, recomputed_token_capacity)
        laws.check_schedule(self)
        laws.check_counts(self, count_multiple)
        laws.check_endings(self, count_multiple)


def _plan_from(data: object) -> Plan:
    """A plan from parsed JSON; checks its shape, not its laws."""
    if not isinstance(data, dict):
        raise PlanError(f"found a JSON {type(data).__name__}; expected a {SCHEMA} object")
    if data.get("schema") != SCHEMA:
        raise PlanError(f'schema is {data.get("schema")!r}; expected "{SCHEMA}"')
    items = _value(data, "micro_batches", list, "micro_batches")
    plan = Plan(
        domain_size=_value(data, "domain_size", int, "domain_size"),
        schedule=_value(data, "schedule", str, "schedule"),
        micro_batches=tuple(_micro_batch_from(index, item) for index, item in enumerate(items)),
        predicted_seconds=float(_value(data, "predicted_seconds", (int, float), "predicted_seconds")),
        lower_bound_seconds=float(_value(data, "lower_bound_seconds", (int, float), "lower_bound_seconds")),
        solve_seconds=float(_value(data, "solve_seconds", (int, float), "solve_seconds")),
        status=_value(data, "status", str, "status"),
    )
    _one_of("schedule", plan.schedule, SCHEDULES)
    _one_of("status", plan.status, STATUSES)
    if plan.domain_size < 1:
        raise PlanError(f"domain_size is {plan.domain_size}; expected at least 1")
    return plan


def _micro_batch_from(index: int, item: object) -> MicroBatch:
    """A micro-batch from parsed JSON."""
    where = f"micro_batches[{index}]"
    if not isinstance(item, dict):
        raise PlanError(f"{where} is {item!r}; expected an object")
    sequences = _value(item, "sequences", list, f"{where}.sequences")
    for position in sequences:
        if isinstance(position, bool) or not isinstance(position, int):
            raise PlanError(f"{where}.sequences holds {position!r}; expected whole numbers")
    return MicroBatch(
        first_rank=_value(item, "first_rank", int, f"{where}.first_rank"),
        degree=_value(item, "degree", int, f"{where}.degree"),
        sequences=tuple(sequences),
        recomputed=_value({"recomputed": False} | item, "recomputed", bool, f"{where}.recomputed"),
    )


def _value(data: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """One key's value, refused if it is missing or of another kind."""
    if key not in data:
        raise PlanError(f"{where} is missing")
    value = data[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PlanError(f"{where} is {value!r}, which has the wrong type")
    return value


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise PlanError(f"{key} is {value!r}; expected one of {', '.join(allowed)}")
