"""The figures of a run of steps, out of what ``train.py`` reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


class Summary:
    """Means over steps of one schedule; sums over ranks where nothing else is said."""

    def __init__(self, steps: Sequence[dict[str, Any]]) -> None:
        self._steps = steps
        self._seconds = sum(step["seconds"] for step in steps)
        self._tokens = sum(step["tokens"] for step in steps)

    @property
    def seconds(self) -> float:
        """A step's."""
        return float(self._seconds / len(self._steps))

    @property
    def tokens_per_second(self) -> float:
        """As measured."""
        return float(self._tokens / self._seconds)

    @property
    def predicted_tokens_per_second(self) -> float:
        """As the plans foresaw."""
        return float(self._tokens / sum(step["predicted_seconds"] for step in self._steps))

    @property
    def padding_share(self) -> float:
        """Of all tokens that ran."""
        return float(np.mean([step["padding_share"] for step in self._steps]))

    @property
    def micro_batches(self) -> float:
        """Micro-batches of a plan."""
        return float(np.mean([len(step["plan"]["micro_batches"]) for step in self._steps]))

    @property
    def tokens_by_degree(self) -> dict[int, float]:
        """The share of all tokens that ran in groups of so many ranks."""
        tokens: Counter[int] = Counter()
        for step in self._steps:
            for item in step["plan"]["micro_batches"]:
                tokens[item["degree"]] += sum(step["lengths"][k] for k in item["sequences"])
        return {degree: count / self._tokens for degree, count in sorted(tokens.items()) if count}

    @property
    def recomputed_share(self) -> float:
        """The share of all tokens that ran in micro-batches that recompute their activations."""
        tokens = sum(
            step["lengths"][k]
            for step in self._steps
            for item in step["plan"]["micro_batches"]
            if item.get("recomputed")
            for k in item["sequences"]
        )
        return float(tokens / self._tokens)

    @property
    def exchange_cpu_share(self) -> float:
        """The part of the ranks' processor time that all-to-all took."""
        return self._sum("exchange_cpu_seconds") / self._sum("cpu_seconds")

    @property
    def compute_cpu_seconds(self) -> float:
        """Processor time that a step took outside of all-to-all."""
        return (self._sum("cpu_seconds") - self._sum("exchange_cpu_seconds")) / len(self._steps)

    @property
    def exchange_share(self) -> float:
        """The part of the step that a rank spends in all-to-all, from call to return."""
        return self._sum("exchange_seconds") / self.ranks / self._seconds

    @property
    def link_bytes(self) -> float:
        """What a step's all-to-all sends from one host to the other, the busier way."""
        half = self.ranks // 2
        ways = [(step["exchange_link_bytes"][:half], step["exchange_link_bytes"][half:]) for step in self._steps]
        return float(np.mean([max(map(sum, both)) for both in ways]))

    @property
    def waited_share(self) -> float:
        """The part of the step that the slowest rank waits for plans and data."""
        waits = (max(step["waited_for_plan_seconds"]) + max(step["waited_for_data_seconds"]) for step in self._steps)
        return float(sum(waits) / self._seconds)

    @property
    def planning_seconds(self) -> float:
        """Of a plan, beside the training."""
        return float(np.mean([step["plan"]["solve_seconds"] for step in self._steps]))

    @property
    def ranks(self) -> int:
        """Of the job."""
        return len(self._steps[0]["cpu_seconds"])

    def _sum(self, figure: str) -> float:
        return float(sum(sum(step[figure]) for step in self._steps))
