"""Files for Megatron's --yaml-cfg, which become lists of arguments that mean the same to Megatron itself."""

import argparse
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_flexsp.convert.command import convert
from megatron_flexsp.convert.megatron_flags import DIFFERS, flags_by_name
from megatron_flexsp.convert.result import Unconvertible

from .conftest import converted

FILE = Path(__file__).parent / "for_yaml_cfg.yaml"

LIST = """\
# Megatron's arguments, from for_yaml_cfg.yaml, which was for --yaml-cfg.
--flexsp --calculate-per-token-loss --flexsp-max-tokens-per-rank 64

# what is built
--num-layers 2
--hidden-size 64
--num-attention-heads 8
--group-query-attention
--num-query-groups 2  # two sets of keys and values
--attention-dropout 0
--hidden-dropout 0.0
--swiglu
--no-bias-swiglu-fusion
--disable-bias-linear
--norm-epsilon 1.e-6
--apply-layernorm-1p
--no-persist-layer-norm
--no-rope-fusion
# of both ranks
--bf16
--no-gradient-accumulation-fusion
--transformer-impl local
--position-embedding-type rope
--max-position-embeddings 64
--seq-length 64

# the data
--data-path 0.3 "${DATA}/a" b 0.7 /data/c
--split 99,1,0
--tokenizer-type NullTokenizer
--vocab-size 257
--micro-batch-size 1
--global-batch-size 8
--rampup-batch-size 4 4 100
--train-iters 5
--lr 2.5e-4
--lr-decay-style constant  # no "decay"
--save '/results/it is #1'
--save-interval 5
"""


def smaller(text: str) -> bytes:
    """A file with all of a small model in it, and these lines for the last section's end."""
    model = "language_model:\n  num_layers: 2\nmodel_parallel:\n  bf16: True\n"
    return (model + "seq_length: 8\n" + text).encode()


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training import arguments

    from megatron_flexsp.megatron.arguments import add_flexsp_arguments

    return add_flexsp_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def test_each_key_is_the_flag_that_sets_it(parser: argparse.ArgumentParser) -> None:
    result = converted(FILE.read_bytes(), FILE.name)
    assert result.data.decode() == LIST
    args = parser.parse_args(shlex.split(LIST, comments=True))
    assert args.flexsp and args.bf16 and args.group_query_attention and args.layernorm_zero_centered_gamma
    assert (args.num_query_groups, args.layernorm_epsilon, args.swiglu) == (2, 1e-6, True)
    assert not (args.add_bias_linear or args.apply_rope_fusion or args.bias_swiglu_fusion or args.reset_position_ids)
    assert (args.context_parallel_size, args.rampup_batch_size, args.lr) == (1, [4, 4, 100], 2.5e-4)
    assert args.save == "/results/it is #1"


def test_each_change_has_its_line_in_the_file_and_what_is_left_out_is_said() -> None:
    result = converted(FILE.read_bytes(), FILE.name)
    said = "\n".join(result.reasons)
    assert "line 7: num_query_groups: 2 became --group-query-attention --num-query-groups 2" in said
    assert "line 30: --context-parallel-size 2 taken out: its ranks become data-parallel ranks" in said
    assert "line 50: --reset-position-ids taken out" in said
    assert "line 52: --micro-batch-size 2 set to 1" in said
    notes = "\n".join(result.notes)
    assert "left out: params_dtype: worked out by Megatron itself" in notes
    assert "left out: standalone_embedding_stage: unknown to Megatron from 0.17 on, and off" in notes


def test_the_list_converts_to_itself_and_its_batch_is_scaled(tmp_path: Path) -> None:
    output = tmp_path / "arguments.txt"
    done = CliRunner().invoke(convert, [str(FILE), "--output", str(output), "--mean-length", "16"])
    assert done.exit_code == 0
    assert "--global-batch-size 32\n" in output.read_text()
    again = CliRunner().invoke(convert, [str(output), "--diff"])
    assert (again.exit_code, again.stdout) == (0, "")
    misnamed = CliRunner().invoke(convert, [str(FILE), "--output", str(tmp_path / "new.yaml")])
    assert "call it" in str(misnamed.exception) and not (tmp_path / "new.yaml").exists()


REFUSED = [
    ("my_own_key: 3", "line 6: my_own_key: 3: Megatron .* has neither a flag nor a setting"),
    ("num_layers: 4", r"line 6: num_layers: 4: line 2 has num_layers: 2\. Leave one"),
    ("softmax_scale: 0.5", "softmax_scale: 0.5: Megatron has no flag for it"),
    ("lr_decay_style: null", "--lr-decay-style can't be told to be nothing; Megatron takes linear"),
    ("activation_func: relu", "Megatron takes swiglu, squaredrelu or gelu"),
    ("activation_func: gelu\ngated_linear_unit: true", "line 7: gated_linear_unit: true: no flag makes a gated gelu"),
    ("output_layer_init_method: xavier_uniform", "no flag chooses it"),
    ("bf16: maybe", "Leave one of them"),
    ("fp16: maybe", "--fp16 is a switch: true or false"),
    ("lr: true", "--lr takes a value"),
    ("vision:\n  size: 3", "no flag"),
    ("fim_data: true", "line 6: --fim-data"),
]


@pytest.mark.parametrize(("line", "reason"), REFUSED)
def test_what_no_flag_says_is_named(line: str, reason: str) -> None:
    with pytest.raises(Unconvertible, match=reason):
        converted(smaller(line), "config.yaml")


def test_keys_in_other_forms() -> None:
    text = "norm-epsilon: 1e-6\nflexsp: true\nflexsp_schedule: nested\nwindow_size: [8, 0]\nactivation_func: gelu\n"
    text += "bias_activation_fusion: off\nswiglu: true\nsave: null\ninit_method: xavier_uniform\nenable_one_logger: 0\n"
    result = converted(smaller(text), "config.yml")
    flags = result.data.decode().splitlines()
    assert {"--norm-epsilon 1e-6", "--flexsp", "--flexsp-schedule nested", "--window-size 8,0"} <= set(flags)
    assert {"--no-bias-gelu-fusion", "--init-method-xavier-uniform", "--no-one-logger"} <= set(flags)
    assert "--swiglu" not in flags
    assert any("swiglu: true left out: activation_func on line 10 decides" in note for note in result.notes)


def test_letters_beyond_ascii_stay() -> None:
    result = converted(smaller('data_path: ["größe/Ž b"]  # die Größe\n'), "config.yaml")
    assert "--data-path 'größe/Ž b'  # die Größe\n" in result.data.decode()


def test_a_map_whose_key_is_a_list_is_no_such_file() -> None:
    with pytest.raises(Unconvertible, match="nothing to convert"):
        converted(b"[a, b]: {c: 1}\n", "other.yaml")


def test_the_table_is_megatron_s(parser: argparse.ArgumentParser) -> None:
    """The installed release's flags, each as the table has it."""
    rows = [row for rows in flags_by_name().values() for row in rows]
    kinds = {"_StoreTrueAction": "on", "_StoreFalseAction": "off", "BooleanOptionalAction": "both"}
    checked = 0
    for action in parser._actions:
        flag = next((flag for flag in action.option_strings if flag.startswith("--")), "--help")
        if flag.startswith("--flexsp") or flag == "--help":
            continue
        how = kinds.get(type(action).__name__, "one" if action.nargs is None else "many")
        # A flag that sets something else in another release has two rows.
        row = next((row for row in rows if (row.flag, row.name, row.how) == (flag, action.dest, how)), None)
        assert row is not None, f"{flag}: run scripts/megatron_flags.py"
        if row.default is not DIFFERS and type(action.default) in (bool, int, float, str, list, type(None)):
            assert row.default == action.default, flag
        checked += 1
    assert checked > 700
