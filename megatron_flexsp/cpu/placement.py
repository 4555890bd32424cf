"""Sends to the CPU every tensor that a program wants on a CUDA device.

Megatron names the device in some twenty ways and places: `device="cuda"`, `device=torch.cuda.current_device()`,
`.cuda()`, `.to(...)`. All of them pass through PyTorch's `__torch_function__`, so one mode catches them all, also in
code that this package has never seen. The price is about 2 microseconds for each PyTorch call made from Python.

One thing can't be imitated: a copy between host and device that leaves two tensors. Here `x.cuda()` and `x.cpu()` give
back `x` itself, and who writes into the one writes into the other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_flexsp.cpu.replace import replaces

_CPU = torch.device("cpu")
_run_backward = torch.autograd._engine_run_backward


def _names_cuda(device: object) -> bool:
    """Whether `device`, an argument in a device's place, stands for a CUDA device (an int always does)."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`, whose device may come first and without a name."""
    if args and _names_cuda(args[0]):
        args = (_CPU, *args[1:])
    return tensor.to(*args, **kwargs)


def _cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.cuda`: the tensor is where it should be."""
    return tensor


def _type(tensor: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
    """`Tensor.type`, by whose answer ("torch.cuda.FloatTensor") Megatron's optimizers sort parameters."""
    if dtype is None:
        return tensor.type().replace("torch.", "torch.cuda.", 1)
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return tensor.type(dtype, **kwargs)


def _pin_memory(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    """`Tensor.pin_memory`: pages are pinned for a GPU's sake only."""
    return tensor


_METHODS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.type: _type,
    torch.Tensor.pin_memory: _pin_memory,
}


class CudaMeansCpu(TorchFunctionMode):
    """While it is active, CUDA devices in the arguments of PyTorch calls mean the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            if "device" in kwargs and _names_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return _METHODS.get(func, func)(*args, **kwargs)
        return _METHODS.get(func, func)(*args)


@replaces(torch.autograd)
def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
    """`Tensor.backward` and its like pass through the mode, which is off inside of a call that it handles.

    But a backward pass runs code of Megatron's: recomputation, and the backward methods of its own functions.
    """
    with CudaMeansCpu():
        return _run_backward(*args, **kwargs)
