"""Run by the tests in two processes: plans travel from the planning rank, and so do its reasons for having none.

Each rank writes what it saw to ``rank<r>.json`` in the folder that is the only argument.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.utils import Split

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.background import Background
from megatron_flexsp.megatron.batches import PlannedBatches, SliceReader, batches_from
from megatron_flexsp.megatron.documents import DocumentDataset, SampleSource
from megatron_flexsp.megatron.mock_documents import MockDocuments
from megatron_flexsp.megatron.packed_samples import Unpacking
from megatron_flexsp.megatron.packed_source import PackedSource
from megatron_flexsp.megatron.plan_channel import PlanChannel
from megatron_flexsp.planner import CostModel, MicroBatch, Plan
from megatron_flexsp.planner.service import PlanningService, PlanRequest
from megatron_flexsp.runtime import Hosts
from tests.megatron.packs import Packs
from tests.megatron.stored import configuration

COST_MODEL = CostModel(
    memory_budget_bytes=1.0,
    model_state_bytes=0.0,
    activation_bytes_per_token=1.0,
    attention_seconds_per_token_squared=1e-6,
    linear_seconds_per_token=1e-4,
    micro_batch_overhead_seconds=1e-3,
    exchange_bytes_per_token=1.0,
    exchange_bandwidth_bytes_per_second={2: 1e4},
)


def plan_for(lengths: np.ndarray) -> Plan:
    """The first sequence on both ranks, the others in turn."""
    alone = tuple(MicroBatch(k % 2, 1, (k,)) for k in range(1, len(lengths)))
    return Plan(2, "nested", (MicroBatch(0, 2, (0,)), *alone), 1.5, 1.25, 0.5, "heuristic")


def shared(channel: PlanChannel, lengths: list[int], planned: Plan | FlexSPError) -> str:
    """The plan that arrives, as JSON, or the error."""
    try:
        return channel.share(np.array(lengths), planned if channel.plans_here else None).to_json()
    except FlexSPError as error:
        return f"error: {error.found} -> {error.remedy}"


def batches(channel: PlanChannel, rank: int, longest: int) -> list[Any]:
    """What a rank gets of batches of four of 14 samples, of which one may be too long for any plan."""
    mock = MockDocuments(np.array([*range(3, 16), longest]), vocabulary=97)
    source = SampleSource(DocumentDataset(mock, None, np.arange(14), None, Split.train, configuration(64)))
    planner = PlanningService(PlanRequest(COST_MODEL, domain_size=2, token_capacity=20)) if rank == 0 else None
    reader = SliceReader(source, rank, slice_multiple=1, reads_tokens=True, gpu=None)
    seen: list[Any] = []
    coming = batches_from(0, 14, lambda consumed: 4)
    background = Background("batches")
    planned = PlannedBatches(source, reader, channel, coming, planner, 2, background)
    try:
        for batch in planned:
            tokens = [[] if item.tokens is None else item.tokens.tolist() for item in batch.micro_batches]
            seen.append([batch.lengths.tolist(), batch.plan.digest(), tokens])
    except FlexSPError as error:
        seen.append(str(error))
    background.finish(limit_seconds=30)  # from here on the channel is used in this thread
    if planner is not None:
        planner.close()
    return seen


def packs(channel: PlanChannel, rank: int, broken_on: int | None = None) -> Any:
    """Lengths of packs and which of them this rank has read; or the error, where one rank can't read one."""
    data = Packs(broken=4 if rank == broken_on else None)
    source = PackedSource(data, "packs", Unpacking(longest=64, positions_count=False, unlearned_count=False))
    try:
        found = source.sequences(range(2, 7), channel)
    except FlexSPError as error:
        return str(error)
    return [found.lengths.tolist(), [[handle.sample, handle.start] for handle in found.handles], data.reads]


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    channel = PlanChannel(Hosts(dist.new_group))
    plan = plan_for(np.array([5, 7, 9]))
    seen = {
        "plan": shared(channel, [5, 7, 9], plan),
        "other lengths": shared(channel, [5, 7, 9 + rank], plan),
        "other order": shared(channel, [5, 7, 9] if rank == 0 else [7, 5, 9], plan),
        "no plan": shared(channel, [5, 7, 9], FlexSPError("sequence 2 is too long", "split it")),
        "plan again": shared(channel, [5, 7, 9], plan),
        "batches": batches(channel, rank, longest=16),
        "packs": packs(channel, rank),
        "packs that stop": packs(channel, rank, broken_on=0),
        "batches that stop": batches(channel, rank, longest=41),
    }
    if rank == 1:
        Plan.digest = lambda self: "what another version would compute"  # type: ignore[method-assign]
    seen["other version"] = shared(channel, [5, 7, 9], plan)
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


main()
