"""How far measuring has come: a bar on a terminal, elsewhere a line for each stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[str, float], None]
"""Tells which stage is under way, and how much of it is done, 0 to 1."""

STAGES = {"memory": 0.04, "all-to-alls": 0.04, "warm-up": 0.1, "steps": 0.82}
"""In order, with the share of the time that each takes."""


class StagesShown:
    """Shows stages on standard error's terminal; without one, hands a line for each to ``tell``.

    Parameters
    ----------
    shows
        False on all ranks but one.
    tell
        Prints a line.
    """

    def __init__(self, shows: bool, tell: Callable[[str], None]) -> None:
        console = Console(stderr=True)
        self._on_terminal = shows and console.is_terminal
        self._tells = shows and not self._on_terminal
        self._tell = tell
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not self._on_terminal, transient=True)
        self._task = self._bar.add_task("profiling", total=1.0)
        self._stage = ""

    def __enter__(self) -> Show:
        self._bar.start()
        return self._show

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def _show(self, stage: str, part: float) -> None:
        names = list(STAGES)
        done = sum(STAGES[name] for name in names[: names.index(stage)]) + STAGES[stage] * part
        self._bar.update(self._task, completed=done, description=f"profiling: {stage}")
        if stage != self._stage and self._tells:
            self._tell(f" > [flexsp] profiling: {stage}")
        self._stage = stage
