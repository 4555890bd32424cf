"""``--flexsp-trace``: when each micro-batch ran on this rank, written down behind the step's work.

On a GPU the times are those of CUDA events, read once the device has passed them, so that nothing waits. Steps begin
with an idle device (Megatron reads the loss back), which is what ties a rank's events to the clock of its host.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_flexsp.megatron.batches import LocalMicroBatch, PlannedBatch
from megatron_flexsp.megatron.context import Context, on_cpu
from megatron_flexsp.planner.plans_file import planned_line
from megatron_flexsp.trace_format import PLANS, Kind, TraceWriter, rank_file


class _Clock(Protocol):
    """Marks moments now, and says later how far apart they were."""

    def mark(self) -> Any: ...

    def is_past(self, mark: Any) -> bool: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class _HostClock:
    """Where work is done when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_past(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start


class _DeviceClock:
    """Where calls only launch work: an event in the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3


@dataclass
class _Step:
    """One step's marks."""

    number: int
    began: float
    start: Any
    waited_seconds: float
    places: dict[int, int]
    """Place in the plan of each local micro-batch, by its id."""

    passes: list[tuple[int, Kind, Any, Any]] = field(default_factory=list)
    end: Any = None


class Tracer:
    """Writes a rank's trace.

    Parameters
    ----------
    folder
        ``--flexsp-trace``; every rank writes files of its own there.
    context
        The run.

    Raises
    ------
    FlexSPError
        If the folder can't be written or holds another run's trace.
    """

    def __init__(self, folder: Path, context: Context) -> None:
        self._context = context
        self._clock: _Clock = _HostClock() if on_cpu() else _DeviceClock()
        self._step: _Step | None = None
        self._unwritten: deque[_Step] = deque()
        self._thread = ThreadPoolExecutor(1, "flexsp-trace")  # a plan of a large domain takes a while to spell out
        shape = (context.settings.domain_size, context.settings.pipeline_stages)
        self._plans = TraceWriter(folder, PLANS, *shape) if context.channel.plans_here else None
        self._passes = None
        if parallel_state.get_tensor_model_parallel_rank() == 0:  # its tensor-parallel peers do the same
            stage = parallel_state.get_pipeline_model_parallel_rank()
            self._passes = TraceWriter(folder, rank_file(context.domain_rank, stage), *shape)
            atexit.register(self._finish)

    def begin(self, number: int, batch: PlannedBatch) -> None:
        """A step begins."""
        if self._plans is not None:
            self._behind(self._write_plan, number, batch)
        if self._passes is None:
            return
        rank = self._context.domain_rank
        mine = [place for place, item in enumerate(batch.plan.micro_batches) if rank in item.ranks]
        self._step = _Step(
            number=number,
            began=time.time(),
            start=self._clock.mark(),
            waited_seconds=batch.waited_for_plan_seconds + batch.waited_for_data_seconds,
            places={id(item): place for item, place in zip(batch.micro_batches, mine, strict=True)},
        )

    @contextmanager
    def forward(self, item: LocalMicroBatch) -> Iterator[None]:
        """Around the forward pass of a micro-batch."""
        if self._step is None:
            yield
            return
        start = self._clock.mark()
        yield
        self._step.passes.append((self._step.places[id(item)], Kind.FORWARD, start, self._clock.mark()))

    def watch_backward(self, item: LocalMicroBatch, output: Tensor) -> None:
        """The backward pass that will begin at ``output`` is traced too."""
        step = self._step
        if step is None or not output.requires_grad:
            return
        place = step.places[id(item)]

        def begins(_: Tensor) -> None:
            start = self._clock.mark()
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: step.passes.append((place, Kind.BACKWARD, start, self._clock.mark()))
            )

        output.register_hook(begins)

    def end(self) -> None:
        """The step's micro-batches have run and its gradients are reduced."""
        if self._step is None:
            return
        self._step.end = self._clock.mark()
        self._unwritten.append(self._step)
        self._step = None
        while self._unwritten and self._clock.is_past(self._unwritten[0].end):
            self._behind(self._write_passes, self._unwritten.popleft())

    def _behind(self, write: Callable[..., None], *args: Any) -> None:
        """Write while training goes on; training goes on too where that fails."""
        self._thread.submit(write, *args).add_done_callback(_warn_of_failure)

    def _write_plan(self, number: int, batch: PlannedBatch) -> None:
        assert self._plans is not None
        self._plans.write_plan(planned_line(batch.plan, batch.lengths, self._context.cost_model, step=number))

    def _write_passes(self, step: _Step) -> None:
        assert self._passes is not None
        seconds, start = self._clock.seconds, step.start
        passes: Sequence[tuple[int, str, float, float]] = [
            (place, str(kind), seconds(start, began), seconds(start, ended))
            for place, kind, began, ended in step.passes
        ]
        self._passes.write_passes(step.number, step.began, seconds(start, step.end), step.waited_seconds, passes)

    def _finish(self) -> None:
        """The run ends; the device has done all that it will do."""
        while self._unwritten and self._clock.is_past(self._unwritten[0].end):
            self._write_passes(self._unwritten.popleft())


def _warn_of_failure(written: Future[None]) -> None:
    error = written.exception()
    if error is not None:
        print(f"megatron-flexsp: warning: --flexsp-trace: a step is missing: {error}", file=sys.stderr, flush=True)
