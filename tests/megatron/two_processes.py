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
from megatron_flexsp.megatron.batches import PlannedBatches, SliceReader, batches_from
from megatron_flexsp.megatron.documents import DocumentDataset, SampleSource
from megatron_flexsp.megatron.mock_documents import MockDocuments
from megatron_flexsp.megatron.plan_channel import PlanChannel
from megatron_flexsp.planner import MicroBatch, Plan
from tests.megatron.stored import configuration


def plan_for(lengths: np.ndarray) -> Plan:
    """The first sequence on both ranks, the others in turn."""
    alone = tuple(MicroBatch(k % 2, 1, (k,)) for k in range(1, len(lengths)))
    return Plan(2, "nested", (MicroBatch(0, 2, (0,)), *alone), 1.5, 1.25, 0.5, "heuristic")


def shared(channel: PlanChannel, lengths: list[int], planned: Plan | FlexSPError) -> str:
    """The plan that arrives, as JSON, or the error."""
    try:
        return channel.share(np.array(lengths), planned if channel.plans_here else None).to_json()
    except FlexSPError as error:
        return f"error: {error}"


def batches(channel: PlanChannel, rank: int, stop_at: int | None = None) -> list[Any]:
    """Batches of four of 14 samples; planning fails on the batch with this number."""
    mock = MockDocuments(np.arange(3, 17), vocabulary=97)
    source = SampleSource(DocumentDataset(mock, None, np.arange(14), None, Split.train, configuration(12)))
    made: list[int] = []

    def make_plan(lengths: np.ndarray) -> Plan:
        made.append(len(made))
        if made[-1] == stop_at:
            raise FlexSPError("no plan for this one")
        return plan_for(lengths)

    reader = SliceReader(source, rank, 1, True, False)
    seen: list[Any] = []
    iterator = PlannedBatches(source, reader, channel, batches_from(0, 14, lambda consumed: 4), make_plan, 2)
    try:
        for batch in iterator:
            tokens = [int(item.tokens.sum()) for item in batch.micro_batches if item.tokens is not None]
            seen.append([batch.lengths.tolist(), batch.plan.digest(), tokens])
    except FlexSPError as error:
        seen.append(str(error))
    return [seen, len(made)]


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    channel = PlanChannel(dist.new_group(backend="gloo"))
    plan = plan_for(np.array([5, 7, 9]))
    seen = {
        "plan": shared(channel, [5, 7, 9], plan),
        "other lengths": shared(channel, [5, 7, 9 + rank], plan),
        "other order": shared(channel, [5, 7, 9] if rank == 0 else [7, 5, 9], plan),
        "no plan": shared(channel, [5, 7, 9], FlexSPError("sequence 2 is too long")),
        "plan again": shared(channel, [5, 7, 9], plan),
        "batches": batches(channel, rank),
        "batches that stop": batches(channel, rank, stop_at=2),
    }
    if rank == 1:
        Plan.digest = lambda self: "what another version would compute"  # type: ignore[method-assign]
    seen["other version"] = shared(channel, [5, 7, 9], plan)
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


main()
