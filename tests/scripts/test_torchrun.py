"""The ``torchrun`` fixture that other tests rely on: results, failures, and no process left behind."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest


def test_every_rank_runs(torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text('import os, sys; print(f"rank {os.environ["RANK"]} of", sys.argv[1], os.environ["EXTRA"])')
    done = torchrun(2, str(script), "two", env={"EXTRA": "x"})
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 of two x", "rank 1 of two x"]


def test_a_failure_fails_the_test_unless_it_is_asked_for(torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text('raise SystemExit("a reason of its own")')
    assert torchrun(1, str(script), check=False).returncode != 0
    with pytest.raises(pytest.fail.Exception, match="a reason of its own"):
        torchrun(1, str(script))


def test_a_hang_fails_the_test_and_leaves_no_process(torchrun: Callable, tmp_path: Path) -> None:
    script, marks = tmp_path / "hangs.py", tmp_path / "marks"
    marks.mkdir()
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1], str(os.getpid())).touch()\n"
        "time.sleep(600)\n"
    )
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="still ran after 10 s"):
        torchrun(2, str(script), str(marks), timeout_seconds=10)
    assert time.monotonic() - started < 30
    workers = [int(path.name) for path in marks.iterdir()]
    assert len(workers) == 2
    deadline = time.monotonic() + 5
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
