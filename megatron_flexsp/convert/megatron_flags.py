"""Megatron's own arguments by name: which flag sets each, and what it takes. From a table, so without Megatron."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

DIFFERS = "?"
"""The default of an argument whose default isn't the same in all releases."""


@dataclass(frozen=True)
class Flag:
    """One row of the table."""

    name: str
    """Of the attribute that Megatron reads."""
    how: str
    """``on`` and ``off`` take no value, ``both`` is ``--x`` or ``--no-x``, ``one`` and ``many`` take values; a
    ``field`` of the model's configuration has no flag."""
    default: Any
    flag: str
    releases: str
    """Those that have it, if not all."""

    @property
    def is_switch(self) -> bool:
        return self.how in ("on", "off", "both")


@functools.cache
def flags_by_name() -> dict[str, tuple[Flag, ...]]:
    """All rows of each name; flags that all releases have stand first."""
    text = resources.files(__package__).joinpath("megatron_flags.txt").read_text()
    found: dict[str, tuple[Flag, ...]] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, how, default, flag, *releases = line.split(" ")
        row = Flag(name, how, DIFFERS if default == DIFFERS else json.loads(default), flag, "".join(releases))
        found[name] = (*found.get(name, ()), row)
    return {
        name: tuple(sorted(rows, key=lambda row: (row.how == "field", row.releases))) for name, rows in found.items()
    }


@functools.cache
def names_of_flags() -> dict[str, str]:
    """The attribute that each flag sets to its value or to true, by the flag's own name in Python's spelling."""
    rows = (row for rows in flags_by_name().values() for row in rows if row.how not in ("field", "off"))
    return {row.flag[2:].replace("-", "_"): row.name for row in rows}


@functools.cache
def all_flags() -> frozenset[str]:
    """Every flag of every release."""
    return frozenset(row.flag for rows in flags_by_name().values() for row in rows if row.how != "field")
