"""Converted arguments against Megatron itself: its parser, its defaults, and two steps on two CPU ranks."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_flexsp.compatibility import EXPERT_REFUSALS, JOB_REFUSALS, RECOMPUTE_REFUSALS, Refusal, refusals
from megatron_flexsp.convert import plain
from megatron_flexsp.convert.arguments import KNOWN, namespace, values_taken
from megatron_flexsp.convert.result import Unconvertible

from .conftest import LAUNCHES, Calls, converted

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in LAUNCHES.glob("*.sh"))

TRAINS = """
HEADS=4
MODEL=(
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads $HEADS  # small
    --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope --swiglu --disable-bias-linear
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 8
)
torchrun --nproc-per-node 2 pretrain_gpt.py "${MODEL[@]}" \\
    --micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3 --lr-decay-style constant \\
    --mock-data --split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1 --eod-mask-loss \\
    --context-parallel-size 2
"""


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training import arguments

    from megatron_flexsp.megatron.arguments import add_flexsp_arguments

    return add_flexsp_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_megatron_reads_the_arguments_and_flexsp_takes_them(
    name: str, calls: Calls, parser: argparse.ArgumentParser
) -> None:
    (call,) = calls(converted((LAUNCHES / name).read_bytes()).data, SLURM_NNODES="1")
    args = parser.parse_args(call.arguments)
    assert args.flexsp
    assert args.seq_length <= args.flexsp_max_tokens_per_rank * 8
    assert [refusal.subject for refusal in refusals(args)] == []


def test_the_flags_that_are_known_are_megatron_s(parser: argparse.ArgumentParser) -> None:
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    for flag, known in KNOWN.items():
        switch = known.kind in ("on", "off")
        assert values_taken(flag) == {"on": 0, "off": 0, "list": None}.get(known.kind, 1), flag
        action = actions.get(flag)
        if action is None:
            continue  # of another Megatron version
        default = None if known.kind == "on" and action.default is False else action.default
        assert (action.dest, default) == (known.name, known.default), flag
        assert (action.nargs in ("+", "*"), action.nargs == 0) == (known.kind == "list", switch), flag


@pytest.mark.parametrize(
    "entry", [*JOB_REFUSALS, *EXPERT_REFUSALS, *RECOMPUTE_REFUSALS], ids=lambda entry: entry.flags[0]
)
def test_what_is_refused_at_start_up_is_either_mended_or_refused_here(entry: Refusal) -> None:
    for flag in entry.flags:
        assert flag in KNOWN
        value = " 3" if values_taken(flag) != 0 else ""
        start = b"--seq-length 8 --num-layers 1 --lr 1 --num-experts 2 "
        start += b"--flexsp-recompute " if entry in RECOMPUTE_REFUSALS else b""
        words = start + f"{flag}{value}\n".encode()
        if entry.mendable:
            after = converted(words, "arguments.txt").data
            assert f"{flag}{value}\n".encode() not in after or flag == "--calculate-per-token-loss"
        elif entry.applies(namespace(plain.read_list(words).job.arguments)):
            with pytest.raises(Unconvertible, match=re.escape(entry.reason)):
                converted(words, "arguments.txt")


def test_a_converted_script_trains(torchrun: Callable, calls: Calls, tmp_path: Path) -> None:
    result = converted(TRAINS.encode())
    (call,) = calls(result.data)
    assert call.launcher == ["torchrun", "--nproc-per-node", "2", "-m", "megatron_flexsp.run", "pretrain_gpt.py"]
    script = str(ROOT / "scripts" / "pretrain_gpt.py")
    lengths = ["--flexsp-mock-lengths", "lognormal:mean=24,sigma=1,min=4,max=64"]
    done = torchrun(2, "-m", "megatron_flexsp.run", "--cpu", script, *call.arguments, *lengths)
    assert re.findall(r"iteration +(\d+)/ +2 .*lm loss: \d", done.stdout) == ["1", "2"]
    assert "[flexsp] iteration        2 | nested" in done.stdout
