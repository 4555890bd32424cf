"""The file is whole or not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import load_cost_model
from megatron_flexsp.profiler.record import check_writable, write_whole

COST_MODEL = load_cost_model("gpt-7b-192k")


def test_writes_what_loads_again_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    write_whole(str(path), COST_MODEL)
    assert load_cost_model(str(path)) == COST_MODEL
    assert os.listdir(tmp_path) == ["costs.json"]


def test_an_interrupt_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text("old")
    program = (
        "import os, signal, sys\n"
        "from megatron_flexsp.planner import load_cost_model\n"
        "from megatron_flexsp.profiler import record\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGINT)\n"
        "record.write_whole(sys.argv[1], load_cost_model('gpt-7b-192k'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["costs.json"]


def test_refuses_what_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(FlexSPError, match="is a folder"):
        check_writable(str(tmp_path))
    with pytest.raises(FlexSPError, match="no folder"):
        check_writable(str(tmp_path / "missing" / "costs.json"))
    with pytest.raises(FlexSPError, match=r"--flexsp-profile /proc/costs\.json: the folder /proc can't be written to"):
        check_writable("/proc/costs.json")  # by root either
