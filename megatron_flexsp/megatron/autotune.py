"""``--flexsp-autotune``: the job's own step times correct the costs that its next plans rest on.

Lives on the rank that plans; plans reach the others as ever, so that all ranks run the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

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
    clock
        Seconds from any fixed moment.
    """

    def __init__(
        self,
        cost_model: CostModel,
        pipeline_stages: int,
        use: Callable[[CostModel], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._began_with = cost_model
        self._pipeline_stages = pipeline_stages
        self._use = use
        self._clock = clock
        self._began: tuple[float, Plan, NDArray[np.int64]] | None = None
        self._steps_seen = 0
        self._steps: deque[TimedStep] = deque(maxlen=_WINDOW_STEPS)
        self._waiting = 0

    def begin_step(self, plan: Plan, lengths: NDArray[np.int64]) -> str | None:
        """A step begins, and so the one before has ended. Returns what changed, if anything did."""
        now = self._clock()
        if self._began is not None and self._steps_seen > _WARM_UP_STEPS:
            began, ran, of = self._began
            self._steps.append(timed_step(ran, of, self._began_with, self._pipeline_stages, now - began))
            self._waiting += 1
        self._steps_seen += 1
        self._began = (now, plan, lengths)
        if self._waiting < _STEPS_BETWEEN:
            return None
        self._waiting = 0
        found = refit(self._began_with, list(self._steps))
        self._use(found.cost_model)
        return self._told(found)

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
