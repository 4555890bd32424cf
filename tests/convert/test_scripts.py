"""Launch scripts of every form: what bash starts before and after, and that nothing else in them changed."""

import difflib
from pathlib import Path

import pytest

from megatron_flexsp.convert.result import Unconvertible

from .conftest import LAUNCHES, Calls, converted

NEW = {"--flexsp": [], "--calculate-per-token-loss": []}


def expected(capacity: int, **others: list[str] | None) -> dict[str, list[str] | None]:
    """What is new or other in a converted command; None where a flag is taken out."""
    named = {"--" + name.replace("_", "-"): values for name, values in others.items()}
    return {**NEW, "--flexsp-max-tokens-per-rank": [str(capacity)], **named}


TOUCHED = [
    "context",
    "cp-comm",
    "eod-mask",
    "reset",
    "micro-batch",
    "global-batch",
    "align",
    "average",
    "launch",
    "pretrain-gpt",
    "args:",
]
"""What a changed line has in it; the last line of a continued command may lose its mark."""

# Script, variables from outside, what changes among the arguments.
CHANGES = [
    (
        "arrays.sh",
        {},
        expected(128, micro_batch_size=["1"], context_parallel_size=None, cp_comm_type=None, eod_mask_loss=None),
    ),
    (
        "arrays.sh",
        {"SEQ_LENGTH": "4096", "CP": "8", "PROFILE": "1"},
        expected(1024, micro_batch_size=["1"], context_parallel_size=None, cp_comm_type=None, eod_mask_loss=None),
    ),
    (
        "continued.sh",
        {},
        expected(
            256,
            micro_batch_size=["1"],
            context_parallel_size=None,
            reset_position_ids=None,
            reset_attention_mask=None,
        ),
    ),
    ("evaluated.sh", {}, expected(32, context_parallel_size=None)),
    ("evaluated.sh", {"OVERLAP": "1"}, expected(32, context_parallel_size=None, no_align_grad_reduce=None)),
    ("launcher_variable.sh", {"SLURM_NNODES": "1"}, expected(128, micro_batch_size=["1"])),
    ("heredoc.sh", {}, expected(64, context_parallel_size=None)),
    ("functions.sh", {}, expected(32, context_parallel_size=None, cp_comm_type=None)),
    ("functions.sh", {"MODEL": "large"}, expected(8, context_parallel_size=None, cp_comm_type=None)),
    ("rings.sh", {}, expected(128, context_parallel_size=None, global_batch_size=["8"])),
]


@pytest.mark.parametrize(("name", "variables", "changes"), CHANGES)
def test_bash_starts_the_same_but_for_what_flexsp_needs(
    name: str, variables: dict[str, str], changes: dict[str, list[str] | None], calls: Calls
) -> None:
    data = (LAUNCHES / name).read_bytes()
    (before,), (after,) = calls(data, **variables), calls(converted(data).data, **variables)
    assert after.flags == {flag: value for flag, value in (before.flags | changes).items() if value is not None}
    launcher = [*before.launcher[:-1], "-m", "megatron_flexsp.run", before.launcher[-1]]
    assert after.launcher == [word.replace("distributed.launch", "distributed.run") for word in launcher]


def test_arguments_from_outside_still_arrive(calls: Calls) -> None:
    data = converted((LAUNCHES / "arrays.sh").read_bytes()).data
    (call,) = calls(data, "--save", "a folder")
    assert call.arguments[-2:] == ["--save", "a folder"]


def test_a_script_without_torchrun_keeps_its_output_redirected(calls: Calls) -> None:
    (call,) = calls(converted((LAUNCHES / "alone.sh").read_bytes()).data)
    assert call.launcher == ["python", "-u", "-m", "megatron_flexsp.run", "pretrain_gpt.py"]
    assert call.flags["--flexsp-max-tokens-per-rank"] == ["128"]


@pytest.mark.parametrize("path", sorted(LAUNCHES.iterdir()), ids=lambda path: path.name)
def test_what_is_not_changed_stays_and_a_second_conversion_changes_nothing(path: Path) -> None:
    data = path.read_bytes()
    once = converted(data, path.name)
    assert once.reasons
    assert converted(once.data, path.name).data == once.data
    assert converted(once.data, path.name).reasons == []
    before, after = data.decode().splitlines(), once.data.decode().splitlines()
    gone = [line[2:] for line in difflib.ndiff(before, after) if line.startswith("- ")]
    for line in gone:
        named = line.replace("_", "-")
        assert any(part in named for part in TOUCHED) or line.endswith(" \\") or line.strip().startswith('- "'), line
    for line in before:
        comment = line.partition("#")[2]
        assert comment in once.data.decode()


def test_windows_line_ends_and_letters_beyond_ascii_are_kept() -> None:
    data = "# größe\n--num-layers 2\n--seq-length 8 # länge\n--context-parallel-size 2\n--lr 1\n".encode()
    after = converted(data, "arguments.txt").data
    assert "# länge\n--lr 1\n".encode() in after
    script = b"torchrun pretrain_gpt.py \\\r\n  --seq-length 8 \\\r\n  --context-parallel-size 2 \\\r\n  --lr 1\r\n"
    after = converted(script).data
    assert after.count(b"\r\n") == after.count(b"\n") == 4
    assert b"context-parallel" not in after


class TestGlobalBatch:
    def test_keeps_its_tokens(self, calls: Calls) -> None:
        data = (LAUNCHES / "arrays.sh").read_bytes() + b""
        result = converted(data, mean_length=40)
        (call,) = calls(result.data)
        # 32 x 256 tokens are 204.8 documents of 40 tokens; 8 ranks, and so 8 of them data-parallel.
        assert call.flags["--global-batch-size"] == ["208"]
        assert any("8,192 tokens before, 208 x 40 = 8,320 on average now (+1.6%)" in why for why in result.reasons)
        (longer,) = calls(result.data, SEQ_LENGTH="512")
        assert longer.flags["--global-batch-size"] == ["408"]

    def test_stays_where_nothing_is_known_of_the_documents(self) -> None:
        result = converted((LAUNCHES / "arrays.sh").read_bytes())
        assert any(note.startswith("--global-batch-size 32 counts documents now") for note in result.notes)

    def test_samples_and_ramp_are_scaled_with_it(self, calls: Calls) -> None:
        data = (
            b"torchrun --nproc_per_node 4 pretrain_gpt.py --num-layers 2 --seq-length 100 --lr 1 --micro-batch-size 1 "
            b"--global-batch-size 16 --rampup-batch-size 4 4 1000 --train-samples 3000 --context-parallel-size 2\n"
        )
        (call,) = calls(converted(data, mean_length=50).data)
        assert call.flags["--global-batch-size"] == ["32"]
        assert call.flags["--rampup-batch-size"] == ["8", "8", "2000"]
        assert call.flags["--train-samples"] == ["6000"]

    def test_is_raised_to_what_the_ranks_divide(self, calls: Calls) -> None:
        data = (
            b"GBS=2\ntorchrun --nproc_per_node 8 pretrain_gpt.py --num-layers 2 --seq-length 64 --lr 1 "
            b"--micro-batch-size 1 --global-batch-size $GBS --context-parallel-size 4\n"
        )
        (call,) = calls(converted(data).data)
        assert call.flags["--global-batch-size"] == ["8"]


REFUSED = [
    ("deepspeed train.py --num-layers 2 --seq-length 8 --micro-batch-size 1 --lr 1", "deepspeed starts it"),
    ("torchrun pretrain_bert.py --num-layers 2 --seq-length 8 --lr 1", "pretrain_bert.py: it doesn't train a GPT"),
    ("torchrun pretrain_gpt.py --seq-length 8 --deepspeed", "line 1: --deepspeed: DeepSpeed's engine"),
    ("torchrun finetune_gpt.py --seq-length 8 --lr 1", "finetune_gpt.py: it has data sets of its own"),
    ("torchrun tools/run_text_generation_server.py --num-layers 2", "nothing to convert: .*server.py"),
    ("echo hello", "nothing to convert: no command that starts"),
    ("torchrun pretrain_gpt.py --num-layers 2 $ARGS", r"--seq-length isn't there to see.*Arguments may be in \$ARGS"),
    ("torchrun pretrain_gpt.py --yaml-cfg $A/x.yaml", r"--yaml-cfg: .* `flexsp convert \$A/x.yaml --output arguments"),
    ("M=1\ntorchrun pretrain_gpt.py --seq-length 8 --rotary-base-per-layer $M", "line 2: --rotary-base-per-layer"),
    (
        "FP4=1\n[ $FP4 = 1 ] && A=--fp4-format=e2m1\ntorchrun pretrain_gpt.py --seq-length 8 $A",
        "line 2: --fp4-format",
    ),
    (
        "torchrun --nproc-per-node 2 pretrain_gpt.py --seq-length 64 --micro-batch-size 1 --num-attention-heads 2 "
        "--tensor-model-parallel-size 2 --window-size 8,0 --context-parallel-size 8",
        "a sequence of 64 tokens needs 8 ranks of 8 tokens, and there are 1 data-parallel ranks",
    ),
]


@pytest.mark.parametrize(("script", "reason"), REFUSED)
def test_what_can_not_be_converted_is_named(script: str, reason: str) -> None:
    with pytest.raises(Unconvertible, match=reason):
        converted(script.encode())


FORMS = [
    # What a script has, and the capacity that bash works out; 4096 tokens, 2 samples, 4 ranks of context parallelism.
    ("cmd=$(cat <<X\n $A\nX\n)\ntorchrun pretrain_gpt.py $cmd", "2048"),
    ('CMD=(torchrun\n  pretrain_gpt.py\n  $A)\n"${CMD[@]}" > log 2>&1', "2048"),
    ('f() { n=$1; shift; torchrun --nproc_per_node $n "$@"; }\nif ! f 8 pretrain_gpt.py $A; then exit 1; fi', "2048"),
    ("for c in 4; do torchrun pretrain_gpt.py $A --context-parallel-size $c; done", "2048"),
    ("CP=4; [[ $N -gt 1 ]] && CP=8\ntorchrun pretrain_gpt.py $A --context-parallel-size ${CP}", "2048"),
    ("declare -A C=([cp]=4)\ntorchrun pretrain_gpt.py $A --context-parallel-size ${C[cp]}", "2048"),
    ("export O='$A'\nbash -c 'torchrun pretrain_gpt.py $O'", "2048"),
    (
        'C="torchrun pretrain_gpt.py $A"\nif [ -n "$W" ]; then C="$C --wandb-project x"; fi\n'
        'if [ "$N" = yes ]; then C="nsys profile $C --profile"; fi\nbash -c "RANK=\\$R $C"',
        "2048",
    ),
    (
        'if [[ ${L:-a} == a ]]; then C="torchrun x/pretrain_gpt.py $A"; else C="python x/pretrain_gpt.py $A"; fi\n'
        'if [[ $P == t ]]; then C+=" --profile"; elif [[ $P == h ]]; then C="prof -d x $C"; fi\n${C}',
        "2048",
    ),
    ('SCRIPT=./pretrain_gpt.py\nwhile [ $# -gt 0 ]; do shift; done\ntorchrun "$SCRIPT" $A || exit 1', "2048"),
]


def test_a_command_in_an_option_is_converted() -> None:
    script = (
        b'sbatch --wrap="torchrun pretrain_gpt.py --num-layers 2 --seq-length 64 --lr 1 --context-parallel-size 2"\n'
    )
    after = converted(script).data.decode()
    assert after.startswith('sbatch --wrap="torchrun -m megatron_flexsp.run pretrain_gpt.py --flexsp ')
    assert after.endswith(' --flexsp-max-tokens-per-rank 32 --num-layers 2 --seq-length 64 --lr 1"\n')


def test_arguments_that_another_script_starts_with() -> None:
    script = b"""RUN=(--nnodes 2 --nproc_per_node 8)
ALL=()
ALL+=(  # the model
    --num-layers 2
    --seq-length $((64 * 2)) --micro-batch-size 2
)
DATA=(--lr 1 --eod-mask-loss)
ALL+=(${DATA[@]})
"""
    once = converted(script)
    assert once.data.decode().splitlines()[2:7] == [
        "ALL+=(  # the model",
        "    --flexsp --calculate-per-token-loss --flexsp-max-tokens-per-rank $((2 * (64 * 2)))",
        "    --num-layers 2",
        "    --seq-length $((64 * 2)) --micro-batch-size 1",
        ")",
    ]
    assert b"\nDATA=(--lr 1)\n" in once.data
    assert converted(once.data).data == once.data
    no_training = b"A=(--num-layers 2 --seq-length 8 --tensor-model-parallel-size 2)"
    for few in (b"RUN=(--nnodes 2)", b"A=(--lr 1 --num-layers 2 --train-iters 3)", no_training):
        with pytest.raises(Unconvertible, match="nothing to convert"):
            converted(few)


@pytest.mark.parametrize(("form", "capacity"), FORMS)
def test_forms_of_launches(form: str, capacity: str, calls: Calls) -> None:
    written = "--num-layers 2 --seq-length 4096 --micro-batch-size 2 --lr 1"
    if "--context-parallel-size" not in form:
        written += " --context-parallel-size 4"
    script = form.replace("$A", written).encode() + b"\n"
    once = converted(script).data
    assert converted(once).data == once
    (call,) = calls(once)
    assert call.launcher[-3:-1] == ["-m", "megatron_flexsp.run"]
    assert call.flags["--flexsp-max-tokens-per-rank"] == [capacity]
    assert call.flags["--micro-batch-size"] == ["1"]
    assert "--context-parallel-size" not in call.flags


def test_all_reasons_come_at_once() -> None:
    script = b"torchrun pretrain_gpt.py --seq-length 8 --perform-rl-step --fp4-format e2m1 --use-torch-fsdp2"
    with pytest.raises(Unconvertible) as refusal:
        converted(script)
    assert len(refusal.value.problems) == 3


def test_a_branch_that_is_not_taken_is_converted_and_named_but_does_not_refuse(calls: Calls) -> None:
    script = (
        b'if [ "$FP4" = 1 ]; then\n  MORE="--fp4-format e2m1 --context-parallel-size 4"\nfi\n'
        b"torchrun pretrain_gpt.py --num-layers 2 --seq-length 8 --lr 1 $MORE\n"
    )
    result = converted(script)
    assert any("refused if it comes to that: line 2" in note for note in result.notes)
    (call,) = calls(result.data, FP4="1")
    assert "--context-parallel-size" not in call.flags


def test_a_loss_that_is_divided_by_more_ranks_than_before_is_noted() -> None:
    def noted(more: str) -> bool:
        script = f"torchrun pretrain_gpt.py --num-layers 2 --seq-length 8 --lr 1 --num-experts 8 {more}"
        return any("multiply its --moe-aux-loss-coeff" in note for note in converted(script.encode()).notes)

    balancing = "--moe-router-load-balancing-type seq_aux_loss global_aux_loss"
    assert noted(f"{balancing} --context-parallel-size 2")
    assert not noted(balancing)
    assert not noted("--context-parallel-size 2")


class TestRecomputingEverything:
    """It stays; what could take its place is noted, with the tokens that a rank holds now."""

    FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

    @staticmethod
    def noted(arguments: str) -> list[str]:
        script = f"torchrun pretrain_gpt.py --num-layers 2 --seq-length 4096 --lr 1 {arguments}"
        result = converted(script.encode())
        assert arguments.encode() in result.data or "--context-parallel-size" in arguments
        return [note for note in result.notes if "--flexsp-recompute" in note]

    def test_is_noted_once_with_the_capacity(self) -> None:
        (note,) = self.noted(f"--micro-batch-size 1 --context-parallel-size 2 {self.FULL}")
        assert note.startswith("line 1: --recompute-granularity full stays")
        assert "--flexsp-recompute --flexsp-max-recomputed-tokens-per-rank 2048 in its place" in note
        (note,) = self.noted(f"--flexsp-max-tokens-per-rank $TOKENS {self.FULL}")
        assert "--flexsp-max-recomputed-tokens-per-rank (what --flexsp-max-tokens-per-rank has now) in its" in note
        (note,) = self.noted(f"--flexsp-max-tokens-per-rank 24 --pipeline-model-parallel-size 2 {self.FULL}")
        assert "-recomputed-tokens-per-rank 24 (less, since a pipeline's other micro-batches keep theirs) in" in note
        (note,) = self.noted(self.FULL[:-1] + "4")
        assert "-recomputed-tokens-per-rank 4096 or so, since it recomputes layer by layer in its place" in note
        (note,) = self.noted(f"{self.FULL} --num-experts 8 --expert-model-parallel-size 2")
        (note,) = self.noted(f"--flexsp --calculate-per-token-loss --flexsp-max-tokens-per-rank 512 {self.FULL}")
        assert "-recomputed-tokens-per-rank 512 in its place" in note  # of a FlexSP job too
        yaml = "seq_length: 64\nnum_layers: 2\nlr: 1\nnum_attention_heads: 4\nrecompute_granularity: full\n"
        assert any(
            "-recomputed-tokens-per-rank 64 in its place" in note for note in converted(yaml.encode(), "a.yaml").notes
        )

    @pytest.mark.parametrize(
        "arguments",
        [
            "--recompute-granularity selective",
            f"{FULL} --distribute-saved-activations",
        ],
    )
    def test_is_not_noted_where_nothing_can_take_its_place(self, arguments: str) -> None:
        assert self.noted(arguments) == []


def test_an_argument_of_another_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "common.sh").write_text("ARGS='--num-layers 2 --seq-length 64 --lr 1 --context-parallel-size 2'\n")
    script = tmp_path / "train.sh"
    script.write_text('source "$(dirname "$0")/common.sh"\ntorchrun pretrain_gpt.py $ARGS\n')
    with pytest.raises(Unconvertible, match="stands in a file that this script reads"):
        converted(script.read_bytes(), str(script))
