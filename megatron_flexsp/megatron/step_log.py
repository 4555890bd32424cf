"""What each step's plan looked like: a line in Megatron's log, and figures for its TensorBoard and Weights & Biases."""

from __future__ import annotations

import numpy as np
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer, print_rank_0

from megatron_flexsp.megatron.batches import PlannedBatch
from megatron_flexsp.megatron.context import Context
from megatron_flexsp.planner import balance, padding_share


def log_step(context: Context, batch: PlannedBatch) -> None:
    """Log one training step's plan. Rank 0 prints; the rank that has Megatron's writers writes."""
    writer, wandb_run = get_tensorboard_writer(), get_wandb_writer()
    printing = context.channel.plans_here
    if writer is None and wandb_run is None and not printing:
        return
    plan, lengths = batch.plan, batch.lengths
    figures = {
        "predicted balance": balance(plan, lengths, context.cost_model),
        "padding share": padding_share(plan, lengths, context.settings.slice_multiple),
        "predicted seconds": plan.predicted_seconds,
        "lower bound seconds": plan.lower_bound_seconds,
        "planning seconds": plan.solve_seconds,
        "waited for plan seconds": batch.waited_for_plan_seconds,
        "waited for data seconds": batch.waited_for_data_seconds,
        "tokens": float(lengths.sum()),
    }
    quick_plans = 0 if context.planner is None else context.planner.quick_plans
    iteration = get_args().curr_iteration + 1
    if writer is not None:
        for name, value in figures.items():
            writer.add_scalar(f"flexsp/{name}", value, iteration)
    if wandb_run is not None:
        wandb_run.log({f"flexsp/{name}": value for name, value in figures.items()}, iteration)
    if not printing:
        return
    begins_and_ends = np.zeros(plan.domain_size + 1, dtype=np.int64)
    for item in plan.micro_batches:
        begins_and_ends[item.first_rank] += 1
        begins_and_ends[item.first_rank + item.degree] -= 1
    counts = np.cumsum(begins_and_ends[:-1])
    print_rank_0(
        f" [flexsp] iteration {iteration:8d} | {plan.schedule} | micro-batches of each degree: "
        + plan.counted_by_degree()
        + (f" | recomputed: {again}" if (again := plan.counted_by_degree(recomputed=True)) else "")
        + f" | micro-batches a rank: {counts.min()}-{counts.max()}"
        f" | sequences: {len(lengths)} | tokens: {lengths.sum()}"
        f" | predicted balance: {figures['predicted balance']:.1%} | padding: {figures['padding share']:.2%}"
        f" | planning (ms): {plan.solve_seconds * 1e3:.1f}"
        f" | waited for plan (ms): {batch.waited_for_plan_seconds * 1e3:.1f}"
        f" | waited for data (ms): {batch.waited_for_data_seconds * 1e3:.1f}"
        + (f" | quick plans so far, the planner being late or gone: {quick_plans} |" if quick_plans else " |")
    )
