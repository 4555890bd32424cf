"""The command that starts a job, taken apart: launcher, script, and the script's own arguments.

Takes what people have at hand: the arguments alone, the script with them, or all of it with torchrun or srun and
with variables in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_flexsp.errors import FlexSPError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_NODES = ("--nnodes", "-N", "--nodes")
_RANKS_PER_NODE = ("--nproc-per-node", "--ntasks-per-node")
_RANKS = ("-n", "--ntasks", "-np")
_SHELLS = ("bash", "sh", "zsh", "sbatch")


@dataclass(frozen=True)
class JobCommand:
    """What the words of a command say of the job."""

    arguments: tuple[str, ...]
    """Megatron's and FlexSP's flags."""

    script: str | None = None
    cpu: bool = False
    nodes: int | None = None
    ranks_per_node: int | None = None
    """None where the command leaves it open, or says ``gpu`` or ``auto``."""

    ranks: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    """Set in front of the command."""


def parse_command(words: Sequence[str]) -> JobCommand:
    """Take a command apart.

    Raises
    ------
    FlexSPError
        If it starts with a shell script, whose contents can't be known.
    """
    words = list(words)
    variables: dict[str, str] = {}
    while words and (_VARIABLE.match(words[0]) or words[0] == "env"):
        name, equals, value = words.pop(0).partition("=")
        if equals:
            variables[name] = value
    end = 0 if not words or words[0].startswith("-") else _after_script(words)
    launcher, arguments = words[:end], words[end:]
    if words and not words[0].startswith("-") and not end:
        if words[0].rpartition("/")[2] in _SHELLS or words[0].endswith(".sh"):
            raise FlexSPError(
                f"{words[0]}: what a shell script starts can't be seen from outside",
                "give the command that it runs (bash -x shows it), or the arguments of pretrain_gpt.py alone",
            )
        raise FlexSPError(
            f"{words[0]}: there is no script (pretrain_gpt.py) after it",
            "give the arguments of pretrain_gpt.py, or the whole command that starts it",
        )
    return JobCommand(
        arguments=tuple(arguments),
        script=launcher[-1] if launcher else None,
        cpu="--cpu" in launcher or variables.get("FLEXSP_DEVICE") == "cpu",
        nodes=_number(launcher, _NODES),
        ranks_per_node=_number(launcher, _RANKS_PER_NODE),
        ranks=_number(launcher, _RANKS),
        variables=variables,
    )


def _after_script(words: Sequence[str]) -> int:
    """Where the arguments begin: after the first word that names a Python file; 0 if there is none."""
    return next((position for position, word in enumerate(words, start=1) if word.endswith(".py")), 0)


def _number(launcher: Sequence[str], flags: Sequence[str]) -> int | None:
    """The whole number that one of the flags has; of ``1:4`` the larger, which is what the job may use."""
    for position, word in enumerate(launcher):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if name not in flags:
            continue
        if not equals:
            value = launcher[position + 1] if position + 1 < len(launcher) else ""
        value = value.rpartition(":")[2]
        return int(value) if value.isdecimal() else None
    return None
