"""What all hosts of a run tell each other, over a tree of small gloo groups.

A group of the whole world would open a socket between every two ranks: on 4,096 ranks, 4,095 in every process. Here
ranks meet in blocks of ``fan_out``, the first ranks of those blocks in blocks again, and so on up to rank 0. No rank
has more than ``fan_out`` neighbours on each of the tree's few levels, and no device waits for any of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FAN_OUT = 8
"""Up to so many ranks meet in a single group: as a rule those of a node, of which one speaks with other nodes.

Small pays by count: a gloo group reduces around a ring, and each of its ranks asks the job's one store for the
addresses of all. With 8,192 ranks that is 9 addresses a rank and 34 hops; groups of 64 would take 65 and 130. Among 64
to 256 processes that share two cores, a barrier takes the same time in groups of 8, 16 and 64.
"""


@dataclass(frozen=True)
class _Level:
    """A group that this rank is in."""

    group: dist.ProcessGroup
    leader: int
    """Its first rank, which alone goes on to the next level."""


class Hosts:
    """Collectives over all ranks of the world, for tensors on the host.

    Every rank of the world makes one in the same place, and calls its methods in the same order.

    Parameters
    ----------
    create
        Makes a gloo group of the given global ranks; called by all ranks in one order. Its timeout is the longest wait.
    fan_out
        Ranks of a group, at most.
    """

    def __init__(self, create: Callable[[list[int]], dist.ProcessGroup], fan_out: int = FAN_OUT) -> None:
        rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._levels: list[_Level] = []
        meeting = list(range(self.size))
        while True:
            blocks = [meeting[first : first + fan_out] for first in range(0, len(meeting), fan_out)]
            for block in blocks:
                group = create(block)
                if rank in block:
                    self._levels.append(_Level(group, block[0]))
            if len(blocks) == 1:
                break
            meeting = [block[0] for block in blocks]

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's tensor to all ranks, in place."""
        for level in reversed(self._levels):
            dist.broadcast(tensor, level.leader, group=level.group)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Combine the tensors of all ranks, in place on every rank."""
        for level in self._levels:
            dist.reduce(tensor, level.leader, op, group=level.group)
        self.broadcast(tensor)

    def barrier(self) -> None:
        """Wait until every rank has come so far."""
        self.all_reduce(torch.zeros(1), dist.ReduceOp.SUM)

    def gather(self, value: int) -> list[int]:
        """Every rank's number, on every rank, by rank."""
        values = torch.zeros(self.size, dtype=torch.int64)
        values[dist.get_rank()] = value
        self.all_reduce(values, dist.ReduceOp.SUM)
        return values.tolist()
