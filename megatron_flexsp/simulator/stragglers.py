"""Ranks that are slow for a step, drawn at random: what a plan loses to a cluster that is not as it was measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError


@dataclass(frozen=True)
class Stragglers:
    """In every step each rank is slow with the same chance, whatever it was before.

    Raises
    ------
    FlexSPError
        If the share is no share, or the slowdown is below 1.
    """

    share: float
    """Of the ranks that are slow in a step, on average; 0 to 1."""

    slowdown: float
    """How many times longer a slow rank takes."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise FlexSPError(f"the share of stragglers is {self.share}; expected 0 to 1")
        if not self.slowdown >= 1:
            raise FlexSPError(f"the slowdown of stragglers is {self.slowdown}; expected at least 1")

    def slowdowns(self, domain_size: int, pipeline_stages: int, step: int) -> NDArray[np.float64]:
        """Each rank's factor in a step, shape (domain, stages); the same for the same seed and step."""
        drawn = np.random.default_rng((self.seed, step)).random((domain_size, pipeline_stages))
        return np.where(drawn < self.share, self.slowdown, 1.0)
