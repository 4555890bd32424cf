"""What a micro-batch costs: measured constants in, seconds and the tokens that a rank can hold out.

The formula is that of FlexSP (arXiv 2412.01523, section 4.1) with a latency per exchange added:

    micro-batch seconds = overhead + sum(attention * s^2 + linear * s) / degree
        + [degree > 1] (latency[degree] + exchange_bytes * sum(s) / (degree * bandwidth[degree]))

A micro-batch that recomputes its activations runs its forward, and that one's half of the exchanges, once more: the
first line counts 1 + recompute_share times, the second 1.5 times.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.errors import FlexSPError

SCHEMA = "flexsp.cost_model/1"

EXCHANGED_AGAIN = 0.5
"""Of its exchanges, the forward's half, what a recomputed micro-batch repeats."""

_CORRECT = "correct the cost model, or measure one with `flexsp profile`"


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """The constants of one model on one cluster.

    Raises
    ------
    FlexSPError
        If a constant is not a finite number, is negative, or a bandwidth is zero or has no sensible degree.
    """

    memory_budget_bytes: float
    """What a rank may use of its device's memory."""

    model_state_bytes: float
    """What parameters, gradients and optimizer state take of it."""

    activation_bytes_per_token: float
    """What one token of a rank's slice takes until its backward has run."""

    attention_seconds_per_token_squared: float
    """Seconds on one rank, forward and backward, for each squared token of a sequence."""

    linear_seconds_per_token: float
    """Seconds on one rank, forward and backward, for each token."""

    micro_batch_overhead_seconds: float
    """Seconds that every micro-batch costs, whatever it holds."""

    exchange_bytes_per_token: float
    """Bytes that a group exchanges for each token of its pack."""

    exchange_bandwidth_bytes_per_second: Mapping[int, float] = field(hash=False)
    """Bandwidth of one rank in a group, by degree. A degree that is missing here is not offered."""

    exchange_latency_seconds: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Seconds that a micro-batch's exchanges cost beside their bytes, by degree; missing means 0."""

    step_overhead_seconds: float = 0.0
    """Seconds that every step costs beside its micro-batches: reducing gradients, the optimizer. No plan changes
    it, so plans leave it out: a measured step compares with a plan's predicted seconds plus this."""

    pipeline_fill_share: float = 1.0
    """What each further pipeline stage adds to a step, as a share of the rank's longest micro-batch, 0 to 1: 1 where
    all stages are equally slow, less where the others are faster, or where stages are interleaved."""

    recomputed_activation_bytes_per_token: float = 0.0
    """The same as ``activation_bytes_per_token`` in a micro-batch whose activations are recomputed; 0: not known."""

    recompute_share: float = 1 / 3
    """What recomputing adds to compute and overhead of a micro-batch, as a share of them."""

    note: str = ""
    """Free text for people."""

    measurement: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Where the constants come from, as the profiler left it; the planner does not read it."""

    def __post_init__(self) -> None:
        for key in (*_NUMBER_KEYS, *_USUAL_NUMBERS):
            _check_number(key, getattr(self, key))
        if self.pipeline_fill_share > 1:
            raise FlexSPError(f"pipeline_fill_share is {self.pipeline_fill_share}; expected at most 1", "lower it")
        for key in _TABLE_KEYS:
            for degree, value in getattr(self, key).items():
                _check_number(f'{key}["{degree}"]', value)
        for degree, bandwidth in self.exchange_bandwidth_bytes_per_second.items():
            if bandwidth == 0:
                raise FlexSPError(
                    f'exchange_bandwidth_bytes_per_second["{degree}"] is 0; expected more',
                    "correct it, or leave the degree out so that it is not offered",
                )

    @classmethod
    def load(cls, path: str | Path) -> "CostModel":
        """Read a cost model from a JSON file.

        Raises
        ------
        FlexSPError
            If the file cannot be read or does not hold a cost model; names the file and the key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise FlexSPError(
                f"{path}: cannot read the cost model ({reason})", "measure one with `flexsp profile`"
            ) from None
        return cls.from_json(text, source=str(path))

    @classmethod
    def from_json(cls, text: str, *, source: str = "cost model") -> "CostModel":
        """Read a cost model from JSON text; ``source`` is what errors call it.

        Raises
        ------
        FlexSPError
            If the text is no JSON, has another schema, or a key is missing, unknown or not a sensible number.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FlexSPError(f"{source}: not JSON ({error}); expected a {SCHEMA} object", _CORRECT) from None
        try:
            return cls(**_fields_from(data))
        except FlexSPError as error:
            raise FlexSPError(f"{source}: {error.found}", error.remedy) from None

    def to_json(self) -> str:
        """The cost model as JSON text that ``from_json`` reads back to an equal one."""
        data: dict[str, Any] = {"schema": SCHEMA}
        if self.note:
            data["note"] = self.note
        data |= {key: getattr(self, key) for key in _NUMBER_KEYS}
        data |= {
            key: {str(degree): value for degree, value in sorted(getattr(self, key).items())} for key in _TABLE_KEYS
        }
        data |= {key: getattr(self, key) for key, usual in _USUAL_NUMBERS.items() if getattr(self, key) != usual}
        if self.measurement:
            data["measurement"] = dict(self.measurement)
        return json.dumps(data, indent=2) + "\n"

    @property
    def token_capacity(self) -> int:
        """Tokens that one rank can hold in one micro-batch.

        Raises
        ------
        FlexSPError
            If the memory constants leave no room for a single token, or activation bytes are 0.
        """
        return self._capacity("activation_bytes_per_token", "token_capacity")

    @property
    def recomputed_token_capacity(self) -> int:
        """Tokens that one rank can hold in one micro-batch whose activations are recomputed.

        Raises
        ------
        FlexSPError
            As ``token_capacity`` does.
        """
        return self._capacity("recomputed_activation_bytes_per_token", "recomputed_token_capacity")

    def scaled_recomputed_capacity(self, token_capacity: int) -> int | None:
        """Tokens that fit a rank's memory recomputed where ``token_capacity`` fit as they are; None if not known."""
        kept_bytes, recomputed_bytes = self.activation_bytes_per_token, self.recomputed_activation_bytes_per_token
        if kept_bytes == 0 or recomputed_bytes == 0:
            return None
        return int(token_capacity * (kept_bytes / recomputed_bytes))

    def _capacity(self, key: str, parameter: str) -> int:
        bytes_per_token = getattr(self, key)
        free_bytes = self.memory_budget_bytes - self.model_state_bytes
        way_out = f"correct the cost model, or give `{parameter}`"
        if bytes_per_token == 0:
            raise FlexSPError(f"{key} is 0, so the token capacity is unknown", way_out)
        tokens_per_rank = free_bytes / bytes_per_token
        if tokens_per_rank < 1:
            raise FlexSPError(
                f"memory_budget_bytes {self.memory_budget_bytes:.0f} less model_state_bytes "
                f"{self.model_state_bytes:.0f} holds no token of {bytes_per_token:.0f} activation bytes",
                way_out,
            )
        if math.isinf(tokens_per_rank):
            raise FlexSPError(f"{key} {bytes_per_token} is too small", way_out)
        return int(tokens_per_rank)

    def sequence_seconds(self, lengths: ArrayLike, degree: int, *, recomputed: bool = False) -> NDArray[np.float64]:
        """Seconds that each sequence adds to a micro-batch of a group of this degree.

        Parameters
        ----------
        lengths
            Tokens of each sequence, any shape.
        degree
            Ranks in the group.
        recomputed
            Whether the micro-batch recomputes its activations.

        Returns
        -------
        array of ``lengths``' shape
            Compute and exchanged bytes, without the micro-batch's overhead and latency.

        Raises
        ------
        FlexSPError
            If the cost model has no bandwidth for the degree.
        """
        tokens = np.asarray(lengths, dtype=np.float64)
        attention = self.attention_seconds_per_token_squared * tokens**2
        compute = attention + self.linear_seconds_per_token * tokens
        if recomputed:
            compute = compute * (1 + self.recompute_share)
        if degree == 1:
            return np.asarray(compute)
        exchange = self.exchange_bytes_per_token * tokens / (degree * self._bandwidth(degree))
        if recomputed:
            exchange = exchange * (1 + EXCHANGED_AGAIN)
        return np.asarray(compute / degree + exchange)

    def stages_counted(self, pipeline_stages: int) -> float:
        """How often a step counts each rank's longest micro-batch: once, and the fill and drain of a pipeline."""
        return 1 + self.pipeline_fill_share * (pipeline_stages - 1)

    def latency_seconds(self, degree: int) -> float:
        """Seconds of exchange latency that a micro-batch of this degree costs; 0 for degree 1."""
        return 0.0 if degree == 1 else float(self.exchange_latency_seconds.get(degree, 0.0))

    def recomputing_seconds(self, degree: int) -> float:
        """What a micro-batch of this degree that recomputes costs on top of overhead and latency, sequences apart."""
        again = self.recompute_share * self.micro_batch_overhead_seconds
        return again + EXCHANGED_AGAIN * self.latency_seconds(degree)

    def micro_batch_seconds(self, lengths: ArrayLike, degree: int, *, recomputed: bool = False) -> float:
        """Seconds of one micro-batch that holds these sequences on a group of this degree.

        A filler, which holds no sequence, costs its overhead. Padding is not priced.
        """
        opening = self.micro_batch_overhead_seconds + self.latency_seconds(degree)
        if recomputed:
            opening += self.recomputing_seconds(degree)
        return float(opening + self.sequence_seconds(lengths, degree, recomputed=recomputed).sum())

    def always_recomputed(self) -> "CostModel":
        """The costs of a run that recomputes every micro-batch, with the token capacity that it has."""
        compute, exchange = 1 + self.recompute_share, 1 + EXCHANGED_AGAIN
        bandwidth, latency = self.exchange_bandwidth_bytes_per_second, self.exchange_latency_seconds
        return replace(
            self,
            activation_bytes_per_token=self.recomputed_activation_bytes_per_token,
            recomputed_activation_bytes_per_token=0.0,
            attention_seconds_per_token_squared=compute * self.attention_seconds_per_token_squared,
            linear_seconds_per_token=compute * self.linear_seconds_per_token,
            micro_batch_overhead_seconds=compute * self.micro_batch_overhead_seconds,
            exchange_bandwidth_bytes_per_second={degree: value / exchange for degree, value in bandwidth.items()},
            exchange_latency_seconds={degree: value * exchange for degree, value in latency.items()},
        )

    def _bandwidth(self, degree: int) -> float:
        bandwidth = self.exchange_bandwidth_bytes_per_second.get(degree)
        if bandwidth is None:
            known = ", ".join(map(str, sorted(self.exchange_bandwidth_bytes_per_second))) or "none"
            raise FlexSPError(
                f"the cost model has no exchange_bandwidth_bytes_per_second for degree {degree} (it has {known})",
                "measure that degree with `flexsp profile` or don't ask for it",
            )
        return float(bandwidth)


_TABLE_KEYS = ("exchange_bandwidth_bytes_per_second", "exchange_latency_seconds")
_USUAL_NUMBERS = {item.name: item.default for item in fields(CostModel) if isinstance(item.default, float)}
"""Numbers that a file may leave out, and what they are then."""
_NUMBER_KEYS = tuple(
    item.name for item in fields(CostModel) if item.name not in (*_TABLE_KEYS, *_USUAL_NUMBERS, "note", "measurement")
)


def _check_number(key: str, value: object) -> None:
    """Refuse what is not a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise FlexSPError(f"{key} is {value!r}; expected a number", _CORRECT)
    if not math.isfinite(value) or value < 0:
        raise FlexSPError(f"{key} is {value}; expected a finite number of at least 0", _CORRECT)


def _fields_from(data: object) -> dict[str, Any]:
    """The constructor's arguments from parsed JSON; refuses another schema, unknown and missing keys."""
    if not isinstance(data, dict):
        raise FlexSPError(f"found a JSON {type(data).__name__}; expected a {SCHEMA} object", _CORRECT)
    if data.get("schema") != SCHEMA:
        raise FlexSPError(f'schema is {data.get("schema")!r}; expected "{SCHEMA}"', _CORRECT)
    known = {item.name for item in fields(CostModel)}
    values = {key: value for key, value in data.items() if key != "schema"}
    for key in values:
        if key not in known:
            raise FlexSPError(f"unknown key {key!r}", "put free text in note, and provenance in measurement")
    for key in (*_NUMBER_KEYS, "exchange_bandwidth_bytes_per_second"):
        if key not in values:
            raise FlexSPError(f"{key} is missing", "add it, or measure a cost model with `flexsp profile`")
    for key in _TABLE_KEYS:
        values[key] = _table_from(key, values.get(key, {}))
    if not isinstance(values.get("note", ""), str):
        raise FlexSPError(f"note is {values['note']!r}; expected text", _CORRECT)
    if not isinstance(values.get("measurement", {}), dict):
        raise FlexSPError(f"measurement is {values['measurement']!r}; expected an object", _CORRECT)
    return values


def _table_from(key: str, table: object) -> dict[int, Any]:
    """A table by degree, whose JSON keys are decimal text."""
    if not isinstance(table, dict):
        raise FlexSPError(f'{key} is {table!r}; expected an object such as {{"2": 1e11}}', _CORRECT)
    for degree in table:
        if not degree.isdecimal() or str(int(degree)) != degree or int(degree) < 2:
            raise FlexSPError(f'{key} has the degree "{degree}"; expected a whole number of at least 2', _CORRECT)
    return {int(degree): value for degree, value in table.items()}
