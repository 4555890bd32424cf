"""What memory of this job holds: measured steps of two sizes in, the constants of the fullest rank out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_flexsp.megatron.context import on_cpu
from megatron_flexsp.megatron.measured_steps import MeasuredBytes
from megatron_flexsp.runtime import Hosts

_USABLE_MEMORY = 0.94
"""Of a GPU's memory that nothing outside the allocator takes: the rest is for its fragments."""


@dataclass(frozen=True)
class MemoryConstants:
    """In bytes."""

    budget: float
    state: float
    per_token: float
    """What a token of a slice takes, for each of the micro-batches that a pipeline holds at once."""
    recomputed_per_token: float = 0.0
    """The same where activations are recomputed; 0: not measured."""

    def capacity(self, in_flight: int) -> int:
        """Tokens that a rank can hold in one micro-batch."""
        return int((self.budget - self.state) / self.per_token) // in_flight


def memory_constants(
    measured: Sequence[tuple[int, MeasuredBytes]],
    in_flight: int,
    given_capacity: int,
    hosts: Hosts,
    recomputed: Sequence[tuple[int, MeasuredBytes]] = (),
) -> MemoryConstants:
    """Of the rank that is full first, on every rank. Collective.

    One pipeline stage has the vocabulary's matrices and logits, another one holds the most micro-batches: constants
    of different ranks must not be mixed.

    Parameters
    ----------
    measured
        Tokens of a slice, and the bytes of this rank's step with ``in_flight`` micro-batches of so many; two sizes.
    in_flight
        Micro-batches that a pipeline's fullest stage holds at once.
    given_capacity
        Tokens of a micro-batch that the run was given, where no device limits them.
    recomputed
        As ``measured``, of micro-batches that recompute their activations; none: they may not.
    """
    mine = _of_this_rank(measured, in_flight, given_capacity)
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
    if not recomputed:
        return fullest
    # Another rank may be full first there: the one with the logits.
    state, per_token = _state_and_token(recomputed, in_flight)
    least = torch.tensor(((fullest.budget if on_cpu() else mine.budget) - state) / per_token, dtype=torch.float64)
    hosts.all_reduce(least, dist.ReduceOp.MIN)
    per_token = (fullest.budget - fullest.state) / max(float(least), 1.0)
    # Recomputing never takes more: without a gain, noise may say so.
    return replace(fullest, recomputed_per_token=min(per_token, fullest.per_token))


def _state_and_token(measured: Sequence[tuple[int, MeasuredBytes]], in_flight: int) -> tuple[float, float]:
    """Bytes that are there whatever a micro-batch holds, and those of a token."""
    (few, small), (many, large) = measured
    if many == few:  # too small a job to tell; all of it is the tokens'
        per_token, fixed = large.activations / many / in_flight, 0.0
    else:
        per_token = (large.activations - small.activations) / (many - few) / in_flight
        fixed = max(0.0, large.activations - per_token * many * in_flight)
    return large.state + fixed, max(per_token, 1.0)


def _of_this_rank(
    measured: Sequence[tuple[int, MeasuredBytes]], in_flight: int, given_capacity: int
) -> MemoryConstants:
    state, per_token = _state_and_token(measured, in_flight)
    if on_cpu():
        # No limit to measure: the budget says what the run was given.
        return MemoryConstants(state + per_token * (given_capacity * in_flight + 0.5), state, per_token)
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    return MemoryConstants(_USABLE_MEMORY * (total - outside), state, per_token)
