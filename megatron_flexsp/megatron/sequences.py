"""What planning and reading ask of a run's data, whatever its samples are: sequences, and stretches of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_flexsp.megatron.plan_channel import PlanChannel


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one sequence, and what the model shall make of each."""

    tokens: NDArray[np.integer]
    """``[count]``"""

    labels: NDArray[np.integer]
    """``[count]``: what is predicted from each token and those before it."""

    learned: NDArray[np.bool_] | None
    """``[count]``: which labels count; None: all."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of some samples, in the order that plans number them in."""

    lengths: NDArray[np.int64]
    """Tokens of each; as many are predicted."""

    handles: Sequence[Any]
    """What their source calls each of them."""

    samples: int
    """How many samples they are from: as many as sequences, unless a sample holds several."""

    def chosen(self, which: NDArray[np.bool_]) -> Sequences:
        """Those of them that are marked."""
        places = np.flatnonzero(which)
        return Sequences(self.lengths[places], [self.handles[place] for place in places.tolist()], len(places))


class TokenSource(Protocol):
    """Where tokens come from."""

    def prepare(self, handles: Iterable[Any]) -> None:
        """Is told of which sequences stretches are asked for next."""

    def stretch(self, handle: Any, start: int, count: int) -> Stretch:
        """``count`` tokens of a sequence from ``start``, with their labels."""

    def learned(self, handle: Any, length: int) -> NDArray[np.bool_] | None:
        """Which labels of a whole sequence of so many tokens count; None: all."""


class SequenceSource(TokenSource, Protocol):
    """The samples of one split."""

    has_index: bool
    """Whether every rank knows all lengths from an index. If not, samples are read for them by ranks that must tell
    each other, as also where one of them fails."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def parts(self) -> Sequence[DataSet]:
        """The data sets behind it."""

    def __len__(self) -> int:
        """Samples that there are."""

    def sequences(self, samples: Sequence[int], channel: PlanChannel) -> Sequences:
        """What becomes of these samples. Collective: every rank asks for the same ones."""


class DataSet(Protocol):
    """What start-up asks of a data set."""

    name: str

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that may come."""

    def describe(self) -> str:
        """One line for the log."""
