"""A trace in Chrome's Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_flexsp.report.trace import Trace


def write_chrome_trace(trace: Trace, path: Path) -> None:
    """All steps one after the other: a process for each pipeline stage, a thread for each rank."""
    path.write_text(json.dumps({"traceEvents": list(_events(trace)), "displayTimeUnit": "ms"}), encoding="utf-8")


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    for stage in range(trace.pipeline_stages):
        yield {"ph": "M", "name": "process_name", "pid": stage, "args": {"name": f"stage {stage}"}}
        for rank in range(trace.domain_size):
            named = {"ph": "M", "pid": stage, "tid": rank}
            yield {**named, "name": "thread_name", "args": {"name": f"rank {rank}"}}
    began = 0.0
    for step in trace.steps:
        for span in step.spans:
            item = step.plan.micro_batches[span.micro_batch]
            yield {
                "ph": "X",
                "name": "filler"
                if item.is_filler
                else f"{item.degree} ranks{', recomputed' if item.recomputed else ''}",
                "cat": str(span.kind),
                "pid": span.stage,
                "tid": span.rank,
                "ts": (began + span.start_seconds) * 1e6,
                "dur": (span.end_seconds - span.start_seconds) * 1e6,
                "args": {
                    "step": step.number,
                    "micro_batch": span.micro_batch,
                    "first_rank": item.first_rank,
                    "lengths": step.lengths[list(item.sequences)].tolist(),
                },
            }
        began += step.seconds
