"""Ctrl-C, or a launcher that ends its ranks: the process ends at once, though not in the middle of a file."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class EndsAtOnce:
    """While entered, SIGINT and SIGTERM end this process, whatever it waits for.

    Python's own handler would run once the main thread is back from its collective, which never ends where another
    rank is gone. Here a thread is told by the signal itself. Enter it in the main thread.

    Parameters
    ----------
    last_words
        What to print then; empty for nothing.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self._last_words = last_words
        self._busy = threading.Lock()
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> EndsAtOnce:
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._wait, args=(reading,), name="flexsp-signals", daemon=True).start()
        # A handler in Python must be there, or the signal's own deed is done before anything is told.
        taken = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
        self._handlers = {each: signal.signal(each, _do_nothing) for each in taken}
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        for each, handler in self._handlers.items():
            signal.signal(each, handler)  # type: ignore[arg-type]
        os.close(self._writing)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """What is done inside is done whole."""
        with self._busy:
            yield

    def _wait(self, reading: int) -> None:
        while told := os.read(reading, 1):
            if told[0] not in _SIGNALS:
                continue
            with self._busy:
                if words := self._last_words():
                    print(f"\n{words}\n", file=sys.stderr, flush=True)
                # Not sys.exit(): a process group's shutdown would wait for ranks that are gone.
                os._exit(128 + told[0])
        os.close(reading)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """The thread ends the process."""
