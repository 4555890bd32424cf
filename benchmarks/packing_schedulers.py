"""Megatron's dynamic context-parallel scheduler against ours, on paper: both schedules under one cost model.

    PYTHONPATH=path/to/Megatron-LM-dev python benchmarks/packing_schedulers.py

The lengths are those of Megatron's examples/dynamic_context_parallel: lognormal, mean 1024, sigma 1.5, 128 to 8192,
padded as its data sets pad them; the model and the groups' capacity are its too (12 layers of width 2048, 2048 tokens a
rank, 8 sequences on each 4 ranks). Costs are estimated for H100s, 8 in a node, with ring attention; nothing is run.
"""

import argparse
import math
import statistics
import time

import numpy as np
import torch
from megatron.core.datasets.data_schedule_utils import next_hdp_group_packing_aware

from megatron_flexsp.megatron.estimate import estimate_cost_model, with_ring_exchange
from megatron_flexsp.megatron.packing_scheduler import group_sizes
from megatron_flexsp.planner import CostModel
from megatron_flexsp.planner.full_rounds import FullRoundsRequest

CAPACITY = 2048


def main() -> None:
    """Print one line for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="4,8,16,32,64")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--sequences-per-rank", type=float, default=2)
    parser.add_argument("--seconds", type=float, default=0.1, help="the planner's time limit")
    options = parser.parse_args()
    print("ranks | sequences | ours / Megatron's predicted seconds: mean, best, worst | planning ours, Megatron's (ms)")
    for ranks in map(int, options.ranks.split(",")):
        costs = cost_model(ranks)
        request = FullRoundsRequest(
            costs,
            ranks,
            CAPACITY,
            time_limit_seconds=options.seconds,
            options={"schedule": "lockstep", "degrees": group_sizes(ranks)},
        )
        count = int(ranks * options.sequences_per_rank)
        ratios, ours, theirs = [], [], []
        for seed in range(options.batches):
            batch = lengths(count, 2 * ranks, seed)
            plan = request.make(batch)
            started = time.monotonic()
            groups = megatrons_groups(batch, ranks)
            theirs.append(time.monotonic() - started)
            ours.append(plan.solve_seconds)
            ratios.append(plan.predicted_seconds / seconds_of(groups, batch, costs))
        print(
            f"{ranks:5d} | {count:9d} | {statistics.mean(ratios):.3f}, {min(ratios):.3f}, {max(ratios):.3f} | "
            f"{1e3 * statistics.mean(ours):.0f}, {1e3 * statistics.mean(theirs):.0f}"
        )


def lengths(count: int, multiple: int, seed: int) -> np.ndarray:
    """Tokens of each sequence, padded."""
    mean, sigma = 1024, 1.5
    drawn = np.random.default_rng(seed).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return -(-np.clip(drawn, 128, 8192).astype(np.int64) // multiple) * multiple


def cost_model(ranks: int) -> CostModel:
    """The estimate for the example's model on H100s."""
    args = argparse.Namespace(
        num_layers=12,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=16,
        kv_channels=128,
        group_query_attention=False,
        padded_vocab_size=131072,
        params_dtype=torch.bfloat16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_experts=None,
        mtp_num_layers=None,
        multi_latent_attention=False,
        swiglu=False,
        recompute_granularity=None,
        sequence_parallel=False,
        use_distributed_optimizer=False,
        data_parallel_size=ranks,
    )
    degrees = group_sizes(ranks)
    estimate = estimate_cost_model(args, degrees, gpu=(9, 80 << 30), ranks_per_node=8, micro_batches_in_flight=1)
    return with_ring_exchange(estimate, args)


def megatrons_groups(batch: np.ndarray, ranks: int) -> list[list[list[int]]]:
    """What ``DefaultDynamicCPScheduler`` makes of a batch: for each micro-batch, what each rank holds."""
    groups = []
    left = sorted(enumerate(batch.tolist()), key=lambda item: item[1], reverse=True)
    while left:
        _, left, _, held = next_hdp_group_packing_aware(left, ranks, CAPACITY, 1)
        groups.append(held)
    return groups


def seconds_of(groups: list[list[list[int]]], batch: np.ndarray, costs: CostModel) -> float:
    """All ranks meet after each micro-batch."""
    return sum(
        max(costs.micro_batch_seconds(batch[held], sum(held[0] in other for other in ranks)) for held in ranks)
        for ranks in groups
    )


if __name__ == "__main__":
    main()
