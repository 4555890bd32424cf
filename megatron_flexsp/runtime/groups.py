"""The process groups of all aligned blocks, made once, used for ever.

Every rank of the world must build the pool with the same arguments and in the same place: creating a
process group is collective, and groups that overlap hang when ranks create them in different orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

CreateGroup = Callable[[list[int]], dist.ProcessGroup]


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share one pack, seen from one of them."""

    degree: int
    member: int
    """This rank's place in the group, 0 to degree - 1."""

    process_group: dist.ProcessGroup | None = field(default=None, repr=False)
    """None for a group of one, which never communicates."""


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
    """

    def __init__(
        self,
        domains: Sequence[Sequence[int]],
        blocks: Iterable[tuple[int, int]],
        create: CreateGroup,
        domain_group: dist.ProcessGroup,
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
                    self._groups[first_rank, degree] = SequenceGroup(degree, ranks.index(rank), process_group)

    @property
    def communicators(self) -> int:
        """How many process groups this rank is a member of."""
        return sum(group.process_group is not None for group in self._groups.values())

    def group(self, first_rank: int, degree: int) -> SequenceGroup:
        """The group of a block that this rank is a member of."""
        return self._groups[first_rank, degree]

    def warm_up(self, device: torch.device | str) -> None:
        """Use every group once, widest first, so that no communicator is set up in mid-training."""
        for _, group in sorted(self._groups.items(), key=lambda item: (-item[0][1], item[0][0])):
            if group.process_group is not None:
                probe = torch.zeros(group.degree, device=device)
                dist.all_to_all_single(torch.empty_like(probe), probe, group=group.process_group)
