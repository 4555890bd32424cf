"""Converts scripts, and has bash say what they start: programs that only write down how they were called."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_flexsp.convert.convert import convert_file
from megatron_flexsp.convert.result import Result
from megatron_flexsp.convert.rules import Wishes

LAUNCHES = Path(__file__).parent / "launches"

_RECORDER = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
"""


@dataclass(frozen=True)
class Call:
    """A program that a script started."""

    launcher: list[str]
    """Up to the training script."""
    arguments: list[str]
    """The training script's own."""

    @property
    def flags(self) -> dict[str, list[str]]:
        """Flags with their values; of two the later."""
        flags: dict[str, list[str]] = {}
        for word in self.arguments:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flags[flag] = [value] if equals else []
            else:
                flags[list(flags)[-1]].append(word)
        return flags


Calls = Callable[..., list[Call]]


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    """``calls(script, "--more", CP="2")``: what bash starts, with arguments and variables from outside."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("torchrun", "python"):
        (programs / name).write_text(_RECORDER)
        (programs / name).chmod(0o755)

    def run(script: bytes, *arguments: str, **variables: str) -> list[Call]:
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "script.sh").write_bytes(script)
        recorded = folder / "calls"
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(recorded), **variables}
        done = subprocess.run(
            ["bash", "script.sh", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        found = []
        for line in recorded.read_text().split("\0\n")[:-1]:
            words = line.split("\0")
            script_at = next(place for place, word in enumerate(words) if word.endswith("pretrain_gpt.py"))
            found.append(Call(words[: script_at + 1], words[script_at + 1 :]))
        return found

    return run


def converted(data: bytes, name: str = "train.sh", mean_length: int | None = None) -> Result:
    return convert_file(data, Path(name), Wishes(mean_length))
