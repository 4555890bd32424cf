"""The report's pictures as Plotly figures, one function each; a caption stands beside each in ``page``.

Colours go by degree, from light for one rank to dark for the whole domain, in every picture alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from megatron_flexsp.planner import padding_share
from megatron_flexsp.report.trace import Span, Step, Trace
from megatron_flexsp.trace_format import Kind

LIGHTEST, DARKEST = 0.95, 0.15  # on the scale Viridis
FILLER_COLOUR = "#d9d9d9"
_MOST_SEQUENCES_IN_HOVER = 12
_ROW_PIXELS = 22
_PAPER = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "#ffffff", "font": {"family": "sans-serif", "size": 13}}


def degree_colours(trace: Trace) -> dict[int, str]:
    """A colour for each degree that the trace's plans use."""
    shades = np.linspace(LIGHTEST, DARKEST, len(trace.degrees)).tolist()
    return dict(zip(trace.degrees, sample_colorscale("Viridis", shades), strict=True))


def timeline(trace: Trace, steps: Sequence[Step], shown: Step) -> go.Figure:
    """Ranks down, time across, one step at a time; a menu changes the step."""
    colours = degree_colours(trace)
    figure = go.Figure()
    visible_of_step: list[list[bool]] = [[] for _ in steps]
    for number, step in enumerate(steps):
        for name, colour, spans in _by_degree(step, colours):
            figure.add_trace(_bars(trace, step, name, colour, spans, visible=step is shown))
            for other, visible in enumerate(visible_of_step):
                visible.append(other == number)
    rows = trace.domain_size * trace.pipeline_stages
    figure.update_layout(
        **_PAPER,
        barmode="overlay",
        bargap=0.1,
        height=max(240, min(1100, 190 + _ROW_PIXELS * rows)),
        margin={"l": 50, "r": 10, "t": 50, "b": 90},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        xaxis={"title": "seconds since the step began", "gridcolor": "#eeeeee", "zeroline": False},
        yaxis={"title": "rank", "autorange": "reversed", "type": "category", "showgrid": False},
    )
    if len(steps) > 1:
        figure.update_layout(
            updatemenus=[
                {
                    "active": steps.index(shown),
                    "buttons": [
                        {"label": step.title, "method": "update", "args": [{"visible": visible_of_step[number]}]}
                        for number, step in enumerate(steps)
                    ],
                    "x": 0,
                    "xanchor": "left",
                    "y": 1.0,
                    "yanchor": "bottom",
                    "pad": {"b": 4},
                }
            ]
        )
    return figure


def _by_degree(step: Step, colours: dict[int, str]) -> list[tuple[str, str, list[Span]]]:
    """Name, colour and spans of each entry of the legend, widest first."""
    spans: dict[int, list[Span]] = {}
    for span in step.spans:
        item = step.plan.micro_batches[span.micro_batch]
        spans.setdefault(0 if item.is_filler else item.degree, []).append(span)
    named = [(degree, found) for degree, found in sorted(spans.items(), reverse=True)]
    return [
        (f"{degree} rank{'s' if degree > 1 else ''}" if degree else "filler", colours.get(degree, FILLER_COLOUR), found)
        for degree, found in named
    ]


def row_name(trace: Trace, span: Span) -> str:
    """What a rank's row is called."""
    return str(span.rank) if trace.pipeline_stages == 1 else f"{span.rank}, stage {span.stage}"


def _bars(trace: Trace, step: Step, name: str, colour: str, spans: Sequence[Span], visible: bool) -> go.Bar:
    in_order = sorted(spans, key=lambda span: (span.rank, span.stage))
    return go.Bar(
        name=name,
        orientation="h",
        y=[row_name(trace, span) for span in in_order],
        base=[round(span.start_seconds, 6) for span in in_order],
        x=[round(span.end_seconds - span.start_seconds, 6) for span in in_order],
        marker={
            "color": colour,
            "line": {"color": "#ffffff", "width": 1},
            "opacity": [0.65 if span.kind is Kind.FORWARD else 1.0 for span in in_order],
        },
        customdata=[describe(step, span) for span in in_order],
        hovertemplate="rank %{y}<br>%{customdata}<extra></extra>",
        visible=visible,
    )


def describe(step: Step, span: Span) -> str:
    """What the pointer shows of a pass."""
    item = step.plan.micro_batches[span.micro_batch]
    lengths = step.lengths[list(item.sequences)]
    shown = ", ".join(f"{tokens:,}" for tokens in lengths[:_MOST_SEQUENCES_IN_HOVER])
    more = len(lengths) - _MOST_SEQUENCES_IN_HOVER
    return (
        f"micro-batch {span.micro_batch}{', recomputed' if item.recomputed else ''}, {span.kind}, "
        f"{span.start_seconds:.4f} to {span.end_seconds:.4f} s<br>"
        f"ranks {item.first_rank} to {item.first_rank + item.degree - 1}, {lengths.sum():,} tokens in "
        f"{len(lengths)} sequences<br>{shown}" + (f" and {more} more" if more > 0 else "")
    )


def predicted_and_measured(trace: Trace) -> go.Figure:
    """Seconds of every step: measured, predicted by the plan, and the bound that no plan beats."""
    numbers = [step.number for step in trace.steps]
    figure = go.Figure()
    lines = (
        ("measured" if trace.is_measured else "simulated", "#1f1f1f", [step.seconds for step in trace.steps]),
        ("predicted", "#2a788e", [step.plan.predicted_seconds for step in trace.steps]),
        ("lower bound", "#b0b0b0", [step.plan.lower_bound_seconds for step in trace.steps]),
    )
    for name, colour, values in lines:
        figure.add_trace(_line(name, colour, numbers, values))
    return _run_layout(figure, trace, "seconds", rangemode="tozero")


def lengths_and_degrees(trace: Trace) -> go.Figure:
    """Tokens by the length of their sequence, coloured by the degree that it ran at."""
    lengths = np.concatenate([step.lengths for step in trace.steps])
    degrees = np.concatenate([step.degrees for step in trace.steps])
    edges = np.unique(np.round(np.geomspace(max(1, lengths.min()), lengths.max() + 1, 33)))
    figure = go.Figure()
    for degree, colour in degree_colours(trace).items():
        mine = lengths[degrees == degree]
        tokens, _ = np.histogram(mine, bins=edges, weights=mine)
        figure.add_trace(
            go.Bar(
                name=f"{degree} rank{'s' if degree > 1 else ''}",
                x=[f"{low:,.0f}" for low in edges[:-1]],
                y=tokens / lengths.sum(),
                marker={"color": colour},
                hovertemplate="sequences from %{x} tokens: %{y:.1%} of all tokens<extra>%{fullData.name}</extra>",
            )
        )
    figure.update_layout(
        **_PAPER,
        barmode="stack",
        bargap=0.05,
        height=340,
        margin={"l": 60, "r": 10, "t": 40, "b": 60},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        xaxis={"title": "tokens of a sequence", "type": "category", "nticks": 12},
        yaxis={"title": "share of all tokens", "tickformat": ".0%", "gridcolor": "#eeeeee"},
    )
    return figure


def shares(trace: Trace) -> go.Figure:
    """Busy share, padding and waits of every step."""
    numbers = [step.number for step in trace.steps]
    figure = go.Figure()
    lines = (
        ("busy", "#2a788e", [step.busy_share for step in trace.steps]),
        ("padding", "#d95f02", [padding_share(step.plan, step.lengths) for step in trace.steps]),
        ("waits for plan and data", "#7570b3", [waits(step) for step in trace.steps]),
    )
    for name, colour, values in lines:
        figure.add_trace(_line(name, colour, numbers, values))
    figure = _run_layout(figure, trace, "share of the step", range=[0, 1.02])
    return figure.update_yaxes(tickformat=".0%")


def waits(step: Step) -> float:
    """Share of the step that its slowest rank waited for its plan and its data."""
    return step.waited_seconds / step.seconds if step.seconds else 0.0


def _line(name: str, colour: str, x: Sequence[int], y: Sequence[float]) -> go.Scatter:
    mode = "lines+markers" if len(x) <= 50 else "lines"
    return go.Scatter(name=name, x=x, y=y, mode=mode, line={"color": colour, "width": 2})


def _run_layout(figure: go.Figure, trace: Trace, title: str, **yaxis: object) -> go.Figure:
    return figure.update_layout(
        **_PAPER,
        height=320,
        margin={"l": 60, "r": 10, "t": 40, "b": 45},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        xaxis={
            "title": "step" if trace.is_measured else "batch",
            "gridcolor": "#eeeeee",
            "dtick": 1 if len(trace.steps) <= 10 else None,  # no half steps
        },
        yaxis={"title": title, "gridcolor": "#eeeeee", **yaxis},
    )
