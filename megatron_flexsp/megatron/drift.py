"""Notices when a run's steps no longer take what its cost model predicts, and says what to do about it.

It reads the host's clock where a step begins and nothing else, so that no device is waited for: Megatron reads the
loss back in every step, which keeps the host in step with the device.
"""

from __future__ import annotations

import os
import shlex
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from megatron_flexsp.megatron.context import on_cpu

TOLERANCE = 0.2
"""Of the prediction."""
_WINDOW_STEPS = 20
_WARM_UP_STEPS = 3
_QUIET_STEPS = 2000
"""From one warning to the next, at least."""


class DriftWatch:
    """Compares the time from one step's beginning to the next with the prediction.

    Parameters
    ----------
    cost_model
        What the file with the predictions is called.
    step_overhead_seconds
        What a step takes beside its micro-batches.
    remedy
        The command that measures the job anew.
    clock
        Seconds from any fixed moment.
    """

    def __init__(
        self,
        cost_model: str,
        step_overhead_seconds: float,
        remedy: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cost_model = cost_model
        self._step_overhead_seconds = step_overhead_seconds
        self._remedy = remedy
        self._clock = clock
        self._steps = 0
        self._silent_until = 0
        self._began: tuple[float, float] | None = None
        self._ratios: deque[float] = deque(maxlen=_WINDOW_STEPS)

    def begin_step(self, predicted_seconds: float) -> str | None:
        """A step begins whose plan predicts so many seconds. Returns a warning if there is reason for one."""
        now = self._clock()
        if self._began is not None and self._steps > _WARM_UP_STEPS:
            began, predicted = self._began
            self._ratios.append((now - began) / predicted)
        self._steps += 1
        self._began = (now, predicted_seconds + self._step_overhead_seconds)
        if len(self._ratios) < _WINDOW_STEPS or self._steps < self._silent_until:
            return None
        # The median: a step with a checkpoint in it is one step.
        ratio = float(np.median(self._ratios))
        if abs(ratio - 1) <= TOLERANCE:
            return None
        self._silent_until = self._steps + _QUIET_STEPS
        return (
            f"the last {_WINDOW_STEPS} steps took {ratio:.2f} times what {self._cost_model} predicts, so that plans "
            f"rest on wrong costs. Measure this job again:\n  {self._remedy}"
        )

    def pause(self) -> None:
        """What comes now is no training step: the time up to the next one counts for nothing."""
        self._began = None


def profile_command(arguments: Sequence[str], cost_model: str) -> str:
    """The command that measures a job again, from the script and the arguments that started it."""
    kept, words = [], iter(arguments)
    for word in words:
        if word == "--flexsp-cost-model":
            next(words, None)
        elif not word.startswith("--flexsp-cost-model="):
            kept.append(word)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // ranks
    launcher = ["torchrun", *([f"--nnodes={nodes}", "..."] if nodes > 1 else []), f"--nproc-per-node={ranks}"]
    launcher += ["-m", "megatron_flexsp.run", *(["--cpu"] if on_cpu() else [])]
    return shlex.join([*launcher, *kept, "--flexsp-profile", cost_model])
