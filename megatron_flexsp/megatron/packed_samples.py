"""A sample that is a pack of sequences, as Megatron's SFTDataset gives it, taken apart again.

In: a dictionary with ``tokens``, ``labels``, ``loss_mask`` and ``cu_seqlens``. Out: where its sequences lie, without
what the model can learn nothing from.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.sequences import Stretch


@dataclass(frozen=True)
class Unpacking:
    """What a job asks of its packs."""

    longest: int
    """``--seq-length``: tokens of a sequence, at most."""

    positions_count: bool
    """Whether the model looks at ``position_ids``, which it does only where it learns positions."""

    unlearned_count: bool
    """Whether the end of a sequence does something though no label there counts: where experts are balanced by it."""


@dataclass(frozen=True)
class Pack:
    """One sample, taken apart."""

    tokens: NDArray[np.int32]
    """``[tokens]``, as the sample has them."""

    labels: NDArray[np.int32]
    """``[tokens]``; 0 where they don't count."""

    learned: NDArray[np.bool_]
    """``[tokens]``: which labels count."""

    starts: NDArray[np.int64]
    """``[sequences]``: where each begins."""

    lengths: NDArray[np.int64]
    """``[sequences]``: tokens of each, at least 1."""

    checksum: int
    """Of all of it."""

    @property
    def nbytes(self) -> int:
        """What it takes to keep it."""
        arrays = (self.tokens, self.labels, self.learned, self.starts, self.lengths)
        return sum(array.nbytes for array in arrays)

    def stretch(self, start: int, count: int) -> Stretch:
        """``count`` tokens from token ``start`` of the sample."""
        here = slice(start, start + count)
        return Stretch(self.tokens[here], self.labels[here], self.learned[here])


def unpack(sample: Any, how: Unpacking) -> Pack:
    """Take one sample apart.

    A sequence ends with the last of its labels that counts: attention is causal, so that nothing depends on what
    follows. Padding at the end of a sequence or of the sample goes, and so do sequences without a label that counts.

    Raises
    ------
    FlexSPError
        Where the sample is no pack, or not one that can be taken apart; says why, and leaves it to the caller to say
        which sample it is.
    """
    if not isinstance(sample, Mapping):
        raise FlexSPError(f"it is a {type(sample).__name__}, not a dictionary")
    tokens, labels = (_numbers(sample, name) for name in ("tokens", "labels"))
    mask = _numbers(sample, "loss_mask", whole=False)
    if not len(tokens) or {len(labels), len(mask)} != {len(tokens)}:
        raise FlexSPError(f"it has {len(tokens)} tokens, {len(labels)} labels and {len(mask)} numbers in loss_mask")
    learned = mask != 0
    if not np.array_equal(learned, mask):
        raise FlexSPError(
            "its loss_mask has other values than 0 and 1. Megatron divides by the tokens of a micro-batch in whole "
            "numbers, so that the loss would depend on the plan"
        )
    starts, lengths = _bounds(sample, len(tokens))
    longest = int(lengths.max(initial=0))
    if longest > how.longest:
        raise FlexSPError(f"a sequence of {longest:,} tokens is longer than --seq-length {how.longest:,}")
    counts_before = np.concatenate(([0], np.cumsum(learned)))
    within = counts_before[starts + lengths] - counts_before[starts]
    if int(within.sum()) != counts_before[-1]:
        raise FlexSPError("loss_mask counts labels that lie outside of the sequences of cu_seqlens")
    if not how.unlearned_count:
        places = np.flatnonzero(learned)
        lasts = counts_before[starts + lengths] - 1
        ends = starts if not len(places) else places[lasts] + 1
        lengths = np.where(within > 0, ends - starts, 0)
    kept = lengths > 0
    starts, lengths = starts[kept], lengths[kept]
    if how.positions_count and "position_ids" in sample:
        _check_positions(_numbers(sample, "position_ids"), starts, lengths, len(tokens))
    labels = np.where(learned, labels, 0)  # Megatron's own have -100 there
    whole = (tokens.astype(np.int32), labels.astype(np.int32), learned, starts, lengths)
    checksum = 0
    for array in whole:
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
    return Pack(*whole, checksum)


def _numbers(sample: Mapping[str, Any], name: str, whole: bool = True) -> NDArray[Any]:
    """A field as a row of numbers; one in front of others, as collating leaves it, makes no difference."""
    if sample.get(name) is None:
        raise FlexSPError(f"it has no {name}, but {', '.join(map(str, sample))}")
    array = np.asarray(sample[name])
    if array.size != max(array.shape, default=0):
        raise FlexSPError(f"its {name} has the shape {list(array.shape)}, and is to be a row of numbers")
    if whole and array.size and array.dtype.kind not in "iu":
        raise FlexSPError(f"its {name} are {array.dtype}, and are to be whole numbers")
    return array.reshape(-1)


def _bounds(sample: Mapping[str, Any], total: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each sequence begins and how many tokens it has; some may have none, as in padded ``cu_seqlens``.

    With ``cu_seqlens_padded`` sequence i begins where that says, and has as many tokens as ``cu_seqlens`` says.
    """
    ends = _ends(sample, "cu_seqlens", total)
    starts, lengths = ends[:-1], np.diff(ends)
    if sample.get("cu_seqlens_padded") is not None:
        padded = _ends(sample, "cu_seqlens_padded", total)
        if len(padded) != len(ends) or (np.diff(padded) < lengths).any():
            raise FlexSPError("its cu_seqlens_padded leaves less room for the sequences than cu_seqlens says they need")
        starts = padded[:-1]
    return starts, lengths


def _ends(sample: Mapping[str, Any], name: str, total: int) -> NDArray[np.int64]:
    ends = _numbers(sample, name).astype(np.int64)
    if len(ends) < 2 or ends[0] != 0 or (np.diff(ends) < 0).any():
        raise FlexSPError(f"its {name} doesn't count upwards from 0: {_some(ends)}")
    if ends[-1] > total:
        raise FlexSPError(f"its {name} ends at {ends[-1]}, and it has {total} tokens")
    return ends


def _check_positions(
    positions: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64], total: int
) -> None:
    if len(positions) != total:
        raise FlexSPError(f"it has {total} tokens and {len(positions)} position_ids")
    begins = np.cumsum(lengths) - lengths
    within = np.arange(lengths.sum()) - begins.repeat(lengths)
    if not np.array_equal(positions[within + starts.repeat(lengths)], within):
        raise FlexSPError("its position_ids don't count from 0 in each sequence of cu_seqlens")


def _some(numbers: NDArray[np.int64]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ..." if len(numbers) > 8 else shown
