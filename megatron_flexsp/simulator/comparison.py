"""Ways to train on the same batches, side by side: what each step would take, and what it would waste."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.errors import named_by_flags
from megatron_flexsp.planner import CostModel, Plan, legal_degrees, micro_batch_seconds, padding_share, plan
from megatron_flexsp.simulator.events import Timeline, simulate
from megatron_flexsp.simulator.stragglers import Stragglers

RECOMPUTING = ("static-recompute", "lockstep-recompute", "nested-recompute")
"""Static groups in a run that recomputes everything, as long contexts often make people do; and plans that recompute
only where it pays."""

STATIC = ("static", "static-recompute")
STRATEGIES = ("static", "batch-adaptive", "lockstep", "nested", *RECOMPUTING)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What batches are planned for and run on."""

    cost_model: CostModel
    domain_size: int
    degrees: tuple[int, ...] | None = None
    """Degrees that plans may use; None for all that the cost model prices."""

    static_degree: int | None = None
    """The degree of the static strategy; None for the narrowest that holds the longest sequence."""

    token_capacity: int | None = None
    """Tokens that a rank can hold in a micro-batch; None for what the cost model says."""

    recomputed_token_capacity: int | None = None
    """Tokens that a rank can hold in a recomputed micro-batch; None: no strategy may recompute."""

    pipeline_stages: int = 1
    reduction_seconds: float = 0.0
    stragglers: Stragglers | None = None
    time_limit_seconds: float | None = None
    """Of planning one batch."""

    seed: int = 0

    def costs(self, strategy: str) -> CostModel:
        """What micro-batches cost under a strategy."""
        return self.cost_model.always_recomputed() if strategy == "static-recompute" else self.cost_model

    def planned(self, lengths: ArrayLike, strategy: str, *, static_degree: int | None = None) -> Plan:
        """A batch's plan under a strategy."""
        everything = strategy == "static-recompute"
        with named_by_flags({"token_capacity": "`recomputed_token_capacity`"} if everything else {}):
            return plan(
                lengths,
                self.costs(strategy),
                self.domain_size,
                schedule=strategy.removesuffix("-recompute"),
                degrees=self.degrees,
                static_degree=static_degree,
                token_capacity=self.recomputed_token_capacity if everything else self.token_capacity,
                recomputed_token_capacity=self.recomputed_token_capacity if strategy in RECOMPUTING[1:] else None,
                pipeline_stages=self.pipeline_stages,
                time_limit_seconds=self.time_limit_seconds,
                seed=self.seed,
            )


@dataclass
class Outcome:
    """What a strategy made of a row of batches."""

    strategy: str
    tokens: int = 0
    step_seconds: list[float] = field(default_factory=list)
    busy_shares: list[float] = field(default_factory=list)
    padding_shares: list[float] = field(default_factory=list)
    bound_ratios: list[float] = field(default_factory=list)
    """Predicted seconds over the lower bound of the same schedule."""

    solve_seconds: list[float] = field(default_factory=list)

    def add(self, made: Plan, lengths: NDArray[np.int64], timeline: Timeline) -> None:
        """Count one more step."""
        self.tokens += int(lengths.sum())
        self.step_seconds.append(timeline.step_seconds)
        self.busy_shares.append(timeline.busy_share)
        self.padding_shares.append(padding_share(made, lengths))
        if made.lower_bound_seconds > 0:
            self.bound_ratios.append(made.predicted_seconds / made.lower_bound_seconds)
        self.solve_seconds.append(made.solve_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Over all batches."""
        return self.tokens / sum(self.step_seconds)

    def speed_over(self, other: Outcome) -> float:
        """How many times as many tokens a second as another strategy on the same batches."""
        return sum(other.step_seconds) / sum(self.step_seconds)

    def speeds_over(self, other: Outcome) -> NDArray[np.float64]:
        """The same batch by batch."""
        return np.array(other.step_seconds) / np.array(self.step_seconds)


def compare(
    batches: Sequence[NDArray[np.int64]], strategies: Sequence[str], cluster: Cluster
) -> Iterator[tuple[str, int, Plan, Timeline]]:
    """Plan and run every batch under every strategy; ``Outcome.add`` sums up what comes.

    Yields
    ------
    Strategy, number of the batch, its plan and its step.

    Raises
    ------
    FlexSPError
        Where a batch can't be planned: a sequence that no group holds, a degree without a bandwidth.
    """
    longest = max(int(batch.max()) for batch in batches)
    for number, batch in enumerate(batches):
        slowdowns = None
        if cluster.stragglers is not None:
            slowdowns = cluster.stragglers.slowdowns(cluster.domain_size, cluster.pipeline_stages, number)
        for strategy in strategies:
            degree = static_degree_for(longest, cluster, strategy) if strategy in STATIC else None
            made = cluster.planned(batch, strategy, static_degree=degree)
            timeline = simulate(
                made,
                micro_batch_seconds(made, batch, cluster.costs(strategy)),
                pipeline_stages=cluster.pipeline_stages,
                slowdowns=slowdowns,
                reduction_seconds=cluster.reduction_seconds,
            )
            yield strategy, number, made, timeline


def holds_without_recomputing(batches: Sequence[NDArray[np.int64]], cluster: Cluster) -> bool:
    """Whether some group can hold the longest sequence with its activations kept."""
    longest = max(int(batch.max()) for batch in batches)
    degrees = cluster.degrees or legal_degrees(cluster.domain_size)
    priced = [degree for degree in degrees if degree in {1, *cluster.cost_model.exchange_bandwidth_bytes_per_second}]
    capacity = cluster.cost_model.token_capacity if cluster.token_capacity is None else cluster.token_capacity
    return longest <= max(priced, default=1) * capacity


def static_degree_for(longest: int, cluster: Cluster, strategy: str = "static") -> int:
    """The one degree of a static strategy: as given, or the narrowest that holds the longest sequence of all."""
    if cluster.static_degree is not None and strategy == "static":
        return cluster.static_degree
    return max(item.degree for item in cluster.planned([longest], strategy).micro_batches)
