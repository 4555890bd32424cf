"""The process groups of all aligned blocks, made once, used for ever.

Every rank of the world must build the pool with the same arguments and in the same place: creating a
process group is collective, and groups that overlap hang when ranks create them in different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_flexsp.runtime.packing import ring_size_of

CreateGroup = Callable[[list[int]], dist.ProcessGroup]


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share one pack, seen from one of them.

    They form a ring of blocks of neighbouring ranks. All that they exchange, inside a block and along the
    ring, travels in the one process group.
    """

    degree: int
    member: int
    """This rank's place in the group, 0 to degree - 1."""

    process_group: dist.ProcessGroup | None = field(default=None, repr=False)
    """None for a group of one, which never communicates."""

    ring_size: int = 1
    """Blocks in the ring; 1 where a single block is the whole group."""

    @property
    def block_size(self) -> int:
        """Ranks in each block."""
        return self.degree // self.ring_size

    @property
    def block(self) -> int:
        """This rank's block in the ring."""
        return self.member // self.block_size

    @cached_property
    def _ring_neighbours(self) -> tuple[int, int]:
        """Global ranks of this rank's place in the ring's next block and in the one before.

        Kept, since PyTorch goes through all ranks of a group for each answer, and every step of a ring asks.
        """
        assert self.process_group is not None
        following, previous = (
            dist.get_global_rank(self.process_group, (self.member + step * self.block_size) % self.degree)
            for step in (1, -1)
        )
        return following, previous

    def begin_exchange_in_block(self, outgoing: Tensor, aside: bool) -> PendingExchange:
        """Begin to send row ``i`` of ``outgoing``, ``[block_size, ...]``, to the block's rank ``i``.

        ``aside``: on a GPU in a stream of its own, so that compute goes on meanwhile. Otherwise what is launched
        afterwards waits for it, which spares the streams to wait for each other.
        """
        # Both buffers must be dense in memory order. empty_like() of a transposed view would keep the
        # view's strides, and the collective, which sees bare memory, would deliver scrambled rows.
        outgoing = outgoing.contiguous()
        incoming = torch.empty(outgoing.shape, dtype=outgoing.dtype, device=outgoing.device)
        rows = None
        if self.ring_size > 1:
            before = self.block * self.block_size
            rows = [0] * before + [1] * self.block_size + [0] * (self.degree - self.block_size - before)
        work = dist.all_to_all_single(incoming, outgoing, rows, rows, group=self.process_group, async_op=aside)
        return PendingExchange(incoming, outgoing, work)

    def exchange_in_block(self, outgoing: Tensor) -> Tensor:
        """The same, ended: the rows of all ranks for this one, in their order."""
        return self.begin_exchange_in_block(outgoing, aside=False).wait()

    def pass_on(self, *outgoing: Tensor) -> PendingRing:
        """Begin to send tensors to the ring's next block, and to receive as many from the one before.

        Blocks trade between ranks of the same place. Tensors must be dense, and like those of all other blocks.
        """
        following, previous = self._ring_neighbours
        incoming = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in outgoing)
        works = dist.batch_isend_irecv(
            [
                *(dist.P2POp(dist.isend, x, following, self.process_group) for x in outgoing),
                *(dist.P2POp(dist.irecv, x, previous, self.process_group) for x in incoming),
            ]
        )
        return PendingRing(incoming, outgoing, works)


@dataclass(frozen=True)
class PendingExchange:
    """An all-to-all that is under way. What is sent must not change, nor what comes be read, before ``wait``."""

    incoming: Tensor
    outgoing: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """What has come. On a GPU the stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.incoming


@dataclass(frozen=True)
class PendingRing:
    """A transfer along the ring that is under way. What is sent must not change before ``wait``."""

    incoming: tuple[Tensor, ...]
    outgoing: tuple[Tensor, ...]
    works: list[dist.Work]

    def wait(self) -> tuple[Tensor, ...]:
        """What the block before sent. On a GPU the stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.incoming


class GroupPool:
    """Looks up the group of a block of this rank's domain.

    Parameters
    ----------
    domains
        The global ranks of every domain of the world (one for each tensor- and pipeline-parallel
        position), each in domain order. Every rank of the world stands in exactly one.
    blocks
        ``(first_rank, degree)`` of each block that a plan may use, as ranks of a domain.
    create
        Makes a process group of the given global ranks; called by all ranks in one order.
    domain_group
        A group of this rank's whole domain that exists already, to be used for that block.
    query_heads
        Attention heads of a tensor-parallel rank; wider groups become rings.
    """

    def __init__(
        self,
        domains: Sequence[Sequence[int]],
        blocks: Iterable[tuple[int, int]],
        create: CreateGroup,
        domain_group: dist.ProcessGroup,
        query_heads: int,
    ) -> None:
        rank = dist.get_rank()
        (self.domain,) = [list(domain) for domain in domains if rank in domain]
        self._groups: dict[tuple[int, int], SequenceGroup] = {}
        for first_rank, degree in blocks:
            for domain in domains:
                ranks = list(domain[first_rank : first_rank + degree])
                if degree == 1:
                    process_group = None
                elif degree == len(domain):
                    process_group = domain_group
                else:
                    process_group = create(ranks)
                if rank in ranks:
                    self._groups[first_rank, degree] = SequenceGroup(
                        degree, ranks.index(rank), process_group, ring_size_of(degree, query_heads)
                    )

    @property
    def communicators(self) -> int:
        """How many process groups this rank is a member of."""
        return sum(group.process_group is not None for group in self._groups.values())

    def group(self, first_rank: int, degree: int) -> SequenceGroup:
        """The group of a block that this rank is a member of."""
        return self._groups[first_rank, degree]

    def warm_up(self, device: torch.device | str, adds_up: bool = False) -> None:
        """Use every group once, widest first, so that no connection is set up, and no memory taken, in mid-training.

        ``adds_up`` says that sums over groups will be asked for, which have connections and buffers of their own.
        """
        for _, group in sorted(self._groups.items(), key=lambda item: (-item[0][1], item[0][0])):
            if group.process_group is not None:
                probe = torch.zeros(group.block_size, device=device)
                group.exchange_in_block(probe)
                if group.ring_size > 1:
                    group.pass_on(probe).wait()
                if adds_up:
                    dist.all_reduce(probe, group=group.process_group)
