"""Recomputation. Of CUDA graphs Megatron imports a name and calls nothing."""

from typing import Any

import torch.utils.checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class CudaRNGStatesTracker:
    pass


class activation_recompute_forward:
    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False) -> None:
        raise NotImplementedError


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    assert not kwargs.pop("distribute_saved_activations")
    del kwargs["get_rng_state_tracker"], kwargs["tp_group"]
    recipe = FP8GlobalStateManager.recipe

    def in_the_same_recipe(*args: Any) -> Any:
        outer, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, recipe
        try:
            return function(*args)
        finally:
            FP8GlobalStateManager.recipe = outer

    return torch.utils.checkpoint.checkpoint(in_the_same_recipe, *args, use_reentrant=False, **kwargs)
