"""Run by the tests in four processes: every case of attention over a group, and the groups that a pool makes.

Each rank writes what it saw to ``rank<r>.json`` in the folder that is the first argument. ``cuda`` after it puts
groups and attention on four GPUs.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_flexsp.planner import first_ranks
from megatron_flexsp.runtime import (
    GroupPool,
    Hosts,
    PackLayout,
    RingSchedule,
    SequenceGroup,
    at_one_width,
    ring_attention,
    ring_size_of,
    ulysses_attention,
)
from megatron_flexsp.runtime.attention import packed_causal_attention
from megatron_flexsp.runtime.groups import PendingExchange
from megatron_flexsp.runtime.ulysses import Kernel
from tests.runtime.cases import CASES, Case
from tests.runtime.dense import dense_attention

WIDTH, SCALE = 8, 0.4
DEVICE = torch.device(*(("cuda", int(os.environ["LOCAL_RANK"])) if sys.argv[2:] == ["cuda"] else ("cpu",)))


def main() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("gloo" if DEVICE.type == "cpu" else "cpu:gloo,cuda:nccl")
    rank = dist.get_rank()
    one_domain, created = pool([[0, 1, 2, 3]], degrees=(1, 2, 4))
    seen: dict[str, Any] = {"one domain": described(one_domain, created)}
    two_domains, created = pool([[0, 2], [1, 3]], degrees=(1, 2))
    seen["two domains"] = described(two_domains, created)
    seen["sums"] = [sum_over(one_domain, 0, 4), sum_over(two_domains, 0, 2)]
    seen["hosts"] = {str(fan_out): told_through(fan_out) for fan_out in (2, 3, 64)}
    seen["order"] = order_of_events(one_domain.group(0, 4))
    three = dist.new_group([0, 1, 2])
    seen["differences"] = {case.name: differences(case, one_domain, three) for case in CASES}
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def told_through(fan_out: int) -> dict[str, Any]:
    """What a tree of hosts tells this rank, and the groups that were made for it."""
    created = []

    def create(ranks: list[int]) -> dist.ProcessGroup:
        created.append(ranks)
        return dist.new_group(ranks)

    hosts, rank = Hosts(create, fan_out), dist.get_rank()
    news, least = torch.tensor([10 + rank]), torch.tensor([7 - rank, rank])
    hosts.broadcast(news)
    hosts.all_reduce(least, dist.ReduceOp.MIN)
    hosts.barrier()
    return {"groups": created, "news": news.item(), "least": least.tolist(), "gathered": hosts.gather(rank * rank)}


def pool(domains: list[list[int]], degrees: tuple[int, ...]) -> tuple[GroupPool, list[list[int]]]:
    """A pool over all aligned blocks of these degrees, warmed up, and the groups that it had made."""
    created = []

    def create(ranks: list[int]) -> dist.ProcessGroup:
        created.append(ranks)
        return dist.new_group(ranks)

    whole = [dist.new_group(domain) for domain in domains]
    size = len(domains[0])
    made = GroupPool(
        domains=domains,
        blocks=[(first, degree) for degree in degrees for first in first_ranks(degree, size)],
        create=create,
        domain_group=next(group for group, domain in zip(whole, domains, strict=True) if dist.get_rank() in domain),
        query_heads=2,
    )
    made.warm_up(DEVICE, adds_up=True)
    return made, created


def described(made: GroupPool, created: list[list[int]]) -> dict[str, Any]:
    """The blocks that this rank is a member of, with its place and the global ranks."""
    size = len(made.domain)
    blocks = {}
    for degree in (1, 2, 4):
        for first in first_ranks(degree, size):
            try:
                group = made.group(first, degree)
            except KeyError:
                continue
            process_group = group.process_group
            ranks = None if process_group is None else dist.get_process_group_ranks(process_group)
            blocks[f"{first}+{degree}"] = [group.member, ranks]
    return {"domain": made.domain, "created": created, "communicators": made.communicators, "blocks": blocks}


def sum_over(made: GroupPool, first_rank: int, degree: int) -> int:
    number = torch.tensor(10 ** dist.get_rank())
    dist.all_reduce(number, group=made.group(first_rank, degree).process_group)
    return int(number)


def differences(case: Case, made: GroupPool, three: dist.ProcessGroup) -> dict[str, float]:
    """How far the result and each gradient are from the whole pack's on one process, as a share of the largest."""
    rank, ring_size = dist.get_rank(), ring_size_of(case.degree, case.heads)
    if case.degree == 3:
        if rank == 3:
            return {}
        group = SequenceGroup(3, rank, three, ring_size)
    else:
        group = made.group(rank // case.degree * case.degree, case.degree)
        group = replace(group, ring_size=ring_size)
    layout = PackLayout(case.lengths, case.degree, group.member, case.slice_multiple, ring_size)
    # A GPU's kernels for rings work in 16 bits alone.
    dtype = torch.bfloat16 if ring_size > 1 and DEVICE.type == "cuda" else getattr(torch, case.dtype)
    torch.manual_seed(5)
    shapes = [
        *((case.heads, WIDTH), (case.key_value_heads, WIDTH)),
        *((case.key_value_heads, case.value_width), (case.heads, case.value_width)),
    ]
    q, k, v, weight = (torch.randn(layout.total_tokens, *shape).to(dtype) for shape in shapes)
    whole = [x.float().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*whole, layout.lengths, SCALE)
    wanted = [expected, *torch.autograd.grad((expected * weight.float()).sum(), whole)]

    begins = [sum(case.lengths[:sequence]) for sequence in range(len(case.lengths))]
    here = [begins[piece.sequence] + at for piece in layout.pieces for at in range(piece.start, piece.stop)]
    # What lies in the padding must not matter to the sequences.
    parts = [laid_out(padded(x[here], layout.slice_tokens).to(DEVICE), case.transposed) for x in (q, k, v, weight)]
    kernel: Kernel
    if ring_size == 1:
        kernel = partial(packed_causal_attention, segment_lengths=layout.segment_lengths, softmax_scale=SCALE)
    else:
        schedule = RingSchedule.of(layout)
        schedule = schedule.with_table(schedule.table.to(DEVICE))
        kernel = at_one_width(partial(ring_attention, schedule=schedule, group=group, softmax_scale=SCALE))
    inputs = [x.requires_grad_() for x in parts[:3]]
    out = ulysses_attention(*inputs, group, kernel, case.parts)
    found = [out, *torch.autograd.grad(out, inputs, parts[3])]
    assert all(bool(x.isfinite().all()) for x in found)
    shares = {}
    for name, mine, all_of_it in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        largest = max(float(all_of_it.detach().abs().max()), 0.1)  # the query of a single token has no gradient
        distances = (mine.detach()[: len(here)].float().cpu() - all_of_it.detach()[here]).abs()
        shares[name] = float(distances.max()) / largest if here else 0.0
    return shares


def order_of_events(group: SequenceGroup) -> list[str]:
    """What happens in two parts, forward and backward."""
    events: list[str] = []

    class Watched(SequenceGroup):
        def begin_exchange_in_block(self, outgoing: Tensor, aside: bool) -> PendingExchange:
            events.append("begin")
            pending = super().begin_exchange_in_block(outgoing, aside)
            assert pending.work is not None
            work = pending.work

            class WatchedWork:
                def wait(self) -> None:
                    events.append("end")
                    work.wait()

            return replace(pending, work=WatchedWork())

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            events.append("attend")
            return q + k + v

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            events.append("attend")
            return gradients * 3

    q, k, v = (torch.ones(2, 8, WIDTH, requires_grad=True) for _ in range(3))
    watched = Watched(group.degree, group.member, group.process_group)
    out = ulysses_attention(q, k, v, watched, Attend.apply, parts=2)
    events.append("loss")
    out.sum().backward()
    return events


def padded(x_nHD: Tensor, tokens: int) -> Tensor:
    return torch.cat((x_nHD, torch.randn(tokens - len(x_nHD), *x_nHD.shape[1:]).to(x_nHD.dtype)))


def laid_out(x_tHD: Tensor, transposed: bool) -> Tensor:
    """A copy of the values, dense or a view of a dense ``[D, H, t]``."""
    return x_tHD.permute(2, 1, 0).contiguous().permute(2, 1, 0) if transposed else x_tHD.clone()


main()
