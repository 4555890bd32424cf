"""What a cost model's file keeps of its measurement, and what is printed of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_flexsp.planner import CostModel
from megatron_flexsp.profiler.fit import Constants, Quality, Sample
from megatron_flexsp.profiler.points import Point


def seconds_per_byte(exchanges: Iterable[dict[str, Any]]) -> dict[int, float]:
    """By degree, what a further byte of an all-to-all takes; 0 where it can't be seen."""
    by_degree: dict[int, list[tuple[int, float]]] = {}
    for item in exchanges:
        by_degree.setdefault(item["degree"], []).append((item["bytes"], float(np.median(item["seconds"]))))
    slopes = {}
    for degree, ((few, short), (many, long)) in by_degree.items():
        slopes[degree] = max(0.0, (long - short) / (many - few)) if many > few else 0.0
    return slopes


def fit_record(found: Quality) -> dict[str, Any]:
    """How good the fit is."""
    return {
        "method": "least absolute relative deviations, constants not negative",
        "r_squared": found.r_squared,
        "median_error": found.median_error,
        "largest_error": found.largest_error,
    }


def point_record(point: Point, repeats: Sequence[Sample], constants: Constants) -> dict[str, Any]:
    """What a kind of step was, what it took, and what the fit says that it takes."""
    median = float(np.median([sample.seconds for sample in repeats]))
    predicted = constants.seconds(repeats[0])
    return {
        "degree": point.degree,
        "rounds": point.rounds,
        "recomputed": point.recomputed,
        "sequences": len(point.lengths),
        "tokens": point.tokens,
        "tokens_squared": point.tokens_squared,
        "seconds": [sample.seconds for sample in repeats],
        "predicted_seconds": predicted,
        "residual_seconds": median - predicted,
    }


def print_result(path: str, cost_model: CostModel, checks: Sequence[dict[str, Any]]) -> None:
    """Where the file is, how good the fit is, and each planned step: predicted against measured."""
    console = Console(highlight=False, width=None)
    fitted = cost_model.measurement["fit"]
    console.print(
        f"[flexsp] cost model written to {path}: R^2 {fitted['r_squared']:.4f}, median error "
        f"{fitted['median_error']:.1%}, largest {fitted['largest_error']:.1%}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for name in ("step", "degrees", "micro-batches", "tokens", "predicted s", "measured s", "ratio"):
        table.add_column(name, justify="right")
    for number, check in enumerate(checks, start=1):
        table.add_row(
            str(number),
            ",".join(map(str, check["degrees"])),
            str(check["micro_batches"]),
            f"{check['tokens']:,}",
            f"{check['predicted_seconds']:.3f}",
            f"{check['measured_seconds']:.3f}",
            f"{check['predicted_seconds'] / check['measured_seconds']:.2f}",
        )
    console.print(table)
    if checks:
        errors = [abs(check["predicted_seconds"] / check["measured_seconds"] - 1) for check in checks]
        console.print(
            f"[flexsp] predicted against measured, {len(checks)} steps that were not fitted: "
            f"mean error {np.mean(errors):.1%}, largest {max(errors):.1%}",
            markup=False,
            soft_wrap=True,
        )
