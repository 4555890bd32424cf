"""Packs whose content says where it is from."""

from typing import Any

import numpy as np


class Packs:
    """Sample n is a pack of n sequences, of 1 to n tokens; it remembers what was read."""

    def __init__(self, *, learned: bool = True, broken: int | None = None) -> None:
        self.reads: list[int] = []
        self._learned, self._broken = learned, broken

    def __len__(self) -> int:
        return 9

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.reads.append(number)
        if number == self._broken:
            raise OSError("a disk is gone")
        ends = np.cumsum(np.arange(number + 1))
        tokens = np.arange(ends[-1]) + 100 * number
        mask = np.full(ends[-1], float(self._learned))
        return {"tokens": tokens, "labels": tokens + 7, "loss_mask": mask, "cu_seqlens": ends}
