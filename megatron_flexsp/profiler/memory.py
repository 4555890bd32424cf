"""Bytes that training keeps: the tensors that autograd saves, and the model's own state.

On a GPU the allocator knows better, and ``megatron/measured_steps.py`` asks it. Counting works anywhere.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class _Kept:
    """A tensor that autograd holds; its end is that tensor's release."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Counts the bytes of all tensors that autograd holds for backward, while it is entered.

    Views of one storage count once. ``peak`` is the most that was held at one time, so that layers which are
    recomputed one after the other count one after the other.

    Parameters
    ----------
    excluded
        Tensors that are held anyway, such as parameters.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {_storage(_local(tensor)) for tensor in excluded}
        self._holders: Counter[int] = Counter()
        self._hooks: torch.autograd.graph.saved_tensors_hooks | None = None
        self.held = 0
        self.peak = 0

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        storage = _storage(tensor)
        if storage in self._excluded:
            return kept
        size = tensor.untyped_storage().nbytes()
        self._holders[storage] += 1
        if self._holders[storage] == 1:
            self.held += size
            self.peak = max(self.peak, self.held)
        weakref.finalize(kept, self._release, storage, size)
        return kept

    def _release(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if self._holders[storage] == 0:
            self.held -= size


def state_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    here = [_local(x) for x in tensors if x is not None]
    sizes = {_storage(x): x.untyped_storage().nbytes() for x in here}
    return sum(sizes.values())


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """What an optimizer of Megatron keeps: moments, and the parameters that it steps on, chained ones included."""
    found: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", part)
        for group in getattr(inner, "param_groups", []):
            found += [parameter for parameter in group["params"] if isinstance(parameter, Tensor)]
        for values in getattr(inner, "state", {}).values():
            found += [value for value in values.values() if isinstance(value, Tensor)]
    return found


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded over several."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
