"""The report's pictures as PNG files, for papers and READMEs."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from megatron_flexsp.report.figures import DARKEST, LIGHTEST
from megatron_flexsp.report.trace import Step, Trace

_DOTS_PER_INCH = 200


def write_images(trace: Trace, folder: Path, step: int | None = None) -> list[Path]:
    """Write ``timeline.png``, ``lengths.png`` and ``seconds.png`` into a folder, which is made.

    Raises
    ------
    FlexSPError
        If the trace has no such step.
    """
    shown = trace.step(step)
    folder.mkdir(parents=True, exist_ok=True)
    rows = trace.domain_size * trace.pipeline_stages
    drawings = {
        "timeline": ((8.0, min(10.0, 1.2 + 0.22 * rows)), lambda axes: _timeline(axes, trace, shown)),
        "lengths": ((6.0, 3.0), lambda axes: _lengths(axes, trace)),
        "seconds": ((6.0, 3.0), lambda axes: _seconds(axes, trace)),
    }
    written = []
    for name, (inches, draw) in drawings.items():
        figure, axes = plt.subplots(figsize=inches, layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=_DOTS_PER_INCH)
        plt.close(figure)
        written.append(path)
    return written


def _colours(trace: Trace) -> dict[int, str]:
    shades = plt.get_cmap("viridis")(np.linspace(LIGHTEST, DARKEST, len(trace.degrees)))
    return dict(zip(trace.degrees, map(to_hex, shades), strict=True))


def _timeline(axes: Axes, trace: Trace, step: Step) -> None:
    colours = _colours(trace)
    for span in step.spans:
        item = step.plan.micro_batches[span.micro_batch]
        colour = "0.85" if item.is_filler else colours[item.degree]
        row = span.rank * trace.pipeline_stages + span.stage
        extent = (span.start_seconds, span.end_seconds - span.start_seconds)
        axes.broken_barh([extent], (row - 0.45, 0.9), facecolors=[colour], edgecolors="white", linewidth=0.6)
    used = sorted({item.degree for item in step.plan.micro_batches if not item.is_filler}, reverse=True)
    axes.legend(
        handles=[Patch(color=colours[degree], label=f"{degree} rank{'s' if degree > 1 else ''}") for degree in used],
        ncols=len(used),  # type: ignore[call-overload]  # the stubs leave it out
        loc="lower right",
        bbox_to_anchor=(1, 1),
        frameon=False,
    )
    axes.set(xlabel="seconds", ylabel="rank", xlim=(0, step.seconds))
    rows = range(0, trace.domain_size, max(1, trace.domain_size // 16))
    axes.set_yticks([rank * trace.pipeline_stages for rank in rows], [str(rank) for rank in rows])
    axes.set_ylim(trace.domain_size * trace.pipeline_stages - 0.5, -0.5)


def _lengths(axes: Axes, trace: Trace) -> None:
    lengths = np.concatenate([step.lengths for step in trace.steps])
    degrees = np.concatenate([step.degrees for step in trace.steps])
    edges = np.geomspace(max(1, lengths.min()), lengths.max() + 1, 33)
    colours = _colours(trace)
    held = [lengths[degrees == degree] for degree in colours]
    axes.hist(
        held,
        bins=edges.tolist(),
        weights=[tokens / lengths.sum() for tokens in held],
        stacked=True,
        color=list(colours.values()),
        label=[f"{degree} rank{'s' if degree > 1 else ''}" for degree in colours],
    )
    axes.set(xscale="log", xlabel="tokens of a sequence", ylabel="share of all tokens")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False)


def _seconds(axes: Axes, trace: Trace) -> None:
    numbers = [step.number for step in trace.steps]
    name = "measured" if trace.is_measured else "simulated"
    axes.plot(numbers, [step.seconds for step in trace.steps], color="black", label=name)
    axes.plot(numbers, [step.plan.predicted_seconds for step in trace.steps], color="#2a788e", label="predicted")
    axes.plot(numbers, [step.plan.lower_bound_seconds for step in trace.steps], color="0.7", label="lower bound")
    axes.set(xlabel="step" if trace.is_measured else "batch", ylabel="seconds")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
