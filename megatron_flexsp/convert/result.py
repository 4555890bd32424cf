"""What a conversion gives, and how it says that there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_flexsp.convert.text import Edit
from megatron_flexsp.errors import FlexSPError


@dataclass(frozen=True)
class Result:
    """A converted file."""

    data: bytes
    reasons: list[str]
    """One line for each change."""
    notes: list[str]
    """One line for each thing to know that isn't a change."""
    edits: list[Edit] = field(default_factory=list)
    """What was done to the file."""
    as_list: bool = False
    """Whether it became a list of arguments, whatever it was."""


class Unconvertible(FlexSPError):
    """A file that can't be converted, with every reason."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n  ".join(problems))
        self.problems = list(problems)
