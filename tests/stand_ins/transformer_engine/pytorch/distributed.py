"""What Megatron imports of this module; without 8 bits and CUDA graphs it calls none of it."""

from typing import Any


class CudaRNGStatesTracker:
    pass


class activation_recompute_forward:
    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False) -> None:
        raise NotImplementedError


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError
