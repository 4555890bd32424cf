"""Cost models that the planner's tests share."""

import pytest

from megatron_flexsp.planner import CostModel


@pytest.fixture
def simple_model() -> CostModel:
    """Round numbers for sums in the head: 100 tokens per rank, overhead 10 s, 1 s a token on one rank."""
    return CostModel(
        memory_budget_bytes=1000,
        model_state_bytes=0,
        activation_bytes_per_token=10,
        attention_seconds_per_token_squared=0,
        linear_seconds_per_token=1,
        micro_batch_overhead_seconds=10,
        exchange_bytes_per_token=8,
        exchange_bandwidth_bytes_per_second={2: 4.0, 4: 2.0},
        exchange_latency_seconds={4: 3.0},
    )


@pytest.fixture
def published_7b() -> CostModel:
    """GPT-7B at 192K on 64 A100s, as the authors of FlexSP (arXiv 2412.01523) published it, in SI units."""
    return CostModel(
        memory_budget_bytes=32212254720,
        model_state_bytes=1910575104,
        activation_bytes_per_token=4698083.84049152,
        attention_seconds_per_token_squared=5.128e-09,
        linear_seconds_per_token=0.0001839576,
        micro_batch_overhead_seconds=0.6293563,
        exchange_bytes_per_token=2097152,
        exchange_bandwidth_bytes_per_second={
            2: 125346775040.0,
            4: 109125304320.0,
            8: 101187584000.0,
            16: 10831790080.0,
            32: 6228541440.0,
            64: 5106565120.0,
        },
    )
