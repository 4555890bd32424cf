"""The training script of the quickstart: pretrain_gpt.py whose steps wait for their turn and are timed.

Two such jobs run side by side, one step of each after the other, so that both are measured under the same
conditions. The turns come from quickstart.py through a key-value store.
"""

import json
import os
import runpy
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, training

from megatron_flexsp.megatron import training as flexsp_training
from megatron_flexsp.megatron.batches import PlannedBatch
from megatron_flexsp.megatron.context import Context
from megatron_flexsp.planner import micro_batch_seconds, padding_share

LONGEST_WAIT = timedelta(minutes=10)


def take_turns(train_step: Callable[..., Any], batches: list[tuple[Context, PlannedBatch]]) -> Callable[..., Any]:
    """Rank 0 waits for the turn, and the others for its plan; it reports what the step took and gave."""
    name = os.environ["FLEXSP_QUICKSTART_JOB"]
    store: torch.distributed.TCPStore | None = None
    if int(os.environ["RANK"]) == 0:
        port = int(os.environ["FLEXSP_QUICKSTART_PORT"])
        store = torch.distributed.TCPStore("127.0.0.1", port, timeout=LONGEST_WAIT)

    def step(*args: Any, **kwargs: Any) -> Any:
        if store is None:
            return train_step(*args, **kwargs)
        number = get_args().curr_iteration
        store.set(f"{name}/ready/{number}", "")
        store.wait([f"{name}/turn/{number}"])
        started = time.perf_counter()
        result = train_step(*args, **kwargs)
        seconds = time.perf_counter() - started
        context, batch = batches.pop()
        report = {
            "seconds": seconds,
            "loss": result[0]["lm loss"].item(),
            "tokens": int(batch.lengths.sum()),
            "lengths": batch.lengths.tolist(),
            "padding_share": padding_share(batch.plan, batch.lengths, context.settings.slice_multiple),
            "plan": json.loads(batch.plan.to_json()),
            "micro_batch_seconds": micro_batch_seconds(batch.plan, batch.lengths, context.cost_model).tolist(),
        }
        store.set(f"{name}/done/{number}", json.dumps(report))
        if number + 1 == get_args().train_iters:
            # Eight processes that end would take the cores from the other job's last step.
            store.wait([f"{name}/end"])
        return result

    return step


batches: list[tuple[Context, PlannedBatch]] = []
flexsp_training.log_step = lambda context, batch: batches.append((context, batch))
training.train_step = take_turns(training.train_step, batches)
runpy.run_path(str(Path(__file__).with_name("pretrain_gpt.py")), run_name="__main__")
