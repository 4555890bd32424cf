"""The recipes that Megatron makes from its flags. Nothing here computes in 8 bits."""

from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class _Recipe:
    def __init__(self, fp8_format: Format, **kwargs: Any) -> None:
        self.fp8_format = fp8_format


class DelayedScaling(_Recipe):
    pass


class Float8CurrentScaling(_Recipe):
    pass


class MXFP8BlockScaling(_Recipe):
    pass
