"""A training script for tests: scripts/pretrain_gpt.py with prescribed plans, gradients saved, nothing else.

FLEXSP_TEST_PLAN names the micro-batches, such as ``[0123] [01] [2] [3]``; sequences are dealt to them in turn, or
stand beside each: ``[01]:4,5``. A filler has none: ``[0]:``. A star has activations recomputed, whatever fits:
``[01]*``. With FLEXSP_TEST_KEPT each forward pass prints the bytes that it leaves for the backward pass.
FLEXSP_TEST_SCRIPT is another script.
"""

import itertools
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_flexsp.planner import MicroBatch, Plan
from megatron_flexsp.planner.service import PlanRequest


class PrescribedPlans:
    """In the place of the planning service."""

    quick_plans = 0

    def __init__(self, request: PlanRequest) -> None:
        self._request = request
        words = [word.partition(":") for word in os.environ["FLEXSP_TEST_PLAN"].split()]
        self._blocks = [[int(rank) for rank in block.strip("[]*")] for block, _, _ in words]
        self._is_recomputed = [block.endswith("*") for block, _, _ in words]
        self._held = [[int(number) for number in held.split(",") if number] for _, _, held in words]
        self._is_dealt = [not colon for _, colon, _ in words]

    def submit(self, lengths: np.ndarray) -> np.ndarray:
        return lengths

    def result(self, lengths: np.ndarray) -> Plan:
        sequences = [list(held) for held in self._held]
        dealt = list(itertools.compress(sequences, self._is_dealt))
        for position, target in zip(range(len(lengths)), itertools.cycle(dealt), strict=False):
            target.append(position)
        micro_batches = tuple(
            MicroBatch(block[0], len(block), tuple(held)) for block, held in zip(self._blocks, sequences, strict=True)
        )
        schedule = self._request.options["schedule"]
        plan = Plan(self._request.domain_size, schedule, micro_batches, 1.0, 1.0, 0.0, "heuristic")
        plan.validate(lengths, self._request.token_capacity, count_multiple=self._request.count_multiple)
        recomputed = zip(micro_batches, self._is_recomputed, strict=True)
        return replace(plan, micro_batches=tuple(replace(item, recomputed=again) for item, again in recomputed))


if "FLEXSP_TEST_PLAN" in os.environ:
    from megatron_flexsp.megatron import context

    context.PlanningService = PrescribedPlans

if "FLEXSP_TEST_KEPT" in os.environ:
    from typing import Any

    from megatron_flexsp.megatron.training import FlexSPTraining
    from megatron_flexsp.profiler.memory import SavedBytes

    forward_step = FlexSPTraining._forward_step

    def measured(self: Any, script_loss: Any, data_iterator: Any, model: Any) -> Any:
        item = next(data_iterator)
        with SavedBytes(model.parameters()) as saved:
            result = forward_step(self, script_loss, iter([item]), model)
        kind = "recomputed" if item.recomputed else "plain"
        print(f"kept {saved.held} bytes of {item.layout.slice_tokens} tokens, {kind}", flush=True)
        return result

    FlexSPTraining._forward_step = measured

if "transformer_engine" in sys.argv:
    # The stand-in for it computes on the CPU, so the stand-in for CUDA needn't choose other kernels.
    from megatron_flexsp.cpu import megatron_patches

    for name in ("transformer_impl", "apply_rope_fusion"):
        del megatron_patches.CPU_KERNELS[name]

if "FLEXSP_TEST_NO_CHECKPOINT" in os.environ:
    # --save is where Megatron's own --save-wgrads-interval writes gradients; a checkpoint is not wanted.
    from megatron.training import training

    training.save_checkpoint_and_time = lambda *args, **kwargs: None

script = Path(__file__).parents[2] / "scripts" / "pretrain_gpt.py"
runpy.run_path(os.environ.get("FLEXSP_TEST_SCRIPT", str(script)), run_name="__main__")
