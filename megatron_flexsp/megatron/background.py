"""A thread behind training that does what it is given, one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """Runs calls in the order in which they were given.

    An executor of ``concurrent.futures`` would do, but for one thing: Python waits for its threads at exit, and a
    call that is collective may wait for a rank that has failed. This thread is left behind.

    Parameters
    ----------
    name
        The thread's.
    begin
        Called first, in the thread.
    """

    def __init__(self, name: str, begin: Callable[[], None] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._begin = begin
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit[T](self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Call ``call(*args)`` when all before it have returned; the future gets what it returns or raises."""
        future: Future[T] = Future()
        self._calls.put((future, call, args))
        return future

    def finish(self, limit_seconds: float) -> None:
        """Wait until all calls have returned, but no longer than the limit."""
        done = threading.Event()
        self.submit(done.set)
        done.wait(limit_seconds)

    def _run(self) -> None:
        self._begin()
        while True:
            future, call, args = self._calls.get()
            try:
                result = call(*args)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, call, args  # or they would live until the next call
