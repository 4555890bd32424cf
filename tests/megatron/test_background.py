"""The thread behind training."""

import subprocess
import sys
import threading

import pytest

from megatron_flexsp.megatron.background import Background


def test_calls_run_one_after_the_other_in_the_order_given() -> None:
    began: list[str] = []
    background = Background("test", lambda: began.append(threading.current_thread().name))
    seen: list[int] = []
    futures = [background.submit(seen.append, number) for number in range(100)]
    futures[-1].result(timeout=10)
    assert seen == list(range(100))
    assert began == ["test"]


def test_an_error_reaches_who_asks_and_stops_nothing() -> None:
    background = Background("test")
    failed, whole = background.submit(int, "x"), background.submit(int, "7")
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result(timeout=10)
    assert whole.result(timeout=10) == 7


def test_finish_waits_for_all_calls_but_not_for_ever() -> None:
    background = Background("test")
    release = threading.Event()
    slow = background.submit(release.wait)
    assert not background.finish(limit_seconds=0.01)
    assert not slow.done()
    release.set()
    assert background.finish(limit_seconds=10)
    assert slow.done()


def test_a_call_that_never_returns_does_not_keep_python_from_ending() -> None:
    program = (
        "import threading\n"
        "from megatron_flexsp.megatron.background import Background\n"
        "Background('test').submit(threading.Event().wait)\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=20, check=True)
