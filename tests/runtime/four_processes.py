"""Run by the tests in four processes: every case of Ulysses attention, and the groups that a pool makes.

Each rank writes what it saw to ``rank<r>.json`` in the folder that is the only argument.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_flexsp.planner import first_ranks
from megatron_flexsp.runtime import GroupPool, PackLayout, ulysses_attention
from megatron_flexsp.runtime.attention import packed_causal_attention
from tests.runtime.cases import CASES, Case
from tests.runtime.dense import dense_attention

WIDTH, SCALE = 8, 0.4


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    one_domain, created = pool([[0, 1, 2, 3]], degrees=(1, 2, 4))
    seen: dict[str, Any] = {"one domain": described(one_domain, created)}
    two_domains, created = pool([[0, 2], [1, 3]], degrees=(1, 2))
    seen["two domains"] = described(two_domains, created)
    seen["sums"] = [sum_over(one_domain, 0, 4), sum_over(two_domains, 0, 2)]
    seen["differences"] = {case.name: differences(case, one_domain, rank) for case in CASES}
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


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
    )
    made.warm_up("cpu")
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


def differences(case: Case, made: GroupPool, rank: int) -> dict[str, float]:
    """How far the result and each gradient are from the whole pack's on one process, as a share of the largest."""
    group = made.group(rank // case.degree * case.degree, case.degree)
    layout = PackLayout(case.lengths, case.degree, group.member)
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(5)
    heads = (case.heads, case.key_value_heads, case.key_value_heads, case.heads)
    q, k, v, weight = (torch.randn(layout.padded_tokens, count, WIDTH).to(dtype) for count in heads)
    whole = [x.float().requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*whole, layout.segment_lengths, SCALE)
    wanted = [expected, *torch.autograd.grad((expected * weight.float()).sum(), whole)]

    here = slice(layout.slice_start, layout.slice_start + layout.slice_tokens)
    parts = [laid_out(x[here], case.transposed) for x in (q, k, v)]
    kernel = partial(packed_causal_attention, segment_lengths=layout.segment_lengths, softmax_scale=SCALE)
    out = ulysses_attention(*(x.requires_grad_() for x in parts), group, kernel)
    found = [out, *torch.autograd.grad(out, parts, laid_out(weight[here], case.transposed))]
    return {
        name: float((mine.float() - all_of_it[here]).abs().max() / all_of_it.abs().max())
        for name, mine, all_of_it in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True)
    }


def laid_out(x_tHD: Tensor, transposed: bool) -> Tensor:
    """A copy of the values, dense or a view of a dense ``[D, H, t]``."""
    return x_tHD.permute(2, 1, 0).contiguous().permute(2, 1, 0) if transposed else x_tHD.clone()


main()
