"""What the tests of all rooms share: fixed seeds, a hypothesis profile, and real processes under torchrun."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Protocol

import hypothesis
import numpy as np
import psutil
import pytest

hypothesis.settings.register_profile(
    "flexsp",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flexsp")

LONGEST_QUOTE_CHARACTERS = 20_000


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, without importing torch for tests that don't need it."""
    random.seed(1234)
    np.random.seed(1234)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(1234)


class Torchrun(Protocol):
    """The type of the ``torchrun`` fixture."""

    def __call__(
        self,
        nproc: int,
        *args: str,
        timeout_seconds: float = 120,
        env: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def torchrun() -> Torchrun:
    """Run a script or ``-m module`` in ``nproc`` processes on this machine and return what they printed.

    ``torchrun(4, "tests/runtime/worker.py", "--degree", "2")``. ``env`` is added to the environment. With
    ``check``, an exit code other than 0 fails the test and shows the output. Running longer than
    ``timeout_seconds`` always fails it, and leaves no process behind.
    """
    return _torchrun


def _torchrun(
    nproc: int,
    *args: str,
    timeout_seconds: float = 120,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}"]
    # Port 0 lets the rendezvous take a free port, so that runs side by side don't meet.
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *args]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        # Gloo otherwise looks up the host's own name, which not every container can resolve.
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **(env or {}),
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        _kill_tree(process)
        stdout, stderr = process.communicate()
        pytest.fail(f"{_quote(command, stdout, stderr)}\nstill ran after {timeout_seconds} s", pytrace=False)
    except BaseException:
        _kill_tree(process)
        raise
    if check and process.returncode != 0:
        pytest.fail(f"{_quote(command, stdout, stderr)}\nexit code {process.returncode}", pytrace=False)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and its workers, each of which torchrun has put in a session of its own."""
    try:
        # Stopped first, it can start no worker behind our back.
        os.kill(process.pid, signal.SIGSTOP)
        workers = psutil.Process(process.pid).children(recursive=True)
    except (ProcessLookupError, psutil.NoSuchProcess):
        workers = []
    process.kill()
    for worker in workers:
        try:
            worker.kill()
        except psutil.NoSuchProcess:
            continue


def _quote(command: list[str], stdout: str, stderr: str) -> str:
    parts = [" ".join(command)]
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        if text.strip():
            parts.append(f"--- {name}\n{text[-LONGEST_QUOTE_CHARACTERS:]}")
    return "\n".join(parts)
