"""8 bits that round nothing: what they ask of shapes, and when they reduce, are those of the real ones."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transformer_engine.common.recipe import DelayedScaling, MXFP8BlockScaling


class FP8GlobalStateManager:
    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextmanager
def _running(recipe: Any, group: Any) -> Iterator[None]:
    outer, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, recipe
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = outer
    if isinstance(recipe, DelayedScaling) and torch.is_grad_enabled() and dist.get_world_size(group) > 1:
        dist.all_reduce(torch.zeros(1), dist.ReduceOp.MAX, group=group)


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Any:
    return _running(fp8_recipe, fp8_group) if enabled else nullcontext()


def fp8_model_init(enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False) -> Any:
    assert not enabled
    return nullcontext()


def assert_dim_for_fp8_exec(*tensors: Tensor) -> None:
    """What the kernels of the recipe in force can multiply; anything without one."""
    recipe = FP8GlobalStateManager.recipe
    if recipe is None:
        return
    rows = 32 if isinstance(recipe, MXFP8BlockScaling) else 8
    for tensor in tensors:
        assert math.prod(tensor.shape[:-1]) % rows == 0 and tensor.shape[-1] % 16 == 0, tuple(tensor.shape)
