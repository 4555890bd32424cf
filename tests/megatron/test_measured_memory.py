"""What a rank holds of recomputed micro-batches, from the bytes of measured steps."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import measured_memory
from megatron_flexsp.megatron.measured_memory import MeasuredMemory, MemoryConstants, memory_constants
from megatron_flexsp.megatron.measured_steps import MeasuredBytes
from megatron_flexsp.megatron.profiling import _Measurement

STATE, KEPT, INPUTS, LAYER = 1e6, 272.0, 16.0, 34.0
"""Bytes: of the model; of a token's activations; of what goes into its layers; of one layer while it runs again."""
STAGES, CAPACITY = 4, 1000


@pytest.fixture(autouse=True)
def one_rank_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXSP_DEVICE", "cpu")
    monkeypatch.setattr(measured_memory, "dist", SimpleNamespace(**{**vars(measured_memory.dist), **ONE_RANK}))


ONE_RANK = {"get_rank": lambda: 0, "get_world_size": lambda: 1}
HOSTS = SimpleNamespace(all_reduce=lambda tensor, operation: None)


def sizes(bytes_per_token: float) -> list[tuple[int, MeasuredBytes]]:
    return [(tokens, MeasuredBytes(STATE, bytes_per_token * tokens)) for tokens in (250, 500)]


def capacity(measured: MeasuredMemory, in_flight: int) -> int:
    """Tokens of a recomputed micro-batch, as a job finds them."""
    found = memory_constants([measured], in_flight, CAPACITY, HOSTS)
    assert found.capacity(in_flight) == CAPACITY
    return int((found.budget - found.state) / found.recomputed_per_token) // in_flight


def test_without_a_pipeline_it_is_what_fits() -> None:
    measured = MeasuredMemory(1, kept=sizes(KEPT), recomputed=sizes(INPUTS + LAYER))
    assert capacity(measured, 1) == pytest.approx(CAPACITY * KEPT / (INPUTS + LAYER), abs=5)


@pytest.mark.parametrize("measures_one", [True, False])
def test_a_pipelines_other_micro_batches_may_be_kept(measures_one: bool) -> None:
    alone = {"kept_alone": sizes(KEPT), "recomputed_alone": sizes(INPUTS + LAYER)} if measures_one else {}
    measured = MeasuredMemory(1, sizes(STAGES * KEPT), sizes(STAGES * INPUTS + LAYER), **alone)
    tokens = capacity(measured, STAGES)
    budget = KEPT * (STAGES * CAPACITY + 0.5)
    assert tokens * (INPUTS + LAYER) + (STAGES - 1) * KEPT * CAPACITY <= budget
    assert tokens > 2 * CAPACITY
    if measures_one:
        assert (tokens + 4) * (INPUTS + LAYER) + (STAGES - 1) * KEPT * CAPACITY > budget


def test_recomputing_never_holds_less() -> None:
    noisy = MeasuredMemory(1, sizes(STAGES * KEPT), sizes(STAGES * KEPT * 1.01), sizes(KEPT), sizes(KEPT * 1.02))
    assert capacity(noisy, STAGES) == CAPACITY


def test_the_degree_that_keeps_most_of_a_token_says_what_fits() -> None:
    of_degrees = [
        MeasuredMemory(1, sizes(KEPT), sizes(INPUTS + LAYER)),
        MeasuredMemory(8, sizes(1.1 * KEPT), sizes(INPUTS + 1.5 * LAYER)),
    ]
    found = memory_constants(of_degrees, 1, CAPACITY, HOSTS)
    assert found.per_token == pytest.approx(1.1 * KEPT)
    for measured in of_degrees:
        alone = memory_constants([measured], 1, CAPACITY, HOSTS)
        assert (found.budget - found.state) / found.recomputed_per_token <= (
            alone.budget - alone.state
        ) / alone.recomputed_per_token * (1 + 1e-9)


def test_a_profile_that_finds_no_gain_is_still_one() -> None:
    profile: Any = SimpleNamespace(
        _settings=SimpleNamespace(recompute=True, max_recomputed_tokens_per_rank=None), _capacity=60_845
    )
    per_token = 645_193.1011449757  # 60,845 times this over this is less than 60,845
    memory = MemoryConstants(1e12, 0.0, per_token, per_token)
    assert _Measurement._recomputed_tokens_per_rank(profile, memory) == 60_845
    profile._settings.max_recomputed_tokens_per_rank = 60_000
    with pytest.raises(FlexSPError, match="more than --flexsp-max-recomputed-tokens-per-rank 60000"):
        _Measurement._recomputed_tokens_per_rank(profile, memory)
