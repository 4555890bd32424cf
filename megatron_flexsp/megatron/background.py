"""A thread behind training that does what it is given, one after the other."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_SECONDS_TO_END = 5.0

_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Background:
    """Runs calls in the order in which they were given.

    An executor of ``concurrent.futures`` would do, but for one thing: Python waits for its threads at exit, and a
    call that is collective may wait for a rank that has failed. This thread is waited for a moment only.

    Parameters
    ----------
    name
        The thread's.
    begin
        Called first, in the thread.
    """

    def __init__(self, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self.submit(begin)
        # A thread that is still there when Python takes itself down can bring the process down with it.
        atexit.register(self._end)

    def submit[T](self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Call ``call(*args)`` when all before it have returned; the future gets what it returns or raises."""
        future: Future[T] = Future()
        self._calls.put((future, call, args))
        return future

    def finish(self, limit_seconds: float) -> bool:
        """Wait until all calls have returned, but no longer than the limit; returns whether they have."""
        done = threading.Event()
        self.submit(done.set)
        return done.wait(limit_seconds)

    def _run(self) -> None:
        while (next_call := self._calls.get()) is not None:
            future, call, args = next_call
            try:
                result = call(*args)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del next_call, future, call, args  # or they would live until the next call

    def _end(self) -> None:
        self._calls.put(None)
        self._thread.join(_SECONDS_TO_END)
