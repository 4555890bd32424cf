"""Global batches out of a corpus: the sequences that training makes of its documents, cut into batches."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError

Lengths = NDArray[np.int64]

OVERLONG = ("split", "truncate", "drop")


def with_longest(lengths: Lengths, longest: int | None, overlong: str) -> Lengths:
    """The sequences that training makes of documents when none may be longer than ``longest`` tokens.

    Parameters
    ----------
    lengths
        Tokens of each document.
    longest
        ``--seq-length``; None leaves documents as they are.
    overlong
        What becomes of longer ones, as ``--flexsp-overlong``: ``split`` into pieces of which all but the last are
        full, ``truncate`` or ``drop``.
    """
    if longest is None:
        return lengths
    if overlong == "drop":
        return lengths[lengths <= longest]
    if overlong == "truncate":
        return np.minimum(lengths, longest)
    pieces = -(-lengths // longest)
    split = np.full(int(pieces.sum()), longest, dtype=np.int64)
    split[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * longest
    return split


@dataclass(frozen=True)
class BatchSource:
    """Batches out of a corpus.

    A text file's lengths stand in the order in which they will be trained on. Megatron shuffles a data set's
    documents, and so does this, with a seed.
    """

    lengths: Lengths
    name: str
    """What errors call it."""

    shuffle_seed: int | None

    def batches(self, size: int, count: int | None = None, skip: int = 0) -> list[Lengths]:
        """``count`` consecutive batches of ``size`` sequences after the first ``skip``; None for all that there are.

        Raises
        ------
        FlexSPError
            If there are fewer, or none.
        """
        whole = len(self.lengths) // size
        holds = f"{self.name} holds {len(self.lengths)} sequences, {whole} batches of --global-batch-size {size}"
        if whole == 0:
            raise FlexSPError(holds, "give more sequences or a smaller batch")
        if skip >= whole:
            raise FlexSPError(f"{holds}; none is left after --skip-batches {skip}", "skip fewer")
        if count is not None and skip + count > whole:
            after = f" after --skip-batches {skip}" if skip else ""
            raise FlexSPError(
                f"{holds}; --batches {count}{after} asks for more", f"ask for {whole - skip} or fewer, or leave it out"
            )
        order = self._in_order()
        last = whole if count is None else skip + count
        return [order[number * size : (number + 1) * size] for number in range(skip, last)]

    def drawn(self, size: int, count: int, seed: int) -> list[Lengths]:
        """``count`` batches of sequences drawn at random, each as often as it comes: for batches of any size."""
        generator = np.random.default_rng(seed)
        return [generator.choice(self.lengths, size) for _ in range(count)]

    def _in_order(self) -> Lengths:
        if self.shuffle_seed is None:
            return self.lengths
        return np.random.default_rng(self.shuffle_seed).permutation(self.lengths)
