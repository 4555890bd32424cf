"""How long a plan takes under a cost model, how evenly it loads the ranks, and how much of it is padding."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.laws import rounds, slice_tokens
from megatron_flexsp.planner.plans import Plan


def micro_batch_seconds(plan: Plan, lengths: ArrayLike, cost_model: CostModel) -> NDArray[np.float64]:
    """Seconds of each micro-batch of a plan, shape (micro-batches,), in list order.

    Parameters
    ----------
    plan
        The plan.
    lengths
        Tokens of each sequence of the global batch, shape (sequences,).
    cost_model
        Prices it. It needs a bandwidth for every degree of the plan, else FlexSPError.
    """
    items = plan.micro_batches
    tokens = np.asarray(lengths)
    owners = np.repeat(np.arange(len(items)), [len(item.sequences) for item in items])
    positions = np.array([position for item in items for position in item.sequences], dtype=np.int64)
    degrees = np.array([item.degree for item in items], dtype=np.int64)
    seconds = np.full(len(items), cost_model.micro_batch_overhead_seconds, dtype=np.float64)
    is_recomputed = np.array([item.recomputed for item in items], dtype=bool)
    for degree, recomputed in sorted({(item.degree, item.recomputed) for item in items}):
        alike = (degrees == degree) & (is_recomputed == recomputed)
        mine = alike[owners]
        work = cost_model.sequence_seconds(tokens[positions[mine]], degree, recomputed=recomputed)
        seconds += np.bincount(owners[mine], weights=work, minlength=len(items))
        seconds[alike] += cost_model.latency_seconds(degree)
        if recomputed:
            seconds[alike] += cost_model.recomputing_seconds(degree)
    return seconds


def step_seconds(plan: Plan, lengths: ArrayLike, cost_model: CostModel, *, pipeline_stages: int = 1) -> float:
    """Seconds of the whole step.

    A micro-batch starts when the last of its ranks is free and ends for all of them together. In lockstep
    a round starts when the last rank of the domain is free.

    With a pipeline of p stages, each as fast as the cost model says, the last stage ends later: a row of
    micro-batches that take the same time at every stage ends p - 1 times the longest of them after its sum
    (a proportionate flow shop). So on each rank's path (in lockstep, for the rounds) the longest micro-batch
    counts p times: fill and drain. Where the other stages are faster, the cost model says which share of a
    stage's time each of them adds (``CostModel.pipeline_fill_share``).
    """
    seconds = micro_batch_seconds(plan, lengths, cost_model).tolist()
    return _step_seconds(plan, seconds, cost_model.stages_counted(pipeline_stages) - 1)


def _step_seconds(plan: Plan, seconds: list[float], further_stages: float) -> float:
    """The same, from the seconds of each micro-batch. Plain lists: most micro-batches are on one rank."""
    if plan.schedule == "lockstep":
        in_order = iter(seconds)
        lasting = [max(next(in_order) for _ in members) for members in rounds(plan)]
        return float(sum(lasting) + further_stages * max(lasting))
    free_at = [0.0] * plan.domain_size
    longest = [0.0] * plan.domain_size
    for item, duration in zip(plan.micro_batches, seconds, strict=True):
        first = item.first_rank
        if item.degree == 1:
            free_at[first] += duration
            longest[first] = max(longest[first], duration)
        else:
            ranks = slice(first, first + item.degree)
            free_at[ranks] = [max(free_at[ranks]) + duration] * item.degree
            longest[ranks] = [max(before, duration) for before in longest[ranks]]
    return max(free + further_stages * most for free, most in zip(free_at, longest, strict=True))


def balance(plan: Plan, lengths: ArrayLike, cost_model: CostModel) -> float:
    """Mean share of the step that ranks spend in micro-batches that hold sequences, 0 to 1.

    Fillers do not count: a rank that runs only padding is idle in truth. A step of 0 seconds counts as 1.
    """
    seconds = micro_batch_seconds(plan, lengths, cost_model).tolist()
    step = _step_seconds(plan, seconds, further_stages=0)
    if step == 0:
        return 1.0
    busy = sum(
        item.degree * duration for item, duration in zip(plan.micro_batches, seconds, strict=True) if not item.is_filler
    )
    return float(busy / (plan.domain_size * step))


def padding_share(plan: Plan, lengths: ArrayLike, slice_multiple: int = 1) -> float:
    """Share of all tokens that ranks run which are padding, fillers counted, 0 to 1.

    Each rank's slice is padded up to a multiple of ``slice_multiple`` tokens; a filler is one such multiple.
    """
    tokens = np.asarray(lengths, dtype=np.int64).tolist()
    run_tokens = 0
    for item in plan.micro_batches:
        total_tokens = max(1, sum(tokens[position] for position in item.sequences))
        run_tokens += item.degree * slice_tokens(total_tokens, item.degree, slice_multiple)
    return 1.0 - float(sum(tokens)) / run_tokens
