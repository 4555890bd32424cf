"""Sequence lengths in a text file, the tokens of one sequence on each line."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError


def read_lengths(path: Path) -> NDArray[np.int64]:
    """The lengths in a text file, one on each line; empty lines are skipped.

    Raises
    ------
    FlexSPError
        If the file is no text or a line holds no whole number of at least 1; names the line.
    """
    lengths = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FlexSPError(
            f"{path}: not UTF-8 text; expected the tokens of one sequence on each line"
            + ("; flexsp simulate takes a data set by --data-path" if path.suffix in (".idx", ".bin") else "")
        ) from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tokens = int(line)
        except ValueError:
            tokens = 0
        if tokens < 1:
            raise FlexSPError(f"{path}: line {number} is {line.strip()[:40]!r}; expected a whole number of at least 1")
        lengths.append(tokens)
    return np.array(lengths, dtype=np.int64)
