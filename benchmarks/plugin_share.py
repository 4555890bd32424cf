"""Where the plugin's own Python time goes in a step of the quickstart's model, and its share of the step.

    python benchmarks/plugin_share.py [--flexsp-trace]

Rank 0 of a nested run records one step with PyTorch's profiler, Python calls included. A frame's own time is what it
takes less the frames, PyTorch operations and built-in functions that it calls, so kernels and all-to-alls do not count.
Calls on all threads count, but only those that begin within the step: the thread that waits for the planning process
was in its call before, and a wait is no work. Recording slows Python down; against a step that is not recorded the
share is therefore an upper bound. With --flexsp-trace the job writes a trace too, and a row says what that takes: all
calls of the tracer, on any thread, with whatever they call, files included.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.corpora import web_lengths
from benchmarks.harness.hosts import Host
from benchmarks.harness.jobs import Job
from benchmarks.harness.model import RANKS, ROOT, flexsp_arguments, training_arguments
from megatron_flexsp.errors import FlexSPError

STAND_IN = "cpu"
"""The room that plays CUDA: no part of a run on GPUs."""

TRACER = "megatron_flexsp/megatron/tracing.py("
"""Everything that --flexsp-trace does is called from here."""

_FRAME = re.compile(r"megatron_flexsp/(?P<file>(?P<room>\w+)\S*)\((?P<line>\d+)\): (?P<function>.+)")
_CATEGORIES = ("python_function", "cpu_op", "user_annotation")
_STEPS_BEFORE = 2

console = Console(highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, add up, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents-per-step", type=int, default=64, help="%(default)s, as in the quickstart")
    parser.add_argument("--flexsp-trace", action="store_true", help="the job writes a trace; say what that costs")
    parser.add_argument("--rows", type=int, default=15, help="functions to list (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "plugin_share", help="where all goes")
    options = parser.parse_args(arguments)
    prefix, _ = web_lengths(options.documents_per_step).prepare(options.output)
    # The last step is recorded; those between it and the first say how long one takes otherwise.
    recorded = 1 + _STEPS_BEFORE
    words = [*training_arguments(prefix, options.documents_per_step, recorded + 1), *flexsp_arguments("nested")]
    if options.flexsp_trace:
        folder = options.output / "flexsp_trace"
        shutil.rmtree(folder, ignore_errors=True)
        words += ["--flexsp-trace", str(folder)]
    job = Job("nested", words, options.output, (Host(RANKS),), profiled_step=recorded)
    try:
        job.wait_until_ready()
        for _ in range(recorded + 1):
            job.run_step()
        job.finish()
    finally:
        job.stop()
    calls = calls_of_step(json.loads(job.trace.read_text())["traceEvents"])
    usual_seconds = statistics.mean(step["seconds"] for step in job.steps[1:recorded])
    tracing = seconds_within(calls, TRACER) if options.flexsp_trace else None
    console.print(tabulated(own_seconds(calls), usual_seconds, job.steps[recorded]["seconds"], options.rows, tracing))
    console.print(f"the whole trace, for https://ui.perfetto.dev: {job.trace}")
    return 0


def calls_of_step(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls and operations, on all threads, that begin within Megatron's ``train_step``."""
    calls = [event for event in events if event.get("ph") == "X" and event.get("cat") in _CATEGORIES]
    steps = [event for event in calls if event["name"].endswith(": train_step")]
    if not steps:
        raise FlexSPError("the trace holds no call of train_step: PyTorch recorded no Python calls")
    return [event for event in calls if event["ts"] >= steps[0]["ts"]]


def own_seconds(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Each frame's own time, by its name, out of nested calls."""
    by_thread: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        by_thread.setdefault(event["tid"], []).append(event)
    own: Counter[str] = Counter()
    for thread in by_thread.values():
        # Outer before inner; whoever is open when an event begins is what it is nested in.
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        open_events: list[tuple[float, str]] = []
        for event in thread:
            while open_events and open_events[-1][0] <= event["ts"]:
                open_events.pop()
            own[event["name"]] += event["dur"] / 1e6
            if open_events:
                own[open_events[-1][1]] -= event["dur"] / 1e6
            open_events.append((event["ts"] + event["dur"], event["name"]))
    return own


def seconds_within(events: Iterable[dict[str, Any]], file: str) -> float:
    """What the calls of a file's functions take with all that they call; those within another one count once."""
    ends: dict[Any, float] = {}
    total = 0.0
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if file in event["name"] and event["ts"] >= ends.get(event["tid"], 0.0):
            total += event["dur"] / 1e6
            ends[event["tid"]] = event["ts"] + event["dur"]
    return total


def tabulated(
    own: Counter[str], usual_seconds: float, recorded_seconds: float, rows: int, tracing_seconds: float | None
) -> Table:
    """The plugin's functions by their own time, its share, and that of tracing if the job traced."""
    found = [(frame, seconds) for name, seconds in own.items() if (frame := _FRAME.search(name)) is not None]
    plugin = sorted(((f, s) for f, s in found if f["room"] != STAND_IN), key=lambda item: -item[1])
    if not plugin:
        raise FlexSPError("the trace holds no frame of megatron_flexsp: PyTorch recorded no Python calls")
    table = Table("own time of", "ms", "of the step", "of the step as recorded")

    def row(label: str, seconds: float) -> None:
        table.add_row(
            label, f"{seconds * 1e3:.2f}", f"{seconds / usual_seconds:.3%}", f"{seconds / recorded_seconds:.3%}"
        )

    for frame, seconds in plugin[:rows]:
        row(f"{frame['file']}:{frame['line']} {frame['function']}", seconds)
    table.add_section()
    row("the plugin", sum(seconds for _, seconds in plugin))
    row("its stand-in for CUDA", sum(seconds for frame, seconds in found if frame["room"] == STAND_IN))
    if tracing_seconds is not None:
        row("--flexsp-trace, and what it calls", tracing_seconds)
    table.add_section()
    table.add_row("the step", f"{usual_seconds * 1e3:.0f}", "", f"{recorded_seconds * 1e3:.0f} ms")
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlexSPError as error:
        console.print(f"[red]plugin_share: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
