"""The command: where the text and the reasons go, and what ends it with which exit code."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from megatron_flexsp.convert.command import convert

from .conftest import LAUNCHES

SCRIPT = LAUNCHES / "arrays.sh"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(convert, [str(argument) for argument in arguments])


def test_the_text_goes_to_stdout_and_the_reasons_to_stderr() -> None:
    done = run(SCRIPT)
    assert done.exit_code == 0
    assert done.stdout.startswith("#!/bin/bash")
    assert "-m megatron_flexsp.run pretrain_gpt.py" in done.stdout
    reasons = done.stderr.splitlines()
    assert any(line.startswith('  line 21: --context-parallel-size "$CP" taken out: its ranks') for line in reasons)
    assert "2 data-parallel ranks become 8" in done.stderr


def test_output_is_written_with_the_input_s_rights_and_the_input_stays(tmp_path: Path) -> None:
    before, output = SCRIPT.read_bytes(), tmp_path / "out.sh"
    done = run(SCRIPT, "--output", output, "--diff")
    assert done.exit_code == 0
    assert output.stat().st_mode == SCRIPT.stat().st_mode
    assert SCRIPT.read_bytes() == before
    assert done.stdout.startswith(f"--- {SCRIPT}\n+++ {output}\n")
    assert '-    --context-parallel-size "$CP"   # one' in done.stdout
    again = run(output, "--diff")
    assert (again.exit_code, again.stdout) == (0, "")
    assert "nothing to change" in again.stderr


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    done = run(SCRIPT, "--check", "--output", tmp_path / "out.sh")
    assert (done.exit_code, done.stdout, list(tmp_path.iterdir())) == (0, "", [])
    assert "taken out" in done.stderr


def test_what_is_refused_writes_nothing_and_ends_with_2(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text("torchrun pretrain_gpt.py --seq-length 8 --perform-rl-step --fim-data\n")
    done = run(script, "--output", tmp_path / "out.sh")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n  - line 1: --") == 2
    assert not (tmp_path / "out.sh").exists()


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2\n")
    for path, reason in ((tmp_path / "none.sh", "No such file"), (broken, "it is no YAML"), (tmp_path, "directory")):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_flexsp.cli", "convert", str(path)], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert reason in done.stderr
        assert "Traceback" not in done.stderr


def test_the_mean_length_comes_from_a_data_set_split_at_the_sequence_length(tmp_path: Path) -> None:
    # Three documents, each one sequence; a document's first token is predicted by nothing.
    lengths = np.array([101, 101, 313], "<i4")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 4)
    places = np.zeros(3, "<i8").tobytes() + np.arange(4, dtype="<i8").tobytes()
    (tmp_path / "data.idx").write_bytes(header + lengths.tobytes() + places)
    done = run(SCRIPT, "--data-path", tmp_path / "data")
    # The longest is split at 256 tokens: four sequences of 128 on average.
    assert "32 x 256 = 8,192 tokens before, 64 x 128 = 8,192 on average now (+0.0%)" in done.stderr


def test_a_missing_package_is_named() -> None:
    program = "import sys; sys.modules['tree_sitter'] = sys.modules['torch'] = None; "
    program += f"from megatron_flexsp.cli import main; main(['convert', {str(SCRIPT)!r}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert "tree_sitter" in done.stderr and "pip install 'megatron-flexsp[convert]'" in done.stderr
