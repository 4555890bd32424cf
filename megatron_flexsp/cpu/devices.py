"""`torch.cuda` as a machine would show it that has one device for each local process and never a byte in use."""

import contextlib
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

from megatron_flexsp.cpu.replace import replaces


@replaces(torch.cuda)
def is_available() -> bool:
    """Megatron doesn't start without CUDA."""
    return True


@replaces(torch.accelerator, name="is_available")
def accelerator_is_available() -> bool:
    """PyTorch itself (data loaders that pin memory, optimizers, checkpoints) shall know that there is none."""
    return False


@replaces(torch.cuda)
def device_count() -> int:
    """Megatron sets up its process groups only if there is a device."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@replaces(torch.cuda)
def current_device() -> int:
    """An int that becomes the CPU wherever it is used as a device."""
    return 0


@replaces(torch.cuda)
def set_device(device: Any) -> None:
    """There is nothing to choose."""


@replaces(torch.cuda, name="device")
class Device(contextlib.nullcontext[None]):
    """`with torch.cuda.device(...)`: nothing to choose here either."""


@replaces(torch.cuda)
def get_device_properties(device: Any = None) -> SimpleNamespace:
    """Compute capability 10 spares the user CUDA_DEVICE_MAX_CONNECTIONS=1, which older GPUs need for overlap."""
    return SimpleNamespace(name="CPU", major=10, minor=0, total_memory=0, multi_processor_count=1)


@replaces(torch.cuda)
def get_device_capability(device: Any = None) -> tuple[int, int]:
    """The same as in the properties."""
    return 10, 0


@replaces(torch.cuda)
def get_device_name(device: Any = None) -> str:
    """For log lines."""
    return "CPU"


@replaces(torch.cuda)
def synchronize(device: Any = None) -> None:
    """Every operation has ended when its call returns."""


@replaces(torch.cuda)
def _lazy_init() -> None:
    """The original raises without a driver."""


@replaces(torch.cuda)
def _lazy_call(callback: Any, **kwargs: Any) -> None:
    """The original queues the call until CUDA is first used, which would be never."""
    callback()


@replaces(torch.cuda)
def empty_cache() -> None:
    """There is no cache."""


@replaces(torch.cuda)
def memory_stats(device: Any = None) -> dict[str, int]:
    """Reads 0 for every statistic, as do the four functions below: no CUDA memory is in use."""
    return defaultdict(int)


@replaces(torch.cuda)
def memory_allocated(device: Any = None) -> int:
    """See `memory_stats`."""
    return 0


@replaces(torch.cuda)
def max_memory_allocated(device: Any = None) -> int:
    """See `memory_stats`."""
    return 0


@replaces(torch.cuda)
def memory_reserved(device: Any = None) -> int:
    """See `memory_stats`."""
    return 0


@replaces(torch.cuda)
def max_memory_reserved(device: Any = None) -> int:
    """See `memory_stats`."""
    return 0


@replaces(torch.cuda)
def reset_peak_memory_stats(device: Any = None) -> None:
    """There is no peak."""


@replaces(torch.cuda)
def temperature(device: Any = None) -> int:
    """Megatron's --log-straggler asks for it, and for the three below: there is no sensor."""
    return 0


@replaces(torch.cuda)
def power_draw(device: Any = None) -> int:
    """See `temperature`."""
    return 0


@replaces(torch.cuda)
def utilization(device: Any = None) -> int:
    """See `temperature`."""
    return 0


@replaces(torch.cuda)
def clock_rate(device: Any = None) -> int:
    """See `temperature`."""
    return 0


@replaces(torch.cuda.nvtx)
def range_push(message: str) -> None:
    """A build of PyTorch without CUDA raises here."""


@replaces(torch.cuda.nvtx)
def range_pop() -> None:
    """A build of PyTorch without CUDA raises here."""
