"""The documents that quickstart and benchmarks train on: one text, Python's standard library, in several lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.model import CONTEXT_TOKENS, ROOT
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.prepare import DatasetSummary, Record, StandardLibrary, write_dataset

QUANTILES = ROOT / "configs" / "wikipedia_length_quantiles.txt"
_SEED = 1234
_DOCUMENTS = 20_000
_WEB_SIGMA = 1.2
_WIKIPEDIA_SHARE = 4
"""Articles are cut to one part in so many: the longest that 2 cores bear is 4,096 tokens."""

Lengths = NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """What a job trains on."""

    name: str
    title: str
    records: Callable[[], Iterator[Record]]
    documents_per_step: int

    def prepare(self, folder: Path) -> tuple[Path, DatasetSummary | None]:
        """Make the data set unless it is there; returns its prefix, and what was made."""
        prefix = folder / self.name
        if prefix.with_suffix(".idx").exists():
            return prefix, None
        folder.mkdir(parents=True, exist_ok=True)
        # The index is put there last: a data file without one is the rest of an interrupted run.
        prefix.with_suffix(".bin").unlink(missing_ok=True)
        return prefix, write_dataset(self.records(), prefix)


def source_files(documents_per_step: int) -> Corpus:
    """The source files of Python's standard library, as they are."""
    title = "Source files of Python's standard library, as they are"
    return Corpus("files", title, lambda: iter(StandardLibrary()), documents_per_step)


def web_lengths(documents_per_step: int, mean_tokens: int = 300, longest_tokens: int = CONTEXT_TOKENS) -> Corpus:
    """Lognormal lengths, most of them short."""

    def lengths() -> Lengths:
        generator = np.random.default_rng(_SEED)
        draws = generator.lognormal(np.log(mean_tokens) - _WEB_SIGMA**2 / 2, _WEB_SIGMA, _DOCUMENTS)
        return np.clip(np.rint(draws), 16, longest_tokens).astype(np.int64)

    title = "The same text, cut to web-like lengths"
    return Corpus("web_lengths", title, lambda: cut(lengths()), documents_per_step)


def wikipedia_lengths(documents_per_step: int, file: Path | None = None) -> Corpus:
    """A quarter of the lengths of Wikipedia's articles, those left out that are still too long.

    ``file`` has one length on each line; without it, lengths are drawn by the quantiles in ``configs/``.
    """

    def lengths() -> Lengths:
        generator = np.random.default_rng(_SEED)
        if file is not None:
            drawn = generator.permutation(_read(file))[:_DOCUMENTS]
        else:
            table = _read(QUANTILES)
            places = generator.uniform(0, len(table) - 1, _DOCUMENTS)
            drawn = np.exp(np.interp(places, np.arange(len(table)), np.log(table)))
        scaled = np.maximum(drawn / _WIKIPEDIA_SHARE, 2).astype(np.int64)
        return scaled[scaled <= CONTEXT_TOKENS]

    title = "The same text, cut to a quarter of Wikipedia's lengths"
    return Corpus("wikipedia_lengths", title, lambda: cut(lengths()), documents_per_step)


def cut(lengths: Lengths) -> Iterator[Record]:
    """The standard library's text in documents of these lengths, in an order that has nothing to do with it."""
    text = b"".join(record.text for record in StandardLibrary())
    begins = np.random.default_rng(_SEED).permutation(np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    for begin, length in zip(begins, lengths, strict=True):
        start = begin % len(text)
        document = text[start : start + length]
        yield Record(document, len(document))


def _read(file: Path) -> Lengths:
    try:
        found = np.loadtxt(file, dtype=np.int64, ndmin=1)
    except (OSError, ValueError) as error:
        raise FlexSPError(f"{file}: expected a text file with one length on each line ({error})") from None
    if not len(found) or found.min() < 1:
        raise FlexSPError(f"{file}: expected lengths of at least 1")
    return found
