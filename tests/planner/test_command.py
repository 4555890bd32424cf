"""``flexsp plan``, as people type it."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from megatron_flexsp.cli import flexsp
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel, Plan, load_cost_model, preset_names
from megatron_flexsp.planner.batches import with_longest
from megatron_flexsp.planner.lengths_file import read_lengths


@pytest.fixture
def lengths_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(str(100 + 37 * index % 900) for index in range(40)) + "\n9000\n")
    return path


def run(*arguments):
    runner = CliRunner(env={"COLUMNS": "160"})
    return runner.invoke(flexsp, ["plan", *map(str, arguments)], catch_exceptions=False)


def usual(lengths_file):
    return (lengths_file, "--cost-model", "gpt-7b-192k", "--ranks", 8, "--global-batch-size", 10)


def test_table_has_a_row_for_each_batch_and_a_total(lengths_file):
    result = run(*usual(lengths_file))
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert rows == ["batch", "0", "1", "2", "3", "total"]


@pytest.mark.parametrize("schedule", ["nested", "lockstep", "static", "batch-adaptive"])
def test_output_holds_a_legal_plan_for_each_batch(lengths_file, tmp_path, schedule):
    output = tmp_path / "plans.jsonl"
    options = ("--schedule", schedule, "--skip-batches", 1, "--batches", 2, "--pad-each-to", 128, "--output", output)
    result = run(*usual(lengths_file), *options)
    assert result.exit_code == 0, result.output
    plans = [Plan.from_json(line) for line in output.read_text().splitlines()]
    assert len(plans) == 2
    lengths = [-(-int(line) // 128) * 128 for line in lengths_file.read_text().split()]
    for number, made in enumerate(plans, start=1):
        assert made.schedule == {"batch-adaptive": "static"}.get(schedule, schedule)
        made.validate(lengths[10 * number : 10 * number + 10], load_cost_model("gpt-7b-192k").token_capacity)


@pytest.mark.parametrize("overlong", [None, "split", "truncate", "drop"])
def test_longer_lengths_become_what_training_makes_of_them_before_batches_are_cut(lengths_file, tmp_path, overlong):
    output = tmp_path / "plans.jsonl"
    run(
        *usual(lengths_file),
        "--max-sequence",
        500,
        *(() if overlong is None else ("--overlong", overlong)),
        "--degrees",
        "1,2",
        "--seed",
        3,
        "--time-limit",
        0,
        "--output",
        output,
    )
    lines = output.read_text().splitlines()
    plans = [Plan.from_json(line) for line in lines]
    sequences = with_longest(read_lengths(lengths_file), 500, overlong or "split").tolist()
    assert [json.loads(line)["lengths"] for line in lines] == [
        sequences[10 * number : 10 * number + 10] for number in range(len(sequences) // 10)
    ]
    assert {item.degree for made in plans for item in made.micro_batches} <= {1, 2}


def test_a_static_degree_is_used(lengths_file, tmp_path):
    output = tmp_path / "plans.jsonl"
    run(*usual(lengths_file), "--schedule", "static", "--static-degree", 4, "--batches", 1, "--output", output)
    made = Plan.from_json(output.read_text())
    assert {item.degree for item in made.micro_batches if not item.is_filler} == {4}


def test_a_file_is_as_good_as_a_preset(lengths_file, tmp_path):
    model = tmp_path / "model.json"
    model.write_text(load_cost_model("gpt-13b-384k").to_json())
    result = run(lengths_file, "--cost-model", model, "--ranks", 8, "--global-batch-size", 41)
    assert result.exit_code == 0, result.output


def test_six_presets_ship():
    assert preset_names() == tuple(
        f"gpt-{size}-{longest}" for size in ("13b", "30b", "7b") for longest in ("192k", "384k")
    )
    for name in preset_names():
        assert isinstance(load_cost_model(name), CostModel)
        assert set(load_cost_model(name).exchange_bandwidth_bytes_per_second) == {2, 4, 8, 16, 32, 64}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cost-model", "gpt-9b"), r"gpt-9b is neither a file nor a preset \(gpt-13b-192k, "),
        (("--skip-batches", 9), "none is left after --skip-batches 9"),
        (("--skip-batches", 2, "--batches", 3), "--batches 3 after --skip-batches 2 asks for more. Ask for 2 or fewer"),
        (("--max-sequence", 1, "--overlong", "drop"), "holds 0 sequences, 0 batches of --global-batch-size 10"),
        (("--output", "/nowhere/plans.jsonl"), "--output /nowhere/plans.jsonl: cannot write"),
        (("--degrees", "3"), "degree 3 does not exist in a domain of 8 ranks"),
        (("--static-degree", 2), "static_degree 2 needs schedule static"),
        (("--recompute", "--max-recomputed-tokens-per-rank", 10), "Raise --max-recomputed-tokens-per-rank, or don't"),
        (("--max-recomputed-tokens-per-rank", 10), "needs --recompute"),
        (("--recompute",), "Give --max-recomputed-tokens-per-rank"),
        (
            ("--max-tokens-per-rank", 100),
            r"\(--degrees; .* \(--max-sequence\), or raise --max-tokens-per-rank if memory",
        ),
    ],
)
def test_rejects_what_makes_no_sense(lengths_file, options, message):
    with pytest.raises(FlexSPError, match=message):
        run(*usual(lengths_file), *options)


def test_a_capacity_can_be_given_where_the_cost_model_has_none(lengths_file, tmp_path):
    model, output = tmp_path / "model.json", tmp_path / "plans.jsonl"
    model.write_text(replace(load_cost_model("gpt-7b-192k"), activation_bytes_per_token=0).to_json())
    options = (*usual(lengths_file), "--cost-model", model, "--batches", 1, "--output", output)
    with pytest.raises(FlexSPError, match="Correct the cost model, or give --max-tokens-per-rank"):
        run(*options)
    result = run(*options, "--max-tokens-per-rank", 300, "--recompute", "--max-recomputed-tokens-per-rank", 500)
    assert result.exit_code == 0, result.output
    lengths = [int(line) for line in lengths_file.read_text().split()[:10]]
    Plan.from_json(output.read_text()).validate(lengths, 300, recomputed_token_capacity=500)


def test_rejects_degrees_that_are_no_list(lengths_file):
    result = run(*usual(lengths_file), "--degrees", "2;4")
    assert result.exit_code == 2
    assert "'2;4' is no list such as 2,4,8" in result.output


@pytest.mark.parametrize("line", ["many", "0", "-3", "1.5"])
def test_rejects_a_line_that_is_no_length(tmp_path, line):
    path = tmp_path / "lengths.txt"
    path.write_text(f"10\n\n{line}\n")
    with pytest.raises(FlexSPError, match=f"line 3 is '{line}'"):
        run(path, "--cost-model", "gpt-7b-192k", "--ranks", 1, "--global-batch-size", 1)
