"""Documents that no file holds, for ``--mock-data``: given lengths, tokens that a model can learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError

_DOCUMENTS = 65_536
_LOGNORMAL_KEYS = ("mean", "sigma", "min", "max")


class MockDocuments:
    """Documents of given lengths; document d counts upwards from d, modulo the vocabulary."""

    def __init__(self, predicted_tokens: NDArray[np.int64], vocabulary: int) -> None:
        self._tokens = predicted_tokens + 1
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        return len(self._tokens)

    def token_counts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of the documents."""
        return self._tokens[documents]

    def read(self, document: int, start: int, count: int) -> NDArray[Any]:
        """``count`` tokens of a document from ``start``."""
        return (document + np.arange(start, start + count)) % self._vocabulary


def mock_lengths(spec: str | None, sequence_length: int, seed: int) -> NDArray[np.int64]:
    """Sequence lengths from ``--flexsp-mock-lengths``; without it, every sequence has ``--seq-length`` tokens.

    Raises
    ------
    FlexSPError
        If the specification or the file makes no lengths.
    """
    if spec is None:
        return np.full(_DOCUMENTS, sequence_length, dtype=np.int64)
    name, _, rest = spec.partition(":")
    if name == "lognormal":
        return _lognormal(rest, seed)
    return _from_file(spec)


def _lognormal(text: str, seed: int) -> NDArray[np.int64]:
    words = dict(word.partition("=")[::2] for word in text.split(","))
    try:
        mean, sigma, least, most = (float(words.pop(key)) for key in _LOGNORMAL_KEYS)
        if words or not (0 < least <= mean <= most < np.inf and 0 <= sigma < np.inf):
            raise ValueError
    except (KeyError, ValueError):
        raise FlexSPError(
            f"--flexsp-mock-lengths lognormal:{text}: expected mean, sigma, min and max with 0 < min <= mean <= max, "
            "and sigma >= 0",
            "write it as lognormal:mean=1024,sigma=1.5,min=128,max=8192",
        ) from None
    # mean is the mean of the lengths themselves, before they are cut to [min, max].
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, _DOCUMENTS)
    return np.clip(np.rint(draws), least, most).astype(np.int64)


def _from_file(path: str) -> NDArray[np.int64]:
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise FlexSPError(
            f"--flexsp-mock-lengths {path}: neither lognormal:... nor a file that can be read ({error})",
            "give one or the other",
        ) from None
    try:
        lengths = np.array([int(word) for word in words], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise FlexSPError(
            f"--flexsp-mock-lengths {path}: not all lines are lengths ({error})", "write one length on each line"
        ) from None
    if not len(lengths) or lengths.min() < 1:
        raise FlexSPError(f"--flexsp-mock-lengths {path}: needs lengths of at least 1", "correct the file")
    return lengths
