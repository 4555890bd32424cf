"""What a training run shares between its seams: settings, cost model, groups, the way plans travel.

Made once, collectively, after Megatron has set up its process groups and its model.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_flexsp.errors import FlexSPError, named_by_flags
from megatron_flexsp.megatron.estimate import estimate_cost_model
from megatron_flexsp.megatron.experts import adds_up_over_groups
from megatron_flexsp.megatron.head_sizes import head_sizes
from megatron_flexsp.megatron.plan_channel import PlanChannel
from megatron_flexsp.megatron.settings import PLANNER_FLAGS, Settings
from megatron_flexsp.planner import CostModel, first_ranks, narrowest_degree, usable_capacity
from megatron_flexsp.planner.service import PlanningService, PlanRequest
from megatron_flexsp.runtime import GroupPool, Hosts, ring_size_of
from megatron_flexsp.runtime.block_attention import check_block_attention


def on_cpu() -> bool:
    """Whether the stand-in for CUDA is in place."""
    return os.environ.get("FLEXSP_DEVICE") == "cpu"


@dataclass(frozen=True)
class Context:
    """One training run."""

    settings: Settings
    cost_model: CostModel
    token_capacity: int
    """Tokens that one rank can hold in one micro-batch."""
    recomputed_token_capacity: int | None
    """The same where activations are recomputed; None: nowhere."""
    static_degree: int | None
    """The degree of all micro-batches of the static schedule; None for the others."""
    groups: GroupPool
    hosts: Hosts
    """All ranks of the world over gloo: what goes through it keeps no device waiting."""
    channel: PlanChannel
    domain_rank: int
    request: PlanRequest
    """How plans are made."""
    planner: PlanningService | None
    """Plans in a process of its own; on the planning rank only."""


def load_cost_model(args: argparse.Namespace, settings: Settings, hosts: Hosts) -> CostModel:
    """The measured cost model, or an estimate that says that it is one. Collective: all ranks have the same."""
    if settings.cost_model is not None:
        return settings.cost_model
    gpu = None
    if not on_cpu():
        # Nodes can differ by some megabytes, and with them the tokens that a rank is taken to hold.
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        least = torch.tensor([properties.major, properties.total_memory], dtype=torch.int64)
        hosts.all_reduce(least, dist.ReduceOp.MIN)
        gpu = (int(least[0]), int(least[1]))
    return estimate_cost_model(
        args,
        settings.degrees,
        gpu=gpu,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "8")),
        micro_batches_in_flight=settings.micro_batches_in_flight,
    )


def build_context(args: argparse.Namespace, settings: Settings, longest: int, longest_in: str) -> Context:
    """Collective over the world: make the groups and use each of them once.

    Parameters
    ----------
    args, settings
        Megatron's validated arguments and the checked flags.
    longest, longest_in
        Tokens of the longest sequence that can come, and the data set that it is in.

    Raises
    ------
    FlexSPError
        Where no group can hold the longest sequence.
    """
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    hosts = Hosts(
        lambda ranks: parallel_state.create_group(ranks, timeout=timeout, backend="gloo", group_desc="FLEXSP_HOSTS")
    )
    cost_model = load_cost_model(args, settings, hosts)
    capacity = token_capacity(settings, cost_model)
    recomputed = recomputed_token_capacity(settings, cost_model, capacity)
    narrowest = degree_for_longest(settings, recomputed or capacity, longest, longest_in)
    domain_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    is_static = settings.schedule == "static" and settings.profile is None
    used = (narrowest,) if is_static else settings.degrees
    groups = GroupPool(
        domains=_domains(hosts, dist.get_process_group_ranks(domain_group)),
        blocks=[
            (first_rank, degree)
            for degree in sorted({1, *used})  # fillers have one rank
            for first_rank in first_ranks(degree, settings.domain_size)
        ],
        create=lambda ranks: parallel_state.create_group(ranks, timeout=timeout, group_desc="FLEXSP_BLOCK"),
        domain_group=domain_group,
        query_heads=settings.query_heads,
    )
    device = torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())
    if any(ring_size_of(degree, settings.query_heads) > 1 for degree in used):
        check_block_attention(device, args.params_dtype, head_sizes(args).widest)
    groups.warm_up(device, adds_up=adds_up_over_groups(args))
    channel = PlanChannel(hosts)
    request = plan_request(settings, cost_model, capacity, narrowest)
    return Context(
        settings=settings,
        cost_model=cost_model,
        token_capacity=capacity,
        recomputed_token_capacity=recomputed,
        static_degree=narrowest if settings.schedule == "static" else None,
        groups=groups,
        hosts=hosts,
        channel=channel,
        request=request,
        domain_rank=groups.domain.index(dist.get_rank()),
        planner=PlanningService(request) if channel.plans_here else None,
    )


def _domains(hosts: Hosts, domain: list[int]) -> list[tuple[int, ...]]:
    """The global ranks of every domain of the world, in domain order, from each rank's own. Collective."""
    places = hosts.gather(domain.index(dist.get_rank()))
    domains: dict[int, list[int]] = {}
    for rank, first_rank in enumerate(hosts.gather(domain[0])):
        domains.setdefault(first_rank, []).append(rank)
    return sorted(tuple(sorted(ranks, key=places.__getitem__)) for ranks in domains.values())


@named_by_flags(PLANNER_FLAGS)
def token_capacity(settings: Settings, cost_model: CostModel) -> int:
    """Tokens that one rank can hold in one micro-batch.

    Raises
    ------
    FlexSPError
        Where the cost model leaves no memory for a single slice.
    """
    capacity = settings.max_tokens_per_rank
    if capacity is None:
        capacity = cost_model.token_capacity // settings.micro_batches_in_flight
    if capacity < settings.slice_multiple:
        raise FlexSPError(
            "the cost model leaves no memory for activations (memory_budget_bytes - model_state_bytes)",
            "give --flexsp-max-tokens-per-rank, or a cost model that was measured on this cluster",
        )
    return capacity


@named_by_flags(PLANNER_FLAGS)
def recomputed_token_capacity(settings: Settings, cost_model: CostModel, token_capacity: int) -> int | None:
    """Tokens that one rank can hold in a micro-batch that recomputes its activations; None where none may.

    ``token_capacity`` is what it holds without.

    Raises
    ------
    FlexSPError
        Where neither flag nor cost model says so, or where nothing is gained.
    """
    if not settings.recompute:
        return None
    capacity = settings.max_recomputed_tokens_per_rank
    if capacity is None and cost_model.recomputed_activation_bytes_per_token == 0:
        raise FlexSPError(
            "--flexsp-recompute: what a rank holds of a micro-batch that recomputes is not known",
            "give --flexsp-max-recomputed-tokens-per-rank, what fits under --recompute-granularity full, or measure "
            "the --flexsp-cost-model again with --flexsp-recompute",
        )
    if capacity is None and settings.max_tokens_per_rank is not None:
        capacity = cost_model.scaled_recomputed_capacity(settings.max_tokens_per_rank)
    if capacity is None:
        capacity = cost_model.recomputed_token_capacity // settings.micro_batches_in_flight
    if capacity < token_capacity:
        raise FlexSPError(
            f"--flexsp-recompute: a rank holds {capacity:,} tokens where it recomputes and {token_capacity:,} where it "
            "doesn't, so nothing is gained",
            "raise --flexsp-max-recomputed-tokens-per-rank, lower --flexsp-max-tokens-per-rank, or take the flag out",
        )
    return capacity


def plan_request(settings: Settings, cost_model: CostModel, capacity: int, narrowest: int) -> PlanRequest:
    """How this job's batches are planned; ``narrowest`` is the one degree of the static schedule."""
    degrees, schedule = settings.degrees, settings.schedule
    if schedule == "static" and settings.in_rounds:
        # Ranks may not run different numbers of micro-batches: rounds of one degree.
        degrees, schedule = (narrowest,), "lockstep"
    return PlanRequest(
        cost_model,
        settings.domain_size,
        capacity,
        recomputed_token_capacity=recomputed_token_capacity(settings, cost_model, capacity),
        slice_multiple=settings.slice_multiple,
        count_multiple=settings.count_multiple,
        time_limit_seconds=settings.solver_time_limit_seconds,
        options={
            "schedule": schedule,
            "degrees": degrees,
            "static_degree": narrowest if schedule == "static" else None,
            "pipeline_stages": settings.pipeline_stages,
        },
    )


def degree_for_longest(settings: Settings, capacity: int, longest: int, longest_in: str) -> int:
    """The fewest ranks that hold the longest sequence; where a plan has one degree they must divide the domain.

    ``capacity`` is the most that a rank can hold, recomputed where plans may do that.

    Raises
    ------
    FlexSPError
        Where no group holds it.
    """
    degrees = settings.degrees
    if settings.schedule in ("static", "batch-adaptive"):
        degrees = tuple(degree for degree in degrees if settings.domain_size % degree == 0)
    degree = narrowest_degree(degrees, longest, capacity, slice_multiple=settings.slice_multiple)
    if degree is not None:
        return degree
    slice_capacity = usable_capacity(capacity, settings.slice_multiple)
    widest = max(degrees, default=1)
    capacity_flag, last_way_out = "--flexsp-max-tokens-per-rank", "or use more ranks"
    if settings.recompute:
        capacity_flag = "--flexsp-max-recomputed-tokens-per-rank"
    elif not settings.recomputes_everything:
        last_way_out = "use more ranks, or recompute activations where they don't fit (--flexsp-recompute)"
    raise FlexSPError(
        f"{longest_in}: a sequence of {longest:,} tokens doesn't fit. The widest group has {widest} ranks with "
        f"{capacity:,} tokens each, {widest * slice_capacity:,} in all",
        f"lower --seq-length (longer documents are then split), raise {capacity_flag} if memory allows, allow wider "
        f"groups (--flexsp-degrees), {last_way_out}",
    )
