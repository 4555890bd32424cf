"""What differs between Megatron's releases, in one place.

Found by what is there and not by a version's number, which tells little: the dev branch calls itself 0.19.0 and has
other code. Tried on 0.17, 0.18, 0.19, main (0.20.0) and dev; the README has the table.

* Until 0.17 ``pretrain`` parses the command line itself, by names that ``megatron.training.initialize`` has bound.
  Since 0.18 the script does, through ``megatron.training.arguments``.
* Since 0.18 Megatron counts operations from the lengths that sequences report; before, from ``--seq-length``.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

OLDEST, NEWEST = (0, 17), (0, 20)
"""The first and the last minor release that were tried."""

RANGE = ".".join(map(str, OLDEST)) + " to " + ".".join(map(str, NEWEST))


def minor_release(version: str) -> tuple[int, int] | None:
    """``(0, 19)`` of ``0.19.2+local``; None if a fork numbers itself in some other way."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return None if found is None else (int(found[1]), int(found[2]))


def places_of(function: str) -> list[str]:
    """Where Megatron looks up ``parse_args`` or ``validate_args``, as targets of seams."""
    modules = ("megatron.training.arguments", "megatron.training.initialize")
    return [f"{module}:{function}" for module in modules if hasattr(importlib.import_module(module), function)]


def sequences_report_lengths() -> bool:
    """Whether Megatron asks each sequence for its length, to count operations."""
    return hasattr(importlib.import_module("megatron.training.training"), "update_seqlen_stats_from_cu_seqlens")


def count_operations(
    of_equal_lengths: Callable[[argparse.Namespace, int], float], args: argparse.Namespace, lengths: NDArray[np.integer]
) -> float:
    """Floating-point operations of sequences of these lengths, by a Megatron that knows only equal ones.

    ``of_equal_lengths(args, number)`` counts sequences of ``args.seq_length`` tokens. Its result for one of them is
    ``linear x length + square x length^2``, since attention alone grows faster than the length.
    """

    def of_one(length: int) -> float:
        return of_equal_lengths(argparse.Namespace(**{**vars(args), "seq_length": length}), 1)

    length = args.seq_length
    once, twice = of_one(length), of_one(2 * length)
    square = (twice - 2 * once) / (2 * length**2)
    linear = once / length - square * length
    lengths = lengths.astype(np.float64)
    return float(linear * lengths.sum() + square * (lengths**2).sum())
