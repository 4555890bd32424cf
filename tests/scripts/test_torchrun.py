"""The ``torchrun`` fixture that other tests rely on: results, failures, and no process left behind."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

both = pytest.mark.parametrize("fresh", [False, True], ids=["forked", "torchrun"])


@both
def test_every_rank_runs(fresh: bool, torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    # In one write: torchrun's ranks have no buffer, and share a pipe.
    line = 'f"rank {os.environ["RANK"]} of {sys.argv[1]} {os.environ["EXTRA"]}\\n"'
    script.write_text(f"import os, sys; sys.stdout.write({line})")
    done = torchrun(2, str(script), "two", env={"EXTRA": "x"}, fresh=fresh)
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 of two x", "rank 1 of two x"]


@both
def test_a_failure_fails_the_test_unless_it_is_asked_for(fresh: bool, torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text('raise SystemExit("a reason of its own")')
    assert torchrun(1, str(script), check=False, fresh=fresh).returncode != 0
    with pytest.raises(pytest.fail.Exception, match="a reason of its own"):
        torchrun(1, str(script), fresh=fresh)


@both
def test_a_hang_fails_the_test_and_leaves_no_process(fresh: bool, torchrun: Callable, tmp_path: Path) -> None:
    script, marks = tmp_path / "hangs.py", tmp_path / "marks"
    marks.mkdir()
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(sys.argv[1], str(os.getpid())).touch()\n"
        "time.sleep(600)\n"
    )
    seconds = 15 if fresh else 5  # torchrun itself takes some to start
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=f"still ran after {seconds} s"):
        torchrun(2, str(script), str(marks), timeout_seconds=seconds, fresh=fresh)
    assert time.monotonic() - started < seconds + 20
    workers = [int(path.name) for path in marks.iterdir()]
    assert len(workers) == 2
    deadline = time.monotonic() + 5
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def test_one_failing_rank_ends_the_others(torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "one_fails.py"
    script.write_text('import os, time; time.sleep(600 if os.environ["RANK"] == "0" else 0); raise SystemExit(3)')
    assert torchrun(2, str(script), check=False).returncode != 0


def test_ranks_meet(torchrun: Callable, tmp_path: Path) -> None:
    script = tmp_path / "meets.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor(10 ** dist.get_rank())\n"
        "dist.all_reduce(total)\n"
        "print('sum', total.item())\n"
    )
    for _ in range(2):
        assert torchrun(3, str(script)).stdout.split() == ["sum", "111"] * 3


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
