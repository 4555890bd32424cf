"""One thing that FlexSP can't be combined with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from megatron_flexsp.errors import FlexSPError


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Something in a job's arguments that FlexSP can't be combined with."""

    flags: tuple[str, ...]
    """Every command line flag that can bring it about; the first is the one to name."""

    subject: str
    """What is refused, in the words of an error message: flags, and the values that matter."""

    reason: str

    remedy: str = ""
    """What to do, as in ``FlexSPError``; empty where there is nothing but to leave the flag out or FlexSP off."""

    mendable: bool = False
    """Whether setting or taking out the flags leaves the job what it was, so that ``flexsp convert`` may do it."""

    applies: Callable[[argparse.Namespace], object]
    """Whether a job has it; any true or false value."""

    @property
    def problem(self) -> FlexSPError:
        """The refusal as an error: subject and reason, and the remedy."""
        return FlexSPError(f"{self.subject}: {self.reason}", self.remedy)
