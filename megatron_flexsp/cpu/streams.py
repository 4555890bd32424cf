"""CUDA streams and events where every operation has ended when its call returns: there is nothing to wait for."""

import contextlib
import time
from typing import Any

import torch

from megatron_flexsp.cpu.replace import replaces


@replaces(torch.cuda)
class Event:
    """A moment on the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`, as CUDA's events give it."""
        return (end._seconds - self._seconds) * 1000


@replaces(torch.cuda)
class Stream(contextlib.nullcontext[None]):
    """An order in which operations run. There is only one, the program's."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


_PROGRAM_ORDER = Stream()


@replaces(torch.cuda, name="stream")
class StreamContext(contextlib.nullcontext[Any]):
    """`with torch.cuda.stream(...)`: what is inside runs where it stands."""


@replaces(torch.cuda)
def current_stream(device: Any = None) -> Stream:
    """The one stream."""
    return _PROGRAM_ORDER


@replaces(torch.cuda)
def default_stream(device: Any = None) -> Stream:
    """The one stream."""
    return _PROGRAM_ORDER


@replaces(torch.cuda)
def set_stream(stream: Any) -> None:
    """There is no other stream to change to."""


@replaces(torch.cuda)
def is_current_stream_capturing() -> bool:
    """CUDA graphs are not imitated."""
    return False


@replaces(torch.Tensor)
def record_stream(self: torch.Tensor, stream: Any) -> None:
    """Tells CUDA's allocator what the CPU's needn't know. The original refuses a stream that isn't PyTorch's own."""
