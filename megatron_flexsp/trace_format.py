"""The files that a training run leaves under ``--flexsp-trace``: written while it goes, read by ``flexsp report``.

One file with the plans, from the rank that plans, and one for each data-parallel rank of each pipeline stage:

    plans.jsonl            {"schema": "flexsp.trace/1", "domain_size": 8, "pipeline_stages": 1}
                           {"step": 7, "waited_seconds": 0.0, ... and a line of a file of plans}
    rank-3-stage-0.jsonl   {"schema": "flexsp.trace/1", "domain_size": 8, "pipeline_stages": 1}
                           {"step": 7, "began": 1767225600.0, "seconds": 1.2, "waited_seconds": 0.0,
                            "passes": [[4, "forward", 0.0, 0.1], ...]}

``began`` is in seconds since 1970 by the rank's own clock; a pass names the micro-batch's place in the plan and when
it began and ended, in seconds after that. Lines are written whole, so a run that was killed loses a step at most.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from megatron_flexsp.errors import FlexSPError

SCHEMA = "flexsp.trace/1"
PLANS = "plans.jsonl"


class Kind(StrEnum):
    """What of a micro-batch a pass runs; plans on paper have both in one."""

    BOTH = "forward and backward"
    FORWARD = "forward"
    BACKWARD = "backward"


Pass = tuple[int, str, float, float]
"""Place of the micro-batch in the plan, kind, and when it began and ended, in seconds after the rank's step began."""


def rank_file(rank: int, stage: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank}-stage-{stage}.jsonl"


class TraceWriter:
    """Appends to one of the files, a line a step.

    Raises
    ------
    FlexSPError
        If the folder can't be written, or holds the trace of another run.
    """

    def __init__(self, folder: Path, name: str, domain_size: int, pipeline_stages: int) -> None:
        header = {"schema": SCHEMA, "domain_size": domain_size, "pipeline_stages": pipeline_stages}
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                first = file.readline()
                if not first:
                    file.write(json.dumps(header) + "\n")
                elif first.strip() != json.dumps(header):
                    raise FlexSPError(
                        f"--flexsp-trace {folder}: {name} is of another run ({first.strip()[:120]}); this one has "
                        f"{json.dumps(header)}",
                        "give another folder",
                    )
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise FlexSPError(
                f"--flexsp-trace {folder}: cannot write {name} ({error.strerror})", "give another folder"
            ) from None

    def write_plan(self, planned_line: str) -> None:
        """One step's plan, as ``planned_line`` made it with ``step=`` its number."""
        self._file.write(planned_line + "\n")

    def write_passes(
        self, step: int, began: float, seconds: float, waited_seconds: float, passes: Sequence[Pass]
    ) -> None:
        """One step of one rank; times in seconds, rounded to the microsecond."""
        rounded = [(index, kind, round(start, 6), round(end, 6)) for index, kind, start, end in passes]
        line = {
            "step": step,
            "began": began,
            "seconds": round(seconds, 6),
            "waited_seconds": round(waited_seconds, 6),
            "passes": rounded,
        }
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """No more lines."""
        self._file.close()
