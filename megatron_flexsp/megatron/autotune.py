"""``--flexsp-autotune``: the job's own step times correct the costs that its next plans rest on.

Lives on the rank that plans; plans reach the others as ever, so that all ranks run the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel, Plan
from megatron_flexsp.profiler.refit import Refit, TimedStep, refit, timed_step

_WARM_UP_STEPS = 3
_STEPS_BETWEEN = 20
_WINDOW_STEPS = 100


class Autotune:
    """Collects steps and refits.

    Parameters
    ----------
    cost_model
        What the job began with.
    pipeline_stages
        Stages whose fill and drain count.
    use
        Takes each new cost model; plans that are asked for afterwards rest on it.
    tell
        Takes a line for the log on each refit.
    submit
        Runs a function behind training: on large domains taking a step apart takes a while.
    clock
        Seconds from any fixed moment.
    """

    def __init__(
        self,
        cost_model: CostModel,
        pipeline_stages: int,
        use: Callable[[CostModel], None],
        tell: Callable[[str], None],
        submit: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._began_with = cost_model
        self._pipeline_stages = pipeline_stages
        self._use = use
        self._tell = tell
        self._submit = submit
        self._clock = clock
        self._began: tuple[float, Plan, NDArray[np.int64]] | None = None
        self._steps_seen = 0
        self._steps: deque[TimedStep] = deque(maxlen=_WINDOW_STEPS)
        self._waiting = 0

    def begin_step(self, plan: Plan, lengths: NDArray[np.int64]) -> None:
        """A step begins, and so the one before has ended."""
        now = self._clock()
        if self._began is not None and self._steps_seen > _WARM_UP_STEPS:
            began, ran, of = self._began
            self._submit(partial(self._learn, ran, of, now - began))
        self._steps_seen += 1
        self._began = (now, plan, lengths)

    def _learn(self, plan: Plan, lengths: NDArray[np.int64], seconds: float) -> None:
        self._steps.append(timed_step(plan, lengths, self._began_with, self._pipeline_stages, seconds))
        self._waiting += 1
        if self._waiting < _STEPS_BETWEEN:
            return
        self._waiting = 0
        try:
            found = refit(self._began_with, list(self._steps))
        except FlexSPError as error:
            self._tell(f"costs stay as they are: {error}")
            return
        self._use(found.cost_model)
        self._tell(self._told(found))

    def pause(self) -> None:
        """What comes now is no training step: the time up to the next one counts for nothing."""
        self._began = None

    def _told(self, found: Refit) -> str:
        before, after = self._began_with, found.cost_model
        return (
            f"costs refitted to the last {len(self._steps)} steps: "
            f"step overhead {_ms(before.step_overhead_seconds)} -> {_ms(after.step_overhead_seconds)}, "
            f"micro-batch overhead {_ms(before.micro_batch_overhead_seconds)} -> "
            f"{_ms(after.micro_batch_overhead_seconds)}, compute x {found.compute_scale:.2f}, "
            f"exchange x {found.exchange_scale:.2f}; median error of the prediction "
            f"{found.median_error_before:.1%} -> {found.median_error_after:.1%}"
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
