"""One HTML page that holds everything, scripts too, so that it opens anywhere and offline."""

from __future__ import annotations

import html
from pathlib import Path
from string import Template

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from megatron_flexsp.planner import padding_share
from megatron_flexsp.report import figures
from megatron_flexsp.report.trace import Step, Trace

_MOST_TIMELINES = 12
_MOST_BARS = 40_000
"""On a page: a browser draws so many without trouble."""

_TEMPLATE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


def write_page(trace: Trace, path: Path, step: int | None = None) -> None:
    """Write the report of a trace.

    Parameters
    ----------
    trace
        The run.
    path
        The page to write.
    step
        The step whose timeline shows first; by default the one of median time.

    Raises
    ------
    FlexSPError
        If the trace has no such step.
    """
    shown = trace.step(step)
    chosen = timelines_on_page(trace, shown)
    measured = "measured" if trace.is_measured else "simulated"
    path.write_text(
        _TEMPLATE.substitute(
            name=html.escape(trace.name),
            plotly=get_plotlyjs(),
            notes="".join(f"<p class='note'>{html.escape(note)}</p>" for note in trace.notes),
            facts="".join(
                f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts(trace)
            ),
            timeline=_embedded(figures.timeline(trace, chosen, shown), "timeline"),
            timeline_note=_timeline_note(trace, chosen),
            seconds=_embedded(figures.predicted_and_measured(trace), "seconds"),
            lengths=_embedded(figures.lengths_and_degrees(trace), "lengths"),
            shares=_embedded(figures.shares(trace), "shares"),
            measured=measured,
        ),
        encoding="utf-8",
    )


def facts(trace: Trace) -> list[tuple[str, str]]:
    """The run in a few numbers: name and value."""
    seconds = np.array([step.seconds for step in trace.steps])
    predicted = np.array([step.plan.predicted_seconds for step in trace.steps])
    bound = np.array([step.plan.lower_bound_seconds for step in trace.steps])
    tokens = sum(step.tokens for step in trace.steps)
    found = [
        ("ranks", f"{trace.domain_size}" + (f" x {trace.pipeline_stages} stages" if trace.pipeline_stages > 1 else "")),
        ("steps" if trace.is_measured else "batches", f"{len(trace.steps):,}"),
        ("schedule", ", ".join(sorted({step.plan.schedule for step in trace.steps}))),
        ("median step", f"{np.median(seconds):.3f} s"),
        ("tokens per second", f"{tokens / seconds.sum():,.0f}"),
        ("plans above their bound", f"{predicted.sum() / bound.sum() - 1:.1%}" if bound.sum() else "-"),
        ("busy", f"{np.average([step.busy_share for step in trace.steps], weights=seconds):.1%}"),
        ("padding", f"{np.mean([padding_share(step.plan, step.lengths) for step in trace.steps]):.2%}"),
    ]
    if trace.is_measured:
        found[4:4] = [("measured over predicted", f"{np.median(seconds / predicted):.2f}")]
        found.append(("waits", f"{sum(step.waited_seconds for step in trace.steps) / seconds.sum():.2%}"))
    return found


def timelines_on_page(trace: Trace, shown: Step) -> list[Step]:
    """The steps that the menu offers: evenly over the run, the slowest, the fastest and the one that shows first."""
    by_time = sorted(trace.steps, key=lambda step: step.seconds)
    wanted = {shown.number, by_time[0].number, by_time[-1].number}
    most = max(len(wanted), min(_MOST_TIMELINES, _MOST_BARS // max(1, len(shown.spans))))
    evenly = np.linspace(0, len(trace.steps) - 1, min(len(trace.steps), most)).round().astype(int)
    for index in evenly.tolist():
        if len(wanted) < most:
            wanted.add(trace.steps[index].number)
    return [step for step in trace.steps if step.number in wanted]


def _timeline_note(trace: Trace, chosen: list[Step]) -> str:
    if len(chosen) == len(trace.steps):
        return ""
    return (
        f"The menu has {len(chosen)} of {len(trace.steps)} steps, the fastest and the slowest among them; "
        "<code>flexsp report --step N</code> shows any other."
    )


def _embedded(figure: go.Figure, name: str) -> str:
    markup: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return markup
