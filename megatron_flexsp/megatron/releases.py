"""What differs between Megatron's releases, in one place.

Found by what is there and not by a version's number, which tells little: the dev branch calls itself 0.19.0 and has
other code. Tried on 0.17, 0.18, 0.19, main (0.20.0) and dev; the README has the table.

* Until 0.17 ``pretrain`` parses the command line itself, by names that ``megatron.training.initialize`` has bound.
  Since 0.18 the script does, through ``megatron.training.arguments``.
* Since 0.18 Megatron counts operations from the lengths that sequences report; before, from ``--seq-length``.
* Until 0.17 an interleaved pipeline frees a stage's output while its transfer to the next stage may still read it.
* Until 0.17 the SFT tokenizer expects of a chat template what ``transformers`` has given only before its version 5.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

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


@functools.cache
def frees_what_is_being_sent() -> bool:
    """Whether an interleaved pipeline may free an output before its transfer has read it.

    Nothing but the code tells: since 0.18 it waits for the transfer where outputs are to be freed. A newer release
    that says it in other words is taken for one that doesn't wait, which costs memory alone.
    """
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    source = inspect.getsource(schedules.forward_backward_pipelining_with_interleaving)
    return re.search(r"is not None and config\.deallocate_pipeline_outputs", source) is None


def keep_what_is_being_sent(model_chunks: list[Any]) -> None:
    """Keep the outputs of an interleaved pipeline's stages where Megatron would free them too early.

    One tensor of hidden states for each micro-batch in flight stays in memory until its backward pass.
    """
    if not frees_what_is_being_sent():
        return
    get_model_config = importlib.import_module("megatron.core.utils").get_model_config
    for chunk in model_chunks:
        get_model_config(chunk).deallocate_pipeline_outputs = False


def have_chat_templates_give_tokens(tokenizer: Any) -> None:
    """Have an SFT tokenizer's chat template give tokens alone, where Megatron relies on it.

    ``transformers`` does so by itself before version 5, and since then gives a dictionary unless told otherwise.
    """
    sft = getattr(tokenizer, "_tokenizer", None)
    if hasattr(sft, "_extract_token_ids"):  # reads both
        return
    plain = getattr(sft, "_tokenizer", None)
    if plain is not None and hasattr(plain, "apply_chat_template"):
        plain.apply_chat_template = functools.partial(type(plain).apply_chat_template, plain, return_dict=False)
