"""The planner: sequence lengths and a cost model in, a plan out. numpy and highspy only; no torch, no Megatron.

>>> from megatron_flexsp.planner import CostModel, plan
>>> cost_model = CostModel.load("cost_model.json")  # doctest: +SKIP
>>> plan([8192, 500, 700], cost_model, domain_size=8).to_json()  # doctest: +SKIP
"""

from megatron_flexsp.planner.blocks import first_ranks, is_aligned_block, legal_degrees
from megatron_flexsp.planner.capacity import narrowest_degree, usable_capacity
from megatron_flexsp.planner.cost_model import CostModel
from megatron_flexsp.planner.laws import PlanError, slice_tokens
from megatron_flexsp.planner.plans import MicroBatch, Plan
from megatron_flexsp.planner.presets import load_cost_model, preset_names
from megatron_flexsp.planner.solve import ASKABLE_SCHEDULES, plan
from megatron_flexsp.planner.timing import balance, micro_batch_seconds, padding_share, step_seconds

__all__ = [
    "ASKABLE_SCHEDULES",
    "CostModel",
    "MicroBatch",
    "Plan",
    "PlanError",
    "balance",
    "first_ranks",
    "is_aligned_block",
    "legal_degrees",
    "load_cost_model",
    "micro_batch_seconds",
    "narrowest_degree",
    "padding_share",
    "plan",
    "preset_names",
    "slice_tokens",
    "step_seconds",
    "usable_capacity",
]
