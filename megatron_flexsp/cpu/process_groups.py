"""Process groups: gloo wherever a program asks for NCCL, so that the command line of a GPU run can stay as it is."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed import distributed_c10d

from megatron_flexsp.cpu.replace import replaces

_init_process_group = distributed_c10d.init_process_group
_new_group = distributed_c10d.new_group
_barrier = distributed_c10d.barrier
_all_reduce = distributed_c10d.all_reduce
_all_to_all_single = distributed_c10d.all_to_all_single
_all_gather = distributed_c10d.all_gather
_coalescing_manager = distributed_c10d._coalescing_manager

_gathering: list[list[Any]] = []
"""For each coalescing manager that is entered, the gatherings that have begun in it."""


@replaces(torch.distributed)
def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """NCCL, also as the default, becomes gloo; a device to bind to is dropped."""
    kwargs.pop("device_id", None)
    _init_process_group(_on_cpu(backend) or "gloo", *args, **kwargs)


@replaces(torch.distributed)
def new_group(
    ranks: Any = None, timeout: Any = None, backend: str | None = None, pg_options: Any = None, **kwargs: Any
) -> Any:
    """NCCL becomes gloo; NCCL's options are dropped."""
    kwargs.pop("device_id", None)
    return _new_group(ranks, timeout, _on_cpu(backend), **kwargs)


@replaces(torch.distributed)
def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
    """gloo refuses `device_ids`."""
    return _barrier(group, async_op)


@replaces(torch.distributed)
def all_reduce(
    tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """gloo can't average; Megatron averages auxiliary losses."""
    if op != torch.distributed.ReduceOp.AVG:
        return _all_reduce(tensor, op, group, async_op)
    tensor /= torch.distributed.get_world_size(group)
    return _all_reduce(tensor, torch.distributed.ReduceOp.SUM, group, async_op)


@replaces(torch.distributed)
def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Sizes come as a tensor from Megatron's mixture of experts, which makes a list only of what is on a GPU."""
    output_split_sizes, input_split_sizes = (
        sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        for sizes in (output_split_sizes, input_split_sizes)
    )
    return _all_to_all_single(output, input, output_split_sizes, input_split_sizes, group, async_op)


@replaces(torch.distributed, name="_coalescing_manager")
@contextlib.contextmanager
def coalescing_manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
    """PyTorch's, and what `all_gather_into_tensor` begins in it."""
    with _coalescing_manager(group, device, async_ops) as manager:
        _gathering.append([])
        try:
            yield manager
        finally:
            begun = _gathering.pop()
    for work in begun:
        if async_ops:
            manager.append(work)
        else:
            work.wait()


@replaces(torch.distributed)
def all_gather_into_tensor(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Tensors go one by one: where gloo gathers several at once, memory is spoilt now and then.

    Under Megatron-FSDP, on two ranks, 3 of 6 runs of 120 steps died of it, and none of 6 like this. The call has
    crashed PyTorch's own tests, too (pytorch/pytorch#65231).
    """
    ranks = torch.distributed.get_world_size(group)
    parts = list(output_tensor.view(ranks, *input_tensor.shape).unbind())
    work = _all_gather(parts, input_tensor, group, async_op or bool(_gathering))
    if _gathering:
        _gathering[-1].append(work)
    return work


def _on_cpu(backend: str | None) -> str | None:
    return "gloo" if backend is not None and "nccl" in backend else backend
