"""What a job's arguments become, through Megatron's own parser and validation, in this process."""

import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.version import Version

from megatron_flexsp.doctor.findings import Finding
from megatron_flexsp.doctor.inside import Request
from megatron_flexsp.planner import load_cost_model
from tests.doctor.conftest import JOB, check_wording

Found = dict[str, list[Finding]]
Examine = Callable[..., Found]


@pytest.fixture
def examine(documents: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """``examine("--bf16", ranks=8)``: the findings on a sound job with more arguments, by check."""

    def run(more: str = "", *, ranks: int | None = 8, without: str = "", data: Path = documents) -> Found:
        from megatron_flexsp.doctor.job import examine_job

        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        monkeypatch.setenv("WORLD_SIZE", str(ranks or 1))
        words = [word for word in JOB.split() if word != without] + more.split()
        request = Request((*words, "--data-path", str(data)), world_size=ranks)
        found = defaultdict(list)
        for finding in examine_job(request, lambda doing: None):
            check_wording(finding)
            found[finding.check].append(finding)
        return found

    return run


def errors(found: Found) -> list[Finding]:
    return [finding for findings in found.values() for finding in findings if finding.status == "error"]


def test_a_place_that_has_moved_is_an_error_where_the_job_needs_it(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    monkeypatch.delattr(TopKRouter, "_apply_expert_bias")
    assert [finding.status for finding in examine()["patch-points"]] == ["ok"]
    (finding,) = examine("--num-experts 4")["patch-points"]
    assert finding.status == "error" and "TopKRouter._apply_expert_bias is not there" in finding.found


def test_a_sound_job_is_foreseen(examine: Examine, documents: Path) -> None:
    found = examine()
    assert not errors(found)
    assert "= 8 data-parallel ranks, 24 documents a step" in found["domain"][0].found
    assert found["schedule"][0].found.startswith("nested")
    assert found["degrees"][0].found.startswith("1, 2, 4, 8 of 8 ranks; 8 attention heads")
    # Documents of 48 and 96 become three sequences of 48, the one of 30 stays; they need two ranks of 24 tokens.
    assert "longest 48 tokens" in found["lengths"][0].found
    assert "the longest sequence, 48 tokens, needs 2" in found["capacity"][0].found
    assert found["degrees-needed"][0].found == (
        "1: 93.44% of the sequences, 86.8% of the tokens; 2: 6.56% of the sequences, 13.2% of the tokens"
    )
    assert "1.67% of the documents with 7.3% of the tokens" in found["overlong"][0].found
    assert "split into 2.0 sequences" in found["overlong"][0].found
    assert "s predicted" in found["plan"][0].found
    assert (found["cost-model"][0].status, "estimated" in found["cost-model"][0].found) == ("warning", True)
    assert found["data"][0].found == str(documents)


def test_what_is_held_where_activations_are_recomputed(examine: Examine) -> None:
    found = examine("--flexsp-recompute --flexsp-max-recomputed-tokens-per-rank 48")
    assert not errors(found)
    assert found["capacity"][0].found == (
        "24 tokens a rank and micro-batch, 48 where activations are recomputed; the widest group, 8 ranks, holds 384; "
        "the longest sequence, 48 tokens, needs 1"
    )
    # So few tokens take less than a micro-batch's overhead: all are recomputed, in half as many micro-batches.
    assert "in one batch: 13 x 1; recomputed: 13 x 1; " in found["plan"][0].found
    # A job without plans would keep all in groups of two, or recompute all on single ranks.
    assert " times as fast as static groups of 1, all recomputed if " in found["plan"][0].found
    assert "recompute" not in found
    (problem,) = errors(examine("--flexsp-recompute --recompute-granularity full --recompute-method uniform"))[:1]
    assert "everything is recomputed already" in problem.found


def test_recomputing_everything_where_single_micro_batches_could_be(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    found = examine(full)
    assert not errors(found)
    assert found["recompute"][0].status == "warning"
    assert "with --flexsp-max-recomputed-tokens-per-rank 24, and lower" in found["recompute"][0].remedy
    assert "recomputed" not in found["plan"][0].found
    # A Megatron that recomputes further tokens by no way.
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    monkeypatch.setattr(MultiTokenPredictionLayer, "_checkpointed_forward", lambda self, forward_func: None)
    (problem,) = errors(examine(f"{full} --mtp-num-layers 1"))
    assert (problem.check, "can't recompute further tokens" in problem.found) == ("shape", True)


def test_what_flexsp_refuses_and_what_megatron_does_not_know(examine: Examine) -> None:
    found = examine("--context-parallel-size 2 --fim-data --flexsp-degres 2", without="--flexsp")
    refused = " ".join(finding.found for finding in found["flags"])
    assert "--context-parallel-size > 1" in refused
    assert "--fim-data" in refused
    assert "--flexsp-degres: Megatron's parser doesn't know it; --flexsp-degrees is near" in found["arguments"][0].found
    assert "--flexsp is not among the arguments" in found["flexsp"][0].found


@pytest.mark.parametrize(
    ("more", "ranks", "words"),
    [
        ("--flexsp-degrees 1,3", 8, "3 is not a group size here"),
        ("--tensor-model-parallel-size 4", 6, "6 ranks don't divide by --tensor-model-parallel-size 4"),
        ("--flexsp-plan-ahead 0", 8, "--flexsp-plan-ahead 0: must be at least 1"),
        ("--flexsp-static-degree 2", 8, "needs --flexsp-schedule static; found auto"),
        ("--flexsp-max-recomputed-tokens-per-rank 9", 8, "needs --flexsp-recompute"),
        ("--global-batch-size 20", 8, "--global-batch-size 20 must be a multiple of the 8 data-parallel ranks"),
        ("--flexsp-cost-model nowhere.json", 8, "nowhere.json: cannot read the cost model"),
    ],
)
def test_a_shape_that_can_not_be(more: str, ranks: int, words: str, examine: Examine) -> None:
    (problem,) = errors(examine(more, ranks=ranks))
    assert problem.check == "shape"
    assert words in problem.found


def test_more_ranks_than_heads_are_rings_and_only_where_asked_for(examine: Examine) -> None:
    assert "not offered, for heads or bandwidths: 8" in examine("--num-attention-heads 4")["degrees"][0].found
    asked = examine("--num-attention-heads 4 --flexsp-degrees 1,2,8")["degrees"][0].found
    assert asked.startswith("1, 2, 8 of 8 ranks; 4 attention heads")
    assert "8 by ring attention" in asked


def test_sequences_that_no_group_holds(examine: Examine) -> None:
    (problem,) = errors(examine("--flexsp-max-tokens-per-rank 5"))
    assert problem.check == "capacity"
    assert "a sequence of 48 tokens doesn't fit" in problem.found
    assert "8 ranks with 5 tokens each, 40 in all" in problem.found
    assert "lower --seq-length" in problem.remedy
    assert "--flexsp-recompute" in problem.remedy


def test_a_capacity_that_nobody_knows(examine: Examine) -> None:
    without_flag = JOB.split("--flexsp-max-tokens-per-rank")[0]
    assert "--flexsp " in without_flag
    model = "configs/cost_models/gpt-7b-192k.json"
    (problem,) = errors(examine(f"--flexsp-recompute --flexsp-cost-model {model}"))
    assert (problem.check, problem.found) == (
        "capacity",
        "--flexsp-recompute: what a rank holds of a micro-batch that recomputes is not known",
    )
    assert problem.remedy.startswith("give --flexsp-max-recomputed-tokens-per-rank, what fits under ")


def test_kernels_that_transformer_engine_does_not_have(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    # The last --transformer-impl of two holds.
    job = "--transformer-impl transformer_engine --softmax-type learnable"
    refused = {
        "0.0.0": "install it (pip install 'transformer-engine[pytorch]'), or set --transformer-impl local",
        "2.7.1": "upgrade it, or set --transformer-impl local",
        "2.11.0": "upgrade it to 2.12 or newer",
    }
    for version, remedy in refused.items():
        monkeypatch.setattr("megatron.core.utils.get_te_version", lambda version=version: Version(version))
        (problem,) = examine(job)["flags"]
        assert (problem.status, problem.remedy) == ("error", remedy)


def test_what_overlong_documents_lose(examine: Examine) -> None:
    truncated = examine("--flexsp-overlong truncate")["overlong"][0]
    assert truncated.status == "warning"
    assert "loses 3.7% of all tokens" in truncated.found
    stopped = examine("--flexsp-overlong error")["overlong"][0]
    assert stopped.status == "error"
    assert "the job stops" in stopped.found


def test_a_cost_model_of_another_model_or_of_unknown_origin(examine: Examine, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"

    def cost_model(**measurement: object) -> Finding:
        path.write_text(replace(load_cost_model("gpt-7b-192k"), measurement=measurement).to_json())
        (finding,) = examine(f"--flexsp-cost-model {path}")["cost-model"]
        return finding

    other = cost_model(job={"num_layers": 32, "hidden_size": 32}, domain_size=8)
    assert other.status == "error"
    assert "num-layers 32, here 4" in other.found
    assert "hidden-size" not in other.found
    changed = cost_model(job={"num_layers": 4}, domain_size=8, device="A100", versions={"torch": "1.0"})
    assert changed.status == "warning"
    assert "A100; since then changed: torch 1.0, here" in changed.found
    assert "does not say on which job" in cost_model().found


def test_files_that_are_not_there(examine: Examine, documents: Path, tmp_path: Path) -> None:
    shutil.copy(f"{documents}.idx", tmp_path / "half.idx")
    (tmp_path / "half.bin").write_bytes(b"1234")
    found = examine(
        f"--tokenizer-type GPT2BPETokenizer --vocab-file {tmp_path}/vocab.json --load {tmp_path} "
        f"--exit-on-missing-checkpoint --eval-iters 2 --flexsp-profile {tmp_path}/none/costs.json",
        data=tmp_path / "half",
    )
    assert "half.bin has 4 bytes" in found["data"][0].found
    assert [finding.found for finding in found["tokenizer"]] == [
        f"--vocab-file {tmp_path}/vocab.json is not there",
        "GPT2BPETokenizer without --merge-file",
    ]
    assert "holds no checkpoint" in found["load"][0].found
    assert "there is no folder" in found["profile"][0].found
    assert "leaves no documents" in found["steps"][0].found
    assert len(errors(found)) == 6


def test_packed_samples_are_the_scripts_own(examine: Examine, tmp_path: Path) -> None:
    found = examine("--flexsp-samples packed --eval-iters 1 --split 100,0,0", data=tmp_path / "packs")
    assert not errors(found)
    assert "24 packs a step" in found["domain"][0].found
    assert "the script's own data sets" in found["data"][0].found
    assert "read a few steps before" in found["lengths"][0].found
    assert "the longest sequence, 48 tokens, needs 2" in found["capacity"][0].found
    refused = examine("--flexsp-samples packed --flexsp-overlong drop")
    assert "--flexsp-overlong with --flexsp-samples packed" in refused["shape"][0].found


def test_conversations_are_files_of_messages(examine: Examine, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    path.write_text('{"messages": [{"role": "system", "content": "be kind"}]}\n')
    sft = f"--sft --tokenizer-type SFTTokenizer --tokenizer-model {tmp_path} --sft-tokenizer-prompt-format default"
    found = examine(sft, data=path)
    assert not errors(found)
    assert "known then" in found["lengths"][0].found
    path.write_text('{"text": "no conversation"}\n')
    (problem,) = errors(examine(sft, data=path))
    assert "line 1 has no messages" in problem.found


def test_kernels_that_nothing_brings(examine: Examine) -> None:
    """Found by Megatron only when it builds the model, on the GPUs."""
    assert examine()["model"][0].status == "ok"
    found = examine("--position-embedding-type rope", without="--no-persist-layer-norm")["model"]
    remedies = [problem.remedy.partition(",")[0] for problem in found]
    assert remedies == ["add --no-persist-layer-norm", "add --no-rope-fusion"]


def test_room_for_checkpoints(examine: Examine, tmp_path: Path) -> None:
    (small,) = examine(f"--save {tmp_path}/new/folder --save-interval 2")["checkpoint-room"]
    assert small.status == "ok"
    assert "5 will be kept" in small.found
    huge = "--num-layers 1000 --hidden-size 65536 --num-attention-heads 512"
    (large,) = examine(f"--save {tmp_path} --save-interval 10 {huge}")["checkpoint-room"]
    assert large.status == "error"
    assert "make room" in large.remedy


def test_arguments_that_are_none_and_unknown_ranks(examine: Examine) -> None:
    (problem,) = errors(examine("--num-layers four"))
    assert problem.found == "argument --num-layers: invalid int value: 'four'"
    found = examine(ranks=None)
    assert [problem.check for problem in errors(found)] == ["ranks"]
    assert found["data"][0].status == "ok"
