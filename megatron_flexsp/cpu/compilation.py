"""torch.compile does nothing: Megatron's fusions would take seconds, and a C++ compiler that may be missing."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_flexsp.cpu.replace import replaces


@replaces(torch)
def compile(model: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Gives back what it got; works as a function, as a decorator and as a decorator with options."""
    return model if model is not None else lambda function: function
