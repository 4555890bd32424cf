"""Bad input under the real launcher: every rank ends within seconds, and one readable message says why.

Where a refusal depends on arguments alone, tests/megatron has it for each flag; here, a few of them show that
the message reaches the user. The others need data or process groups, and so a job.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import JOB, ROOT

SCRIPT = ROOT / "scripts" / "pretrain_gpt.py"
ERROR = "megatron-flexsp: error:"

Refused = Callable[..., str]


@pytest.fixture
def refused(torchrun: Callable, documents: Path) -> Refused:
    """Run a job that must be refused, and give the message that it printed."""

    def run(nproc: int, *arguments: str, data: Path | None = None, script: Path = SCRIPT, fresh: bool = False) -> str:
        job = [str(script), *JOB, "--data-path", str(data or documents), "--flexsp", *arguments]
        done = torchrun(nproc, "-m", "megatron_flexsp.run", "--cpu", *job, timeout_seconds=90, check=False, fresh=fresh)
        assert done.returncode != 0, done.stdout
        assert done.stderr.count(ERROR) == 1, done.stderr
        assert ERROR not in done.stdout
        # The launcher has a stack of its own, in torch. None may lead through this package, the script or Megatron.
        files = [file.removeprefix(str(ROOT)) for file in re.findall(r'File "(.+?)"', done.stdout + done.stderr)]
        ours = ("/megatron_flexsp/", "/scripts/", "/tests/")
        assert not [file for file in files if file.startswith(ours) or "/megatron/" in file], done.stderr
        message = done.stderr.split(ERROR)[1].split("\n\n")[0]
        return " ".join(message.split())

    return run


def test_an_unsupported_megatron(refused: Refused, tmp_path: Path) -> None:
    """Found beside the script, as in a checkout."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    for package in (core.parent, core):
        (package / "__init__.py").touch()
    (core / "package_info.py").write_text('__version__ = "0.16.0"\n')
    script = Path(shutil.copy(SCRIPT, tmp_path))
    assert refused(2, script=script, fresh=True) == (
        "Megatron 0.16.0 is too old. Use one that megatron-flexsp works with: Megatron 0.17 to 0.20"
    )


def test_a_missing_solver(tmp_path: Path) -> None:
    """As in a container that has torch and Megatron, and the clone on PYTHONPATH."""
    script = tmp_path / "launch.py"
    script.write_text("import sys; sys.modules['highspy'] = None; from megatron_flexsp.run import main; main()")
    command = [sys.executable, script, "--cpu", SCRIPT, "--flexsp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert f"{ERROR} the planner needs highspy" in done.stderr and "Traceback" not in done.stderr


def test_a_world_that_does_not_divide(refused: Refused) -> None:
    message = refused(3, "--tensor-model-parallel-size", "2", fresh=True)
    assert message.startswith("3 ranks don't divide by --tensor-model-parallel-size 2")


def test_flags_that_do_not_go_together(refused: Refused) -> None:
    message = refused(2, "--context-parallel-size", "2", "--fim-data")
    assert "--context-parallel-size > 1" in message
    assert "Take the flag out" in message
    assert "--fim-data" in message


def test_a_cost_model_with_a_negative_number(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "cost_model.json"
    path.write_text(json.dumps({"schema": "flexsp.cost_model/1", "memory_budget_bytes": -1}))
    message = refused(1, "--flexsp-cost-model", str(path))
    assert message.startswith(f"{path}: ")


def test_a_missing_index(refused: Refused, tmp_path: Path) -> None:
    message = refused(2, data=tmp_path / "nothing")
    assert f"--data-path {tmp_path}/nothing: {tmp_path}/nothing.idx is missing" in message


def test_a_truncated_index(refused: Refused, documents: Path, tmp_path: Path) -> None:
    shutil.copy(f"{documents}.bin", tmp_path / "cut.bin")
    (tmp_path / "cut.idx").write_bytes(Path(f"{documents}.idx").read_bytes()[:-1])
    message = refused(1, data=tmp_path / "cut")
    assert f"{tmp_path}/cut.idx has" in message
    assert "truncated" in message


def test_an_overlong_document_under_error(refused: Refused, documents: Path) -> None:
    message = refused(2, "--flexsp-overlong", "error")
    assert f"{documents}: document 57 has 119 tokens to predict, more than --seq-length 48" in message
    assert "and so have 2 others" in message
    assert "--flexsp-overlong split, truncate or drop" in message


def test_a_sequence_that_no_group_can_hold(refused: Refused, documents: Path) -> None:
    message = refused(2, "--flexsp-max-tokens-per-rank", "20")
    assert f"{documents} (train): a sequence of 48 tokens doesn't fit" in message
    assert "2 ranks with 20 tokens each, 40 in all" in message
    for way_out in ("--seq-length", "--flexsp-max-tokens-per-rank", "--flexsp-degrees", "more ranks", "recompute"):
        assert way_out in message
