"""One rank plans, all ranks run the same plan or stop with the same error.

Everything goes from host to host, so that no device ever waits for a plan.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import Plan
from megatron_flexsp.planner.wire import plan_from_bytes, plan_to_bytes
from megatron_flexsp.runtime import Hosts

PLANNING_RANK = 0
"""The root of the tree that plans travel along."""

_LISTED_RANKS = 16
"""So many ranks are named in a message."""

_DIFFERENCES = (
    (
        "the lengths of the sequences in this batch",
        "let every node see the same data files: compare --data-path and --data-cache-path on their hosts",
    ),
    ("the plan", "run the same version of megatron-flexsp on every node"),
)
"""What ranks can differ in, and what to do about it."""


def lengths_digest(lengths: NDArray[np.int64]) -> str:
    """What two ranks compare to know that they see the same batch."""
    return hashlib.sha256(np.ascontiguousarray(lengths, dtype=np.int64).tobytes()).hexdigest()


def packed(note: dict[str, str], plan: Plan | None = None) -> bytes:
    """A note and a plan as they travel: a plan for 16,384 ranks and 131,072 sequences takes well under 2 MB."""
    body = b"" if plan is None else plan_to_bytes(plan)
    return zlib.compress(json.dumps(note).encode() + b"\n" + body, level=1)


def unpacked(payload: bytes) -> tuple[dict[str, str], Plan | None]:
    """What ``packed`` packed."""
    note, _, body = zlib.decompress(payload).partition(b"\n")
    return json.loads(note), plan_from_bytes(body) if body else None


class PlanChannel:
    """Hands each batch's plan from the planning rank to all ranks.

    Parameters
    ----------
    hosts
        All ranks of the world. The timeout of its groups is the longest wait for a plan.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._rank = dist.get_rank()

    @property
    def rank(self) -> int:
        """This rank's number in the world."""
        return self._rank

    @property
    def size(self) -> int:
        """Ranks of the world."""
        return self._hosts.size

    @property
    def plans_here(self) -> bool:
        """Whether this rank is the one that plans."""
        return self._rank == PLANNING_RANK

    def share(self, lengths: NDArray[np.int64], planned: Plan | FlexSPError | None) -> Plan:
        """Collective: return the planning rank's plan on every rank.

        Parameters
        ----------
        lengths
            The batch's sequence lengths as this rank reads them.
        planned
            On the planning rank its plan, or why there is none; None on the others.

        Raises
        ------
        FlexSPError
            On every rank: where planning failed, or where ranks see other lengths, naming those ranks.
        """
        if isinstance(planned, Plan):
            payload = packed({"digest": planned.digest(), "lengths": lengths_digest(lengths)}, planned)
        else:
            # On the planning rank; what others give is not sent.
            found, remedy = planned.args if isinstance(planned, FlexSPError) else ("", "")
            payload = packed({"found": found, "remedy": remedy})
        note, sent = unpacked(self._broadcast(payload))
        if sent is None:
            raise FlexSPError(note["found"], note["remedy"])
        plan = planned if isinstance(planned, Plan) else sent
        self._agree(lengths_digest(lengths) == note["lengths"], plan.digest() == note["digest"])
        return plan

    def together[T](self, call: Callable[[], T]) -> T:
        """Collective: what ``call`` returns on this rank.

        Raises
        ------
        FlexSPError
            On every rank, if the call fails on any of them: what went wrong on the first one.
        """
        problem, result = None, None
        try:
            result = call()
        except Exception as error:
            problem = error
        first = torch.tensor(self.size if problem is None else self._rank)
        self._hosts.all_reduce(first, dist.ReduceOp.MIN)
        if int(first) == self.size:
            return result  # type: ignore[return-value]  # it is what the call returned
        said = b""
        if int(first) == self._rank:
            parts = problem.args if isinstance(problem, FlexSPError) else (f"{type(problem).__name__}: {problem}",)
            said = json.dumps(parts).encode()
        length = int(self.sum(np.array([len(said)]))[0])
        text = self.sum(np.frombuffer(said.ljust(length, b"\0"), dtype=np.uint8).astype(np.int64))
        raise FlexSPError(*json.loads(text.astype(np.uint8).tobytes())) from problem

    def sum(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Collective: the numbers of all ranks, added up."""
        total = torch.from_numpy(values.copy())
        if total.numel():
            self._hosts.all_reduce(total, dist.ReduceOp.SUM)
        return total.numpy()

    def _broadcast(self, payload: bytes) -> bytes:
        size = torch.tensor([len(payload)], dtype=torch.int64)
        self._hosts.broadcast(size)
        data = torch.zeros(int(size), dtype=torch.uint8)
        if self.plans_here:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self._hosts.broadcast(data)
        return data.numpy().tobytes()

    def _agree(self, *same: bool) -> None:
        """Stop all ranks if any of them differs from the planning rank, in the batch or in the plan."""
        agreed = torch.tensor(same, dtype=torch.int32)
        self._hosts.all_reduce(agreed, dist.ReduceOp.MIN)
        for kind, (what, remedy) in enumerate(_DIFFERENCES):
            if not int(agreed[kind]):
                verdicts = self._hosts.gather(same[kind])
                others = [rank for rank, verdict in enumerate(verdicts) if not verdict]
                raise FlexSPError(f"rank(s) {_listed(others)} differ from rank {PLANNING_RANK} in {what}", remedy)


def _listed(ranks: list[int]) -> str:
    """The first of the ranks, and how many there are beside them: it may be all of thousands that differ from one."""
    beyond = len(ranks) - _LISTED_RANKS
    return f"{ranks[:_LISTED_RANKS]}" + (f" and {beyond:,} more" if beyond > 0 else "")
