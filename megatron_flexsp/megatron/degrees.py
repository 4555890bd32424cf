"""Which group sizes a job's plans may use."""

from __future__ import annotations

import argparse

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel, legal_degrees
from megatron_flexsp.runtime import ring_size_of


def degrees_of(args: argparse.Namespace, domain_size: int, cost_model: CostModel | None) -> tuple[int, ...]:
    """The group sizes that domain and cost model allow; asked-for ones are checked, not dropped.

    Rings, which are groups of more ranks than a tensor-parallel rank has attention heads, must be asked for, unless
    nothing else holds a sequence of ``--seq-length``.
    """
    legal = legal_degrees(domain_size)
    heads = args.num_attention_heads // args.tensor_model_parallel_size
    asked: tuple[int, ...]
    if args.flexsp_static_degree is not None:
        flag, asked = "--flexsp-static-degree", (args.flexsp_static_degree,)
    elif args.flexsp_degrees is not None:
        flag, asked = "--flexsp-degrees", parse_degrees(args.flexsp_degrees)
    else:
        priced = [degree for degree in legal if _has_bandwidth(cost_model, degree)]
        shared = [degree for degree in priced if heads % degree == 0]
        return tuple(shared + _needed_rings(args, priced, shared[-1], cost_model))
    for degree in asked:
        if degree not in legal:
            raise FlexSPError(
                f"{flag}: {degree} is not a group size here. A group has a power of two of ranks, at most the "
                f"{domain_size} data-parallel ranks, or all {domain_size}",
                f"choose among {', '.join(map(str, legal))}",
            )
        if not _has_bandwidth(cost_model, degree):
            raise FlexSPError(
                f"{flag}: {args.flexsp_cost_model} has no bandwidth for {degree} ranks",
                "measure it, or leave the degree out",
            )
    rings = [degree for degree in asked if ring_size_of(degree, heads) > 1]
    if rings and not _rings_can_compute(args):
        raise FlexSPError(
            f"{flag}: groups of {', '.join(map(str, rings))} ranks share {heads} attention heads by ring attention, "
            "which has no --window-size, only --softmax-type vanilla and --attention-dropout 0",
            "ask for divisors of the heads",
        )
    return tuple(sorted(set(asked)))


def _rings_can_compute(args: argparse.Namespace) -> bool:
    """Whether ring attention has what the job's attention does."""
    is_vanilla = getattr(args, "softmax_type", "vanilla") == "vanilla"
    return is_vanilla and not getattr(args, "window_size", None) and not args.attention_dropout


def _needed_rings(args: argparse.Namespace, priced: list[int], widest: int, cost_model: CostModel | None) -> list[int]:
    """The degrees beyond the widest that the heads allow, up to one that holds the longest sequence."""
    slice_tokens = _largest_slice(args, cost_model)
    if slice_tokens is None or not _rings_can_compute(args):
        return []
    wider = [degree for degree in priced if degree > widest and widest * slice_tokens < args.seq_length]
    enough = next((degree for degree in wider if degree * slice_tokens >= args.seq_length), None)
    return [] if enough is None else [degree for degree in wider if degree <= enough]


def _largest_slice(args: argparse.Namespace, cost_model: CostModel | None) -> int | None:
    """Tokens that a rank can hold, recomputed if plans may; None where the flags don't say."""
    tokens: int | None = args.flexsp_max_tokens_per_rank
    if not args.flexsp_recompute:
        return tokens
    recomputed: int | None = args.flexsp_max_recomputed_tokens_per_rank
    if recomputed is None and tokens is not None and cost_model is not None:
        recomputed = cost_model.scaled_recomputed_capacity(tokens)
    return tokens if recomputed is None else recomputed


def _has_bandwidth(cost_model: CostModel | None, degree: int) -> bool:
    return degree == 1 or cost_model is None or degree in cost_model.exchange_bandwidth_bytes_per_second


def parse_degrees(text: str) -> tuple[int, ...]:
    """The value of --flexsp-degrees."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise FlexSPError(
            f"--flexsp-degrees {text}: these are no whole numbers", "give them with commas between, such as 1,2,8"
        ) from None
