"""Plans in a process of its own, so that planning takes nothing from the training that it runs ahead of.

``PlanningService`` lives in the process that trains and owns the planning process, which imports numpy and
HiGHS but neither torch nor Megatron. Whatever becomes of that process, every batch gets a legal plan: where
it died, hangs or is late, the quick constructive plan is made on the spot.
"""

import logging
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel, Plan, plan

logger = logging.getLogger(__name__)

_START_SECONDS = 30.0
"""What a new process may take to answer for the first time."""


class _ProcessGoneError(Exception):
    """The planning process no longer answers: its end of the pipe is closed."""


@dataclass(frozen=True)
class PlanRequest:
    """Everything about a run's plans but the lengths: the arguments of ``plan`` and the laws to check."""

    cost_model: CostModel
    domain_size: int
    token_capacity: int
    recomputed_token_capacity: int | None = None
    slice_multiple: int = 1
    count_multiple: int = 1
    time_limit_seconds: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keyword arguments of ``plan``, such as ``schedule`` and ``degrees``."""

    def make(self, lengths: NDArray[np.int64], *, quick: bool = False) -> Plan:
        """Plan one batch and check the plan's laws; ``quick`` takes the first legal plan."""
        made = plan(
            lengths,
            self.cost_model,
            self.domain_size,
            token_capacity=self.token_capacity,
            recomputed_token_capacity=self.recomputed_token_capacity,
            slice_multiple=self.slice_multiple,
            count_multiple=self.count_multiple,
            time_limit_seconds=0.0 if quick else self.time_limit_seconds,
            **self.options,
        )
        made.validate(
            lengths,
            self.token_capacity,
            recomputed_token_capacity=self.recomputed_token_capacity,
            slice_multiple=self.slice_multiple,
            count_multiple=self.count_multiple,
        )
        return made

    def always_recomputed(self) -> "PlanRequest":
        """The same for a run that recomputes every micro-batch; needs the capacity of the recomputed."""
        assert self.recomputed_token_capacity is not None, "nothing may be recomputed"
        return replace(
            self,
            cost_model=self.cost_model.always_recomputed(),
            token_capacity=self.recomputed_token_capacity,
            recomputed_token_capacity=None,
        )


@dataclass(frozen=True)
class PendingPlan:
    """A batch that is being planned."""

    lengths: NDArray[np.int64]
    worker: "_Worker"
    answer: "Future[Plan]" = field(default_factory=Future)


class PlanningService:
    """Plans batches ahead, in the order in which they are submitted.

    Parameters
    ----------
    request
        How to plan.
    patience_seconds
        How long ``result`` waits for a plan that is not there yet. Default: the time limit, a quarter more and
        half a second.
    """

    def __init__(self, request: PlanRequest, patience_seconds: float | None = None) -> None:
        self._request = request
        limit = request.time_limit_seconds
        self._patience_seconds = 1.25 * limit + 0.5 if patience_seconds is None else patience_seconds
        self._hang_seconds = max(10.0, 10 * limit)
        self._warned = False
        self.quick_plans = 0
        """Batches that got the quick plan, since training began."""
        self._worker = _Worker(request)

    def submit(self, lengths: NDArray[np.int64]) -> PendingPlan:
        """Begin to plan a batch."""
        pending = PendingPlan(lengths, self._worker)
        self._worker.submit(pending)
        return pending

    def use(self, cost_model: CostModel) -> None:
        """Plan the batches that are submitted from now on under another cost model, with the same token capacity."""
        self._request = replace(self._request, cost_model=cost_model)
        self._worker.use(self._request)

    def result(self, pending: PendingPlan) -> Plan:
        """The batch's plan; the quick one if the planning process does not deliver.

        Raises
        ------
        FlexSPError
            If there is no legal plan, as ``plan`` does.
        """
        patience = self._patience_seconds
        if not self._worker.has_answered:  # it may still be importing numpy
            patience += max(0.0, _START_SECONDS - self._worker.age_seconds)
        try:
            return pending.answer.result(timeout=patience)
        except FlexSPError:
            raise
        except TimeoutError:
            pending.answer.cancel()  # if it has not begun, it need not
            self._fall_back("is late")
            if self._worker.busy_seconds > self._hang_seconds:
                self._restart()
        except _ProcessGoneError as error:
            self._fall_back(f"died ({error})")
            if pending.worker is self._worker:
                self._restart()
        except Exception as error:  # a mistake in the planner must not end the training
            self._fall_back(f"failed ({type(error).__name__}: {error})")
        return self._request.make(pending.lengths, quick=True)

    def close(self) -> None:
        """End the planning process. It also ends when this process does."""
        self._worker.end()

    def _restart(self) -> None:
        self._worker.end()
        self._worker = _Worker(self._request)

    def _fall_back(self, reason: str) -> None:
        self.quick_plans += 1
        if not self._warned:
            self._warned = True
            logger.warning("the planning process %s: going on with quick plans where it does not deliver", reason)


class _Worker:
    """The planning process, seen from its owner."""

    def __init__(self, request: PlanRequest) -> None:
        self._pipe, there = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_flexsp.planner.service", str(there.fileno())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            # A signal to the training job's group is not for the planner: it ends when its pipe does.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        there.close()
        # Kills and reaps it at the latest when this process exits.
        self.end = weakref.finalize(self, _end, self._process)
        self._started = time.monotonic()
        self._busy_since: float | None = None
        self.has_answered = False
        self._batches: queue.SimpleQueue[PendingPlan | PlanRequest] = queue.SimpleQueue()
        # A daemon: waiting for a process that hangs must not keep this one from exiting.
        threading.Thread(target=self._ask, args=(request,), name="flexsp-planner", daemon=True).start()

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def busy_seconds(self) -> float:
        """How long it has been at work on one batch."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, pending: PendingPlan) -> None:
        """Queue a batch."""
        self._batches.put(pending)

    def use(self, request: PlanRequest) -> None:
        """Plan the batches that are queued from now on in this way."""
        self._batches.put(request)

    def _ask(self, request: PlanRequest) -> None:
        """Hand over one batch after the other and wait for each plan."""
        failure: Exception | None = None
        try:
            self._pipe.send(request)
        except OSError as error:
            failure = error
        while True:
            pending = self._batches.get()
            if isinstance(pending, PlanRequest):
                try:
                    self._pipe.send(pending)
                except OSError as error:
                    failure = error
                continue
            if not pending.answer.set_running_or_notify_cancel():
                continue
            if failure is None:
                self._busy_since = time.monotonic()
                try:
                    self._pipe.send(pending.lengths)
                    answer = self._pipe.recv()
                except (EOFError, OSError) as error:
                    failure = error
                self._busy_since = None
            if failure is not None:
                pending.answer.set_exception(_ProcessGoneError(failure or type(failure).__name__))
                continue
            self.has_answered = True
            if isinstance(answer, Plan):
                pending.answer.set_result(answer)
            else:
                pending.answer.set_exception(answer)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _serve(connection: Connection) -> None:
    """The planning process: plan each batch that comes, until the owner's end of the pipe is gone."""
    request: PlanRequest = connection.recv()
    batches: queue.SimpleQueue[NDArray[np.int64] | PlanRequest] = queue.SimpleQueue()
    # Reading beside planning: the owner's death is noticed at once, even in the middle of a plan.
    threading.Thread(target=_read, args=(connection, batches), daemon=True).start()
    while True:
        received = batches.get()
        # This module runs as __main__ here, so that its PlanRequest is not the class that was pickled.
        if not isinstance(received, np.ndarray):
            request = received
            continue
        try:
            connection.send(request.make(received))
        except BrokenPipeError:
            return
        except Exception as error:
            connection.send(error)


def _read(connection: Connection, batches: "queue.SimpleQueue[NDArray[np.int64] | PlanRequest]") -> None:
    try:
        while True:
            batches.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
