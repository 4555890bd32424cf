"""What a cluster would do: plans and a cost model in, the time of every micro-batch on every stage out.

numpy and highspy only, as the planner: nothing here needs torch or a GPU.
"""

from megatron_flexsp.simulator.events import Operation, Timeline, simulate
from megatron_flexsp.simulator.stragglers import Stragglers

__all__ = ["Operation", "Stragglers", "Timeline", "simulate"]
