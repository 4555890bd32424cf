"""A job measures itself instead of training; the file that it writes plans and trains."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_flexsp.planner import CostModel, plan

from .conftest import JOB, LLAMA, ROOT
from .test_experts import MOE, TWO_PARTS

SCRIPT = str(ROOT / "scripts" / "pretrain_gpt.py")
LAUNCHER = ("-m", "megatron_flexsp.run", "--cpu")
MOCK = ("--mock-data", "--flexsp-mock-lengths", "lognormal:mean=16,sigma=1,min=2,max=48")


def test_a_job_measures_itself(torchrun: Callable, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    job = (*JOB, *LLAMA, *MOCK, "--flexsp-recompute", "--save", str(tmp_path / "saved"))
    job += ("--flexsp-max-tokens-per-rank", "24")
    done = torchrun(
        2, *LAUNCHER, SCRIPT, *job, "--flexsp-profile", str(path), "--flexsp-profile-seconds", "0", "--lr", "1e3"
    )
    assert "predicted against measured" in done.stdout
    assert not (tmp_path / "saved").exists(), "measuring saves no checkpoint"

    cost_model = CostModel.load(path)
    assert set(cost_model.exchange_bandwidth_bytes_per_second) == {2}
    assert cost_model.token_capacity == 24
    assert cost_model.linear_seconds_per_token + cost_model.micro_batch_overhead_seconds > 0
    assert cost_model.step_overhead_seconds >= 0
    # 4 layers of width 32 in fp32 keep well over ten vectors of that width for each token.
    assert 4 * 10 * 32 * 4 < cost_model.activation_bytes_per_token < 4 * 200 * 32 * 4
    # Where they are recomputed, each keeps one of them, and the last one's others and the logits are there at the end.
    assert cost_model.recomputed_activation_bytes_per_token < cost_model.activation_bytes_per_token / 2
    assert 0 <= cost_model.recompute_share < 3
    record = json.loads(path.read_text())["measurement"]
    assert {(point["degree"], point["recomputed"]) for point in record["points"]} == {
        (degree, recomputed) for degree in (1, 2) for recomputed in (False, True)
    }
    assert len(record["check"]) >= 4
    assert record["job"]["num_layers"] == 4
    assert {"date", "device", "network", "versions", "fit", "exchanges", "memory"} <= record.keys()

    kept = {degree: _bytes_per_token(record["memory"], degree) for degree in (1, 2)}
    # What fits must fit whatever the degree. (Here degree 1 keeps more: values as a view of a whole projection.)
    assert kept[1] != kept[2]
    assert cost_model.activation_bytes_per_token == pytest.approx(max(kept.values()))

    made = plan([40, 30, 20, 10, 5, 5], cost_model, 2)
    made.validate([40, 30, 20, 10, 5, 5], 24)

    job = (*JOB, *LLAMA, *MOCK, "--flexsp", "--flexsp-cost-model", str(path), "--flexsp-recompute")
    trained = torchrun(2, *LAUNCHER, SCRIPT, *job, "--train-iters", "2")
    assert "cost model: measured on" in trained.stdout
    capacity = cost_model.recomputed_token_capacity
    assert f"24 tokens a rank and micro-batch, {capacity:,} where activations are recomputed" in trained.stdout
    assert "iteration        2/       2" in trained.stdout


def _bytes_per_token(records: list[dict], degree: int) -> float:
    small, large = (
        record for record in records if record["degree"] == degree and not (record["recomputed"] or record["alone"])
    )
    return (large["activation_bytes"] - small["activation_bytes"]) / (large["tokens"] - small["tokens"])


SHARDED = (
    "--use-megatron-fsdp",
    "--data-parallel-sharding-strategy",
    "optim_grads_params",
    "--ckpt-format",
    "fsdp_dtensor",
    "--use-distributed-optimizer",
)
PIPELINE = ("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1")
"""Interleaved, two chunks a stage."""


@pytest.mark.parametrize(
    ("nproc", "model", "stages", "multiple"),
    [
        (4, (*LLAMA, *PIPELINE, "--flexsp-recompute"), 2, 2),
        (2, (*MOE, *TWO_PARTS, "--flexsp-recompute"), 1, 1),
        (2, (*LLAMA, *SHARDED), 1, 1),
    ],
    ids=["interleaved pipeline", "experts on two ranks", "FSDP"],
)
def test_a_job_whose_ranks_depend_on_each_other_measures_itself(
    nproc: int, model: tuple[str, ...], stages: int, multiple: int, torchrun: Callable, tmp_path: Path
) -> None:
    """Ranks of a pipeline's stages, or of a round: none waits for another for ever."""
    path = tmp_path / "costs.json"
    job = (*LAUNCHER, SCRIPT, *JOB, *model, *MOCK, "--flexsp-max-tokens-per-rank", "24", "--train-iters", "2")
    done = torchrun(nproc, *job, "--flexsp-profile", str(path), "--flexsp-profile-seconds", "0")
    assert "predicted against measured" in done.stdout

    cost_model = CostModel.load(path)
    assert cost_model.token_capacity // (1 if stages == 1 else 3) == 24
    assert cost_model.pipeline_fill_share <= 1
    record = json.loads(path.read_text())["measurement"]
    assert {point["degree"] for point in record["points"]} == {1, 2}
    assert all(point["rounds"] % multiple == 0 for point in record["points"])
    assert record["check"]

    if stages > 1:
        trained = torchrun(nproc, *job, "--flexsp", "--flexsp-cost-model", str(path))
        assert "iteration        2/       2" in trained.stdout
