"""``flexsp simulate``, as people type it."""

import struct

import numpy as np
import pytest
from click.testing import CliRunner

from megatron_flexsp.cli import flexsp
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import load_cost_model, plan
from megatron_flexsp.planner.batches import with_longest
from megatron_flexsp.simulator.document_lengths import read_document_lengths


@pytest.fixture
def lengths_file(tmp_path):
    lengths = np.random.default_rng(3).lognormal(6, 1.2, 200).astype(int) + 1
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(map(str, lengths)))
    return path


def run(*arguments):
    runner = CliRunner(env={"COLUMNS": "160"})
    return runner.invoke(flexsp, ["simulate", *map(str, arguments)], catch_exceptions=False)


COMMON = ("--cost-model", "gpt-7b-192k", "--ranks", 8, "--global-batch-size", 40)


def rows(result):
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 9}


def test_compares_every_strategy_on_the_same_batches(lengths_file):
    found = rows(run(lengths_file, *COMMON, "--batches", 2, "--static-degree", 8))
    lengths = np.loadtxt(lengths_file, dtype=np.int64)
    batches = [lengths[:40], lengths[40:80]]
    seconds = {}
    for strategy, options in {"static": {"static_degree": 8}, "lockstep": {}, "nested": {}}.items():
        plans = [plan(batch, load_cost_model("gpt-7b-192k"), 8, schedule=strategy, **options) for batch in batches]
        seconds[strategy] = np.mean([made.predicted_seconds for made in plans])
        assert float(found[strategy][0]) == pytest.approx(seconds[strategy], abs=1e-3)
    for strategy in ("lockstep", "nested"):
        assert float(found[strategy][3]) == pytest.approx(seconds["static"] / seconds[strategy], abs=0.01)
    assert "batch-adaptive" in found


def test_says_in_one_sentence_what_it_brings(lengths_file):
    result = run(lengths_file, *COMMON, "--batches", 2, "--compare", "static,nested", "--static-degree", 8)
    speed = rows(result)["nested"][3]
    assert f"nested would train {speed} times as fast as one static degree of 8" in result.stdout


def test_scales_the_batch_with_the_ranks(lengths_file):
    result = run(lengths_file, *COMMON, "--batches", 1, "--compare", "static,nested", "--scale", "16,32")
    scaled = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:3] for row in scaled] == [["1", "batches", "of"], ["16", "80", "static"], ["32", "160", "static"]]


def test_stragglers_slow_every_way_down_and_are_repeatable(lengths_file):
    options = (*COMMON, "--batches", 2, "--compare", "nested")
    slow = (*options, "--straggler-share", 0.5, "--straggler-slowdown", 2)
    even, slowed, again = (run(lengths_file, *arguments) for arguments in (options, slow, slow))
    assert 1.2 * float(rows(even)["nested"][0]) < float(rows(slowed)["nested"][0])
    assert rows(slowed)["nested"][:5] == rows(again)["nested"][:5]


def write_index(path, documents):
    """An index as megatron.core's IndexedDatasetWriter lays it out; each document a list of sequence lengths."""
    sequences = [length for document in documents for length in document]
    pointers = 2 * np.cumsum([0, *sequences])[:-1]
    with path.open("wb") as stream:
        stream.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(sequences), len(documents) + 1))
        stream.write(np.array(sequences, dtype="<i4").tobytes())
        stream.write(pointers.astype("<i8").tobytes())
        stream.write(np.cumsum([0, *map(len, documents)]).astype("<i8").tobytes())


def test_a_data_set_gives_the_tokens_that_its_documents_predict(tmp_path):
    write_index(tmp_path / "corpus.idx", [[5], [3, 4], [], [1], [90]])
    assert read_document_lengths(str(tmp_path / "corpus")).tolist() == [4, 6, 89]


def test_of_a_large_data_set_stretches_from_all_over_it_can_be_read(tmp_path):
    write_index(tmp_path / "large.idx", [[2, index] for index in range(10_000)])  # predicts index + 1 tokens
    read = read_document_lengths(str(tmp_path / "large"), at_most=3072)
    assert len(read) == 3072
    assert len(set(read)) == 3072
    assert (read.min(), read.max()) == (1, 10_000)
    assert len(read_document_lengths(str(tmp_path / "large"), at_most=10_000)) == 10_000


def test_a_data_set_in_the_place_of_lengths(tmp_path):
    write_index(tmp_path / "corpus.idx", [[100 + index] for index in range(50)])
    result = run("--data-path", tmp_path / "corpus", *COMMON, "--compare", "nested")
    assert "1 batches of 40 sequences on 8 ranks; tokens of a sequence: median 12" in result.stdout


@pytest.mark.parametrize(
    ("overlong", "expected"), [("split", [5, 10, 10, 10, 3]), ("truncate", [5, 10, 10]), ("drop", [5, 10])]
)
def test_longer_documents_become_what_training_makes_of_them(overlong, expected):
    assert with_longest(np.array([5, 10, 23]), 10, overlong).tolist() == expected


def test_refuses_what_is_no_index(tmp_path):
    (tmp_path / "text.idx").write_text("hello, this is no index at all, only text")
    write_index(tmp_path / "cut.idx", [[7], [8]])
    whole = (tmp_path / "cut.idx").read_bytes()
    (tmp_path / "cut.idx").write_bytes(whole[:-1])
    for name, words in {"text": "is no Megatron index", "cut": "is truncated", "none": "cannot read"}.items():
        with pytest.raises(FlexSPError, match=f"{name}.idx.* ?{words}"):
            run("--data-path", tmp_path / name, *COMMON)


def test_refuses_a_missing_and_a_double_source(lengths_file):
    for source in ((), (lengths_file, "--data-path", "corpus")):
        with pytest.raises(FlexSPError, match="either a file of LENGTHS or --data-path"):
            run(*source, *COMMON)


def test_refuses_fewer_sequences_than_a_batch(lengths_file):
    with pytest.raises(FlexSPError, match="holds 200 sequences, 0 batches of --global-batch-size 201"):
        run(lengths_file, *COMMON[:-1], 201)


def test_refuses_more_batches_than_there_are_and_takes_all_where_none_are_asked_for(lengths_file):
    with pytest.raises(FlexSPError, match=r"200 sequences, 5 batches .* --batches 6 asks for more\. Ask for 5"):
        run(lengths_file, *COMMON, "--batches", 6)
    options = (*COMMON, "--compare", "nested", "--time-limit", 0)
    assert run(lengths_file, *options, "--skip-batches", 1).stdout.startswith("4 batches of 40")
    assert run(lengths_file, *options[:4], "--global-batch-size", 10, *options[6:]).stdout.startswith("10 batches")


RECOMPUTING = ["static-recompute", "lockstep-recompute", "nested-recompute"]
RECOMPUTE = ("--recompute", "--max-recomputed-tokens-per-rank", 20_000)


def test_recomputing_is_compared_with_static_groups_that_recompute_everything(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(map(str, [50_000, *[900] * 79])))  # 50,000 tokens: 8 ranks, or 4 that recompute
    options = (path, *COMMON, "--batches", 1, *RECOMPUTE)
    found = rows(run(*options))
    assert list(found) == ["static", "batch-adaptive", "lockstep", "nested", *RECOMPUTING]
    costs = load_cost_model("gpt-7b-192k")
    batch = [50_000, *[900] * 39]
    again = plan(batch, costs, 8, recomputed_token_capacity=20_000)
    assert float(found["nested-recompute"][0]) == pytest.approx(again.predicted_seconds, abs=1e-3)
    everywhere = plan(batch, costs.always_recomputed(), 8, schedule="static", static_degree=4, token_capacity=20_000)
    assert float(found["static-recompute"][0]) == pytest.approx(everywhere.predicted_seconds, abs=1e-3)

    path.write_text("\n".join(map(str, [60_000, *[900] * 79])))  # no group keeps 60,000
    result = run(*options)
    assert list(rows(result)) == RECOMPUTING
    assert "as fast as one static degree of 4, all recomputed" in result.stdout


def test_recomputing_needs_a_capacity(lengths_file):
    with pytest.raises(FlexSPError, match="--max-recomputed-tokens-per-rank"):
        run(lengths_file, *COMMON, "--recompute")
    with pytest.raises(FlexSPError, match="needs --recompute"):
        run(lengths_file, *COMMON, "--compare", "nested-recompute")


def test_a_capacity_can_be_given(lengths_file):
    costs, lengths = load_cost_model("gpt-7b-192k"), np.loadtxt(lengths_file, dtype=np.int64)[:40]
    options = (*COMMON, "--batches", 1, "--compare", "nested", "--max-tokens-per-rank")
    assert lengths.max() <= 8 * 3000
    given = plan(lengths, costs, 8, token_capacity=3000).predicted_seconds
    assert float(rows(run(lengths_file, *options, 3000))["nested"][0]) == pytest.approx(given, abs=1e-3)
    with pytest.raises(FlexSPError, match="or raise --max-tokens-per-rank if memory allows"):
        run(lengths_file, *options, 100)


def test_the_error_names_the_capacity_of_static_groups_that_recompute_everything(lengths_file):
    capacities = ("--max-tokens-per-rank", 90, "--recompute", "--max-recomputed-tokens-per-rank", 100)
    with pytest.raises(FlexSPError, match="raise --max-recomputed-tokens-per-rank if memory allows"):
        run(lengths_file, *COMMON, "--batches", 1, "--compare", "static-recompute", *capacities)
