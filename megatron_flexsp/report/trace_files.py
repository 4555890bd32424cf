"""Reads the trace of a training run: the files that ``trace_format`` describes, put together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.plans_file import parse_planned_line
from megatron_flexsp.report.trace import Span, Step, Trace
from megatron_flexsp.trace_format import PLANS, SCHEMA, Kind, rank_file


def read_trace(folder: Path) -> Trace:
    """The trace of a training run.

    A last step that some rank had not written when the run ended is left out, with a note. After a resume a step
    stands there twice; the later one counts.

    Raises
    ------
    FlexSPError
        If a rank's file is missing, broken, or of a run of another size.
    """
    if not (folder / PLANS).is_file():
        raise FlexSPError(f"{folder} holds no {PLANS}; give the folder that was --flexsp-trace")
    header, lines = _read(folder / PLANS)
    domain_size, stages = header["domain_size"], header["pipeline_stages"]
    plans = {
        data["step"]: parse_planned_line(json.dumps(data), f"{folder / PLANS}, step {data['step']}") for data in lines
    }
    ranks: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    for rank in range(domain_size):
        for stage in range(stages):
            path = folder / rank_file(rank, stage)
            if not path.is_file():
                raise FlexSPError(
                    f"{folder}: {path.name} is missing; the trace is of {domain_size} ranks and {stages} pipeline "
                    "stages. Copy the whole folder, from every host if it isn't shared"
                )
            own_header, own_lines = _read(path)
            if own_header != header:
                raise FlexSPError(f"{path} is of another run: {own_header}, where {PLANS} has {header}")
            ranks[rank, stage] = {data["step"]: data for data in own_lines}
    complete = sorted(step for step in plans if all(step in steps for steps in ranks.values()))
    missing = sorted(set(plans) - set(complete))
    if not complete or (missing and missing[0] < complete[-1]):
        lacking = [rank_file(*place) for place, steps in ranks.items() if missing and missing[0] not in steps]
        raise FlexSPError(
            f"{folder}: " + (f"step {missing[0]} is not in {', '.join(lacking[:3])}" if missing else "it has no steps")
        )
    steps = tuple(
        _step(number, plans[number], {place: lines[number] for place, lines in ranks.items()}) for number in complete
    )
    notes = (f"the last {len(missing)} steps are incomplete and left out",) if missing else ()
    return Trace(str(folder), True, domain_size, stages, steps, notes)


def _step(number: int, planned: Any, of_rank: dict[tuple[int, int], dict[str, Any]]) -> Step:
    began = min(line["began"] for line in of_rank.values())
    spans = []
    for (rank, stage), line in of_rank.items():
        offset = line["began"] - began
        for index, kind, start, end in line["passes"]:
            spans.append(Span(index, rank, stage, Kind(kind), offset + start, offset + end))
    return Step(
        number=number,
        title=f"step {number}",
        plan=planned.plan,
        lengths=planned.lengths,
        spans=tuple(spans),
        seconds=float(np.median([line["seconds"] for line in of_rank.values()])),
        waited_seconds=max(line["waited_seconds"] for line in of_rank.values()),
    )


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and lines; an unfinished last line is left out."""
    texts = path.read_text(encoding="utf-8").split("\n")
    finished = [text for text in texts[:-1] if text]
    lines = list(_parsed(path, finished))
    if not lines or lines[0].get("schema") != SCHEMA:
        raise FlexSPError(f"{path} is no trace: its first line has no schema {SCHEMA}")
    return lines[0], lines[1:]


def _parsed(path: Path, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(texts, start=1):
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise FlexSPError(f"{path}, line {number}: broken ({error}); copy the trace again") from None
        if not isinstance(data, dict):
            raise FlexSPError(f"{path}, line {number}: expected an object")
        yield data
