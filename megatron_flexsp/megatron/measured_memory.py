"""What memory of this job holds: measured steps of two sizes in, the constants of the fullest rank out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_flexsp.megatron.context import on_cpu
from megatron_flexsp.megatron.measured_steps import MeasuredBytes
from megatron_flexsp.runtime import Hosts

_USABLE_MEMORY = 0.94
"""Of a GPU's memory that nothing outside the allocator takes: the rest is for its fragments."""


Sizes = Sequence[tuple[int, MeasuredBytes]]


@dataclass(frozen=True)
class MemoryConstants:
    """In bytes."""

    budget: float
    state: float
    per_token: float
    """What a token of a slice takes, for each of the micro-batches that a pipeline holds at once."""
    recomputed_per_token: float = 0.0
    """The same where activations are recomputed, whatever the pipeline's others are; 0: not measured."""

    def capacity(self, in_flight: int) -> int:
        """Tokens that a rank can hold in one micro-batch."""
        return int((self.budget - self.state) / self.per_token) // in_flight


@dataclass(frozen=True)
class MeasuredMemory:
    """Steps of this rank: tokens of a slice, and the bytes of a step whose micro-batches have so many; of two sizes."""

    degree: int
    """Of all their micro-batches."""
    kept: Sizes
    """With as many micro-batches as a pipeline's fullest stage holds at once."""
    recomputed: Sizes = ()
    """The same, recomputed; none: nothing may be."""
    kept_alone: Sizes = ()
    """With a single micro-batch. None: there is no pipeline, or its stages are interleaved and never have just one."""
    recomputed_alone: Sizes = ()

    def records(self) -> list[dict[str, Any]]:
        """What the cost model's file keeps of it."""
        kinds = (
            (self.kept, False, False),
            (self.recomputed, True, False),
            (self.kept_alone, False, True),
            (self.recomputed_alone, True, True),
        )
        return [
            {
                "degree": self.degree,
                "tokens": tokens,
                "state_bytes": found.state,
                "activation_bytes": found.activations,
                "recomputed": recomputed,
                "alone": alone,
            }
            for sizes, recomputed, alone in kinds
            for tokens, found in sizes
        ]


def memory_constants(
    measured: Sequence[MeasuredMemory], in_flight: int, given_capacity: int, hosts: Hosts
) -> MemoryConstants:
    """Of the rank that is full first, on every rank, whatever degrees a plan uses. Collective.

    One pipeline stage has the vocabulary's matrices and logits, another one holds the most micro-batches: constants
    of different ranks must not be mixed.

    Parameters
    ----------
    measured
        This rank's steps, of each degree that was measured.
    in_flight
        Micro-batches that a pipeline's fullest stage holds at once.
    given_capacity
        Tokens of a micro-batch that the run was given, where no device limits them.
    """
    found = [_of_degree(each, in_flight, given_capacity, hosts) for each in measured]
    # Where no device limits them all degrees hold as much, and the one that needs most is the fullest.
    fullest = min(found, key=lambda each: (each.capacity(in_flight), -each.per_token))
    if not fullest.recomputed_per_token:
        return fullest
    fewest = min((each.budget - each.state) / each.recomputed_per_token for each in found)
    per_token = (fullest.budget - fullest.state) / max(fewest, 1.0)
    # Recomputing never takes more: without a gain, noise may say so.
    return replace(fullest, recomputed_per_token=min(per_token, fullest.per_token))


def _of_degree(measured: MeasuredMemory, in_flight: int, given_capacity: int, hosts: Hosts) -> MemoryConstants:
    """The same for one degree."""
    mine = _of_this_rank(measured.kept, in_flight, given_capacity)
    # Without a device's limit every rank fits exactly, and the one that needs most is the fullest.
    room = -mine.budget if on_cpu() else float(mine.capacity(in_flight))
    least = torch.tensor(room, dtype=torch.float64)
    hosts.all_reduce(least, dist.ReduceOp.MIN)
    rank = torch.tensor(dist.get_rank() if room == float(least) else dist.get_world_size())
    hosts.all_reduce(rank, dist.ReduceOp.MIN)
    figures = torch.zeros(3, dtype=torch.float64)
    if int(rank) == dist.get_rank():
        figures[:] = torch.tensor([mine.budget, mine.state, mine.per_token], dtype=torch.float64)
    hosts.all_reduce(figures, dist.ReduceOp.SUM)
    fullest = MemoryConstants(*figures.tolist())
    if not measured.recomputed:
        return fullest
    # Another rank may be full first there: the one with the logits.
    budget = fullest.budget if on_cpu() else mine.budget
    tokens = _recomputed_tokens(measured, in_flight, budget, fullest.capacity(in_flight))
    least = torch.tensor(tokens, dtype=torch.float64)
    hosts.all_reduce(least, dist.ReduceOp.MIN)
    per_token = (fullest.budget - fullest.state) / (max(float(least), 1.0) * in_flight)
    return replace(fullest, recomputed_per_token=per_token)


def _recomputed_tokens(measured: MeasuredMemory, in_flight: int, budget: float, kept_tokens: int) -> float:
    """Tokens that this rank can hold in one recomputed micro-batch, whatever the others are that it holds.

    In its backward pass a recomputed micro-batch has a layer's activations beside the layers' inputs. Where all are
    recomputed, one at a time does. But the others that a pipeline holds meanwhile may be kept, and of ``kept_tokens``.
    """
    state, all_recomputed = _state_and_slope(measured.recomputed)
    most = (budget - state) / all_recomputed
    if in_flight == 1:
        return most
    kept_state, all_kept = _state_and_slope(measured.kept)
    if measured.recomputed_alone:
        alone_state, alone = _state_and_slope(measured.recomputed_alone)
        others = max(0.0, all_kept - _state_and_slope(measured.kept_alone)[1])
    else:  # at most as much as all of them, and as on the stage that holds the most
        alone_state, alone = state, all_recomputed
        others = all_kept * (1 - 1 / in_flight)
    return min(most, (budget - max(kept_state, alone_state) - others * kept_tokens) / alone)


def _state_and_slope(measured: Sizes) -> tuple[float, float]:
    """Bytes that are there whatever micro-batches hold, and those that a further token in each of them takes."""
    (few, small), (many, large) = measured
    if many == few:  # too small a job to tell; all of it is the tokens'
        slope, fixed = large.activations / many, 0.0
    else:
        slope = (large.activations - small.activations) / (many - few)
        fixed = max(0.0, large.activations - slope * many)
    return large.state + fixed, max(slope, 1.0)


def _of_this_rank(measured: Sizes, in_flight: int, given_capacity: int) -> MemoryConstants:
    state, slope = _state_and_slope(measured)
    per_token = slope / in_flight
    if on_cpu():
        # No limit to measure: the budget says what the run was given.
        return MemoryConstants(state + per_token * (given_capacity * in_flight + 0.5), state, per_token)
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return MemoryConstants(_USABLE_MEMORY * (total - outside), state, per_token)
