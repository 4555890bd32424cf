"""The cost model's formula, its JSON and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel


def test_sequence_on_one_rank_exchanges_nothing(simple_model):
    assert simple_model.sequence_seconds([30, 7], 1).tolist() == [30.0, 7.0]


def test_sequence_on_two_ranks_adds_its_exchange(simple_model):
    # 30 / 2 seconds of work, 8 * 30 bytes over 2 ranks of 4 bytes per second.
    assert simple_model.sequence_seconds(30, 2) == 15 + 30


def test_attention_grows_with_the_square(simple_model):
    model = replace(simple_model, attention_seconds_per_token_squared=0.5)
    assert model.sequence_seconds(np.array([2, 4]), 1).tolist() == [2 + 2, 8 + 4]


def test_micro_batch_adds_overhead_and_latency_once(simple_model):
    assert simple_model.micro_batch_seconds([30, 10], 1) == 10 + 40
    assert simple_model.micro_batch_seconds([30, 10], 4) == 10 + 3 + 40 / 4 + 8 * 40 / (4 * 2)
    assert simple_model.micro_batch_seconds([], 1) == 10


def test_recomputing_runs_the_forward_and_its_exchanges_once_more(simple_model):
    model = replace(simple_model, recompute_share=0.5)
    assert model.micro_batch_seconds([30, 10], 1, recomputed=True) == 1.5 * (10 + 40)
    exchanges = 3 + 8 * 40 / (4 * 2)  # latency and bytes: half of both are the forward's
    assert model.micro_batch_seconds([30, 10], 4, recomputed=True) == 1.5 * (10 + 40 / 4) + 1.5 * exchanges
    always = replace(model, recomputed_activation_bytes_per_token=2).always_recomputed()
    assert always.micro_batch_seconds([30, 10], 4) == model.micro_batch_seconds([30, 10], 4, recomputed=True)
    assert always.token_capacity == 500


def test_token_capacity_is_rounded_down(simple_model, published_7b):
    assert simple_model.token_capacity == 100
    assert replace(simple_model, model_state_bytes=1).token_capacity == 99
    assert published_7b.token_capacity == 6449


def test_json_round_trip(tmp_path, published_7b):
    model = replace(
        published_7b,
        pipeline_fill_share=0.0,
        recomputed_activation_bytes_per_token=9e5,
        recompute_share=0.3,
        note="64 A100",
        measurement={"date": "2024-12-02"},
    )
    path = tmp_path / "model.json"
    path.write_text(model.to_json())
    assert CostModel.load(path) == model


def test_missing_latency_is_zero(simple_model):
    data = json.loads(simple_model.to_json())
    del data["exchange_latency_seconds"]
    assert CostModel.from_json(json.dumps(data)).latency_seconds(4) == 0


def test_rejects_a_missing_file(tmp_path):
    with pytest.raises(FlexSPError, match=r"absent\.json: cannot read the cost model \(No such file"):
        CostModel.load(tmp_path / "absent.json")


@pytest.mark.parametrize("text", ["", "{", "nonsense"])
def test_rejects_what_is_no_json(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(FlexSPError, match=r"model\.json: not JSON"):
        CostModel.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "flexsp.cost_model/2"}, "schema is 'flexsp.cost_model/2'"),
        ({"pipeline_fill_share": 1.5}, "pipeline_fill_share is 1.5; expected at most 1"),
        ({"linear_seconds_per_token": None}, "linear_seconds_per_token is None; expected a number"),
        ({"linear_seconds_per_token": "1"}, "linear_seconds_per_token is '1'; expected a number"),
        ({"linear_seconds_per_token": True}, "linear_seconds_per_token is True"),
        ({"linear_seconds_per_token": -1}, "linear_seconds_per_token is -1; expected a finite number"),
        ({"linear_seconds_per_token": float("nan")}, "linear_seconds_per_token is nan"),
        ({"model_state_bytes": float("inf")}, "model_state_bytes is inf"),
        ({"exchange_bandwidth_bytes_per_second": {"2": 0}}, r'bytes_per_second\["2"\] is 0'),
        ({"exchange_bandwidth_bytes_per_second": {"two": 1}}, 'has the degree "two"'),
        ({"exchange_bandwidth_bytes_per_second": {"1": 1}}, 'has the degree "1"'),
        ({"exchange_bandwidth_bytes_per_second": [1]}, "expected an object"),
        ({"exchange_latency_seconds": {"2": -1}}, r'exchange_latency_seconds\["2"\] is -1'),
        ({"liner_seconds": 1}, "unknown key 'liner_seconds'"),
        ({"note": 3}, "note is 3"),
        ({"measurement": "yesterday"}, "measurement is 'yesterday'"),
    ],
)
def test_rejects_a_bad_value_naming_file_and_key(simple_model, change, message):
    data = json.loads(simple_model.to_json()) | change
    with pytest.raises(FlexSPError, match=f"^model.json: .*{message}") as caught:
        CostModel.from_json(json.dumps(data), source="model.json")
    assert "\n" not in str(caught.value)


def test_rejects_a_missing_key(simple_model):
    for key in json.loads(simple_model.to_json()):
        if key in ("schema", "exchange_latency_seconds"):
            continue
        data = json.loads(simple_model.to_json())
        del data[key]
        with pytest.raises(FlexSPError, match=f"cost model: {key} is missing"):
            CostModel.from_json(json.dumps(data))


def test_rejects_a_json_list():
    with pytest.raises(FlexSPError, match="found a JSON list"):
        CostModel.from_json("[]")


def test_rejects_a_degree_without_bandwidth(simple_model):
    with pytest.raises(FlexSPError, match=r"no exchange_bandwidth_bytes_per_second for degree 8 \(it has 2, 4\)"):
        simple_model.sequence_seconds(1, 8)


@pytest.mark.parametrize("change", [{"model_state_bytes": 999}, {"activation_bytes_per_token": 0}])
def test_rejects_a_memory_model_without_room(simple_model, change):
    with pytest.raises(FlexSPError, match="or give `token_capacity`"):
        _ = replace(simple_model, **change).token_capacity


def test_what_fits_recomputed_grows_with_what_fits_as_it_is(simple_model):
    assert simple_model.scaled_recomputed_capacity(30) is None
    eighth = simple_model.activation_bytes_per_token / 8
    model = replace(simple_model, recomputed_activation_bytes_per_token=eighth)
    assert model.scaled_recomputed_capacity(30) == 240
    assert replace(model, activation_bytes_per_token=0).scaled_recomputed_capacity(30) is None
