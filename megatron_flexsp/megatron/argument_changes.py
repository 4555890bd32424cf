"""Which of the job's arguments FlexSP sets itself, seen from outside of what sets them, so that none goes untold."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ArgumentChanges:
    """Arguments that were set, by name, with their last values."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    @contextmanager
    def seen(self, args: argparse.Namespace) -> Iterator[None]:
        """Around what changes arguments. Megatron's own validation stays outside: what it changes is Megatron's."""
        before = dict(vars(args))
        yield
        absent = object()
        for name, value in vars(args).items():
            was = before.get(name, absent)
            if was is absent or was != value:
                self.values[name] = value

    def print(self) -> None:
        """One line, where there are any."""
        if self.values:
            changed = ", ".join(f"{name}={value}" for name, value in sorted(self.values.items()))
            print(f" > [flexsp] arguments set to what it needs: {changed}")
