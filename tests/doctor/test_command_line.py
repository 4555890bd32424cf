"""What people have at hand, as the doctor understands it."""

import shlex

import pytest

from megatron_flexsp.doctor.command_line import JobCommand, parse_command
from megatron_flexsp.errors import FlexSPError

ARGUMENTS = ("--num-layers", "4", "--flexsp")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", JobCommand(ARGUMENTS)),
        ("pretrain_gpt.py", JobCommand(ARGUMENTS, "pretrain_gpt.py")),
        (
            "torchrun --nnodes 2:4 --nproc_per_node=8 --rdzv-backend c10d -m megatron_flexsp.run a/pretrain_gpt.py",
            JobCommand(ARGUMENTS, "a/pretrain_gpt.py", nodes=4, ranks_per_node=8),
        ),
        (
            "FLEXSP_DEVICE=cpu torchrun --nproc-per-node gpu -m megatron_flexsp.run pretrain_gpt.py",
            JobCommand(ARGUMENTS, "pretrain_gpt.py", cpu=True, variables={"FLEXSP_DEVICE": "cpu"}),
        ),
        ("python -m megatron_flexsp.run --cpu pretrain_gpt.py", JobCommand(ARGUMENTS, "pretrain_gpt.py", cpu=True)),
        (
            "srun -N 4 --ntasks-per-node=8 python -m megatron_flexsp.run pretrain_gpt.py",
            JobCommand(ARGUMENTS, "pretrain_gpt.py", nodes=4, ranks_per_node=8),
        ),
    ],
)
def test_launcher_and_script_are_told_from_the_arguments(typed: str, expected: JobCommand) -> None:
    assert parse_command([*shlex.split(typed), *ARGUMENTS]) == expected


@pytest.mark.parametrize(("typed", "words"), [("bash train.sh", "a shell script"), ("torchrun", "there is no script")])
def test_what_can_not_be_seen_is_refused(typed: str, words: str) -> None:
    with pytest.raises(FlexSPError, match=words):
        parse_command(shlex.split(typed))
