"""A file of plans, one on each line, with what is needed to look at them: lengths, and what micro-batches cost.

A line is the plan's own JSON (``Plan.to_json``), so that whatever reads plans reads these lines too, with

    "lengths": [...]                 tokens of each sequence of the global batch
    "micro_batch_seconds": [...]     as predicted, one for each micro-batch

and whatever else the writer has to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.plans import Plan
from megatron_flexsp.planner.timing import micro_batch_seconds


@dataclass(frozen=True)
class PlannedStep:
    """One line."""

    plan: Plan
    lengths: NDArray[np.int64]
    """Tokens of each sequence, shape (sequences,)."""

    micro_batch_seconds: NDArray[np.float64]
    """Predicted, shape (micro-batches,)."""

    about: dict[str, Any] = field(default_factory=dict)
    """Further keys."""


def planned_line(plan: Plan, lengths: ArrayLike, cost_model: CostModel, **about: object) -> str:
    """A plan as one line of the file, without its newline."""
    more = {
        "lengths": np.asarray(lengths).tolist(),
        "micro_batch_seconds": micro_batch_seconds(plan, lengths, cost_model).tolist(),
        **about,
    }
    return f"{plan.to_json().removesuffix('}')}, {json.dumps(more).removeprefix('{')}"


def parse_planned_line(text: str, source: str) -> PlannedStep:
    """What ``planned_line`` wrote; ``source`` is what errors call it.

    Raises
    ------
    FlexSPError
        If the line holds no plan, or lengths or seconds that don't belong to it.
    """
    plan = Plan.from_json(text, source=source)
    data = json.loads(text)
    try:
        lengths = np.array(data.pop("lengths"), dtype=np.int64)
        seconds = np.array(data.pop("micro_batch_seconds"), dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        raise FlexSPError(
            f'{source}: the plan stands there without "lengths" and "micro_batch_seconds"; write the file with '
            "flexsp plan --output or flexsp simulate --output"
        ) from None
    held = sorted(position for item in plan.micro_batches for position in item.sequences)
    if held != list(range(len(lengths))) or seconds.shape != (len(plan.micro_batches),):
        raise FlexSPError(
            f"{source}: the plan has {len(held)} sequences in {len(plan.micro_batches)} micro-batches, but there are "
            f"{len(lengths)} lengths and {seconds.size} times; they belong to different plans"
        )
    own = set(json.loads(plan.to_json()))
    return PlannedStep(plan, lengths, seconds, {key: value for key, value in data.items() if key not in own})


def read_plans(path: Path) -> Iterator[PlannedStep]:
    """The lines of a file of plans.

    Raises
    ------
    FlexSPError
        If the file can't be read or a line is no such plan; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FlexSPError(f"{path}: cannot read plans ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield parse_planned_line(line, f"{path}, line {number}")
