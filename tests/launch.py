"""Runs distributed jobs for the tests: under torchrun itself, or forked from a process that is warm already."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

ROOT = Path(__file__).parents[1]
LONGEST_QUOTE_CHARACTERS = 20_000
SECONDS_TO_START_SERVER = 180.0


def environment_of(env: Mapping[str, str] | None) -> dict[str, str]:
    """This process's environment with what a job on one small machine needs, and ``env``; this package is found."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        # Gloo otherwise looks up the host's own name, which not every container can resolve.
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **(env or {}),
    }
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *([] if str(ROOT) in paths else [str(ROOT)])])
    return environment


def run_fresh(
    nproc: int, command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run a job under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}"]
    # Port 0 lets the rendezvous take a free port, so that runs side by side don't meet.
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *command]
    process = subprocess.Popen(
        launcher,
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
        _fail_late(launcher, *process.communicate(), timeout_seconds)
    except BaseException:
        _kill_tree(process)
        raise
    return subprocess.CompletedProcess(launcher, process.returncode, stdout, stderr)


class ForkServers:
    """Warm processes, one for each import path that jobs ask for, from which their ranks are forked."""

    def __init__(self) -> None:
        self._servers: dict[str, _ForkServer] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in self._servers.values():
            server.kill()

    def run(
        self, nproc: int, command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a job."""
        path = environment["PYTHONPATH"]
        server = self._servers.get(path)
        if server is None or not server.is_running:
            server = self._servers[path] = _ForkServer(environment)
        return server.run(nproc, command, environment, timeout_seconds)


class _ForkServer:
    """One process of ``fork_server.py``."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_server.py")],
            env={**environment, "FLEXSP_DEVICE": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if self._reply(SECONDS_TO_START_SERVER) != "ready":
            self.kill()
            pytest.fail("tests/fork_server.py did not start; its reason stands above", pytrace=False)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def run(
        self, nproc: int, command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, name) for name in ("stdout", "stderr")}
            for file in files.values():
                file.touch()
            job = {
                "nproc": nproc,
                "command": list(command),
                "environment": dict(environment),
                "folder": os.getcwd(),
                "timeout_seconds": timeout_seconds,
                **{name: str(file) for name, file in files.items()},
            }
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(job) + "\n")
                self._process.stdin.flush()
                reply = self._reply(timeout_seconds + 30)
            except BaseException:
                self.kill()
                raise
            stdout, stderr = (file.read_text(errors="replace") for file in files.values())
        done = json.loads(reply or '{"timed_out": true}')
        if done["timed_out"]:
            _fail_late(command, stdout, stderr, timeout_seconds)
        return subprocess.CompletedProcess(list(command), done["returncode"], stdout, stderr)

    def _reply(self, timeout_seconds: float) -> str | None:
        """The server's next line; None if it is gone or silent."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_seconds)
        return self._process.stdout.readline().strip() or None if ready else None

    def kill(self) -> None:
        """End it, and the ranks of a job that is running."""
        _kill_tree(self._process)
        self._process.wait()


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill a launcher and its ranks, each of which is in a session of its own."""
    try:
        # Stopped first, it can start no rank behind our back.
        os.kill(process.pid, signal.SIGSTOP)
        ranks = psutil.Process(process.pid).children(recursive=True)
    except (ProcessLookupError, psutil.NoSuchProcess):
        ranks = []
    process.kill()
    for rank in ranks:
        try:
            rank.kill()
        except psutil.NoSuchProcess:
            continue


def _fail_late(command: Sequence[str], stdout: str, stderr: str, timeout_seconds: float) -> None:
    pytest.fail(f"{quote(command, stdout, stderr)}\nstill ran after {timeout_seconds} s", pytrace=False)


def quote(command: Sequence[str], stdout: str, stderr: str) -> str:
    """A job's output, for a failure's message."""
    parts = [" ".join(command)]
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        if text.strip():
            parts.append(f"--- {name}\n{text[-LONGEST_QUOTE_CHARACTERS:]}")
    return "\n".join(parts)
