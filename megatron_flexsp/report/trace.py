"""What a trace holds once it is read: each step's plan, and when every micro-batch ran on every rank.

It comes from a training run (``trace_files``) or from plans that were only simulated (``from_plans``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import Plan
from megatron_flexsp.planner.plans_file import PlannedStep, read_plans
from megatron_flexsp.simulator.events import simulate
from megatron_flexsp.trace_format import Kind


@dataclass(frozen=True)
class Span:
    """One pass of one micro-batch on one rank."""

    micro_batch: int
    """Its place in the plan."""

    rank: int
    """Of the domain."""

    stage: int
    """Of the pipeline."""

    kind: Kind
    start_seconds: float
    """Since the step's first rank began."""

    end_seconds: float


@dataclass(frozen=True)
class Step:
    """One step."""

    number: int
    """The iteration, or the number of the batch."""

    title: str
    plan: Plan
    lengths: NDArray[np.int64]
    spans: tuple[Span, ...]
    seconds: float
    """Measured in a training run, simulated otherwise."""

    waited_seconds: float = 0.0
    """The longest that a rank waited for its plan and its data."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return int(self.lengths.sum())

    @cached_property
    def degrees(self) -> NDArray[np.int64]:
        """The degree that each sequence ran at, shape (sequences,)."""
        degrees = np.zeros(len(self.lengths), dtype=np.int64)
        for item in self.plan.micro_batches:
            degrees[list(item.sequences)] = item.degree
        return degrees

    @cached_property
    def busy_share(self) -> float:
        """Mean share of the step that a rank of a stage runs sequences."""
        places = {(span.rank, span.stage) for span in self.spans}
        busy = sum(
            span.end_seconds - span.start_seconds
            for span in self.spans
            if not self.plan.micro_batches[span.micro_batch].is_filler
        )
        return busy / (len(places) * self.seconds) if self.seconds else 1.0


@dataclass(frozen=True)
class Trace:
    """A run."""

    name: str
    """Where it was read from."""

    is_measured: bool
    """Whether it was run; else it is what a cost model predicts."""

    domain_size: int
    pipeline_stages: int
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    """What a reader should know of it, such as steps that were left out."""

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that micro-batches with sequences have, narrowest first."""
        items = (item for step in self.steps for item in step.plan.micro_batches)
        return tuple(sorted({item.degree for item in items if not item.is_filler}))

    def step(self, number: int | None) -> Step:
        """A step by its number; the one of median time without.

        Raises
        ------
        FlexSPError
            If there is none of that number.
        """
        if number is None:
            in_order = sorted(self.steps, key=lambda step: step.seconds)
            return in_order[len(in_order) // 2]
        for step in self.steps:
            if step.number == number:
                return step
        raise FlexSPError(f"{self.name} has no step {number}; it has {self.steps[0].number} to {self.steps[-1].number}")


def from_plans(path: Path, strategy: str | None = None) -> Trace:
    """Plans of a file, run on paper.

    Parameters
    ----------
    path
        What ``flexsp plan`` or ``flexsp simulate`` wrote with ``--output``.
    strategy
        Of a file in which several ways to train are compared, the one to show; the fastest without.

    Raises
    ------
    FlexSPError
        If the file holds no plans, none of the strategy, or plans for domains of different sizes.
    """
    plans: dict[str, list[PlannedStep]] = {}
    for planned in read_plans(path):
        plans.setdefault(planned.about.get("strategy", planned.plan.schedule), []).append(planned)
    if not plans:
        raise FlexSPError(f"{path} holds no plans")
    chosen = strategy or min(plans, key=lambda name: sum(planned.plan.predicted_seconds for planned in plans[name]))
    if chosen not in plans:
        raise FlexSPError(f"{path} holds no plans of {chosen}; it holds {', '.join(plans)}")
    shapes = {(planned.plan.domain_size, planned.about.get("pipeline_stages", 1)) for planned in plans[chosen]}
    if len(shapes) > 1:
        raise FlexSPError(f"{path} holds plans for several (ranks, stages): {sorted(shapes)}; split the file")
    ((domain_size, stages),) = shapes
    steps = [_simulated(number, planned, stages) for number, planned in enumerate(plans[chosen])]
    others = [name for name in plans if name != chosen]
    notes = (f"shows {chosen}; the file also has {', '.join(others)} (--strategy)",) if others else ()
    return Trace(f"{path.name}: {chosen}", False, domain_size, stages, tuple(steps), notes)


def _simulated(number: int, planned: PlannedStep, stages: int) -> Step:
    timeline = simulate(planned.plan, planned.micro_batch_seconds, pipeline_stages=stages)
    spans = tuple(
        Span(item.micro_batch, rank, item.stage, item.kind, item.start_seconds, item.end_seconds)
        for item in timeline.operations
        for rank in item.ranks
    )
    batch = planned.about.get("batch", number)
    return Step(batch, f"batch {batch}", planned.plan, planned.lengths, spans, timeline.step_seconds)
