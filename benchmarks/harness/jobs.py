"""A Megatron job on this machine: started by torchrun, followed through the steps that it reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.hosts import Host
from benchmarks.harness.model import RANKS, ROOT
from megatron_flexsp.errors import FlexSPError

RUN = ("-m", "megatron_flexsp.run", "--cpu")
SCRIPT = Path(__file__).with_name("train.py")
START_SECONDS, STEP_SECONDS = 300.0, 600.0
"""The longest that a job may take to start, and for a step."""
END_SECONDS, RUN_SECONDS = 60.0, 3600.0
_QUOTED_LINES = 25
_PORT = 29511


class Job:
    """One run of the training script ``train.py``.

    Parameters
    ----------
    name
        What messages call it.
    arguments
        Megatron's.
    folder
        Where its log and its steps go.
    hosts
        Where its ranks run.
    schedules
        The schedules among which the steps alternate; none for the one that the arguments name.
    turns
        A store through which its steps are given their turns; without it they follow each other.
    profiled_step
        The step that rank 0 runs under PyTorch's profiler, counted from 0.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        folder: Path,
        hosts: Sequence[Host],
        *,
        schedules: Sequence[str] = (),
        turns: torch.distributed.TCPStore | None = None,
        profiled_step: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = folder / f"{name}.log"
        self.trace = folder / f"{name}.trace.json"
        self.steps: list[dict[str, Any]] = []
        """What the steps reported, so far as it was asked for."""
        self._report = folder / f"{name}.steps.jsonl"
        self._report.write_text("")
        self._read_bytes = 0
        self._turns = turns
        instructions = {
            "report": str(self._report.resolve()),
            "schedules": list(schedules),
            "ranks_per_host": RANKS // 2,
            "profiled_step": profiled_step,
            "trace": str(self.trace.resolve()),
            "turns": None if turns is None else {"port": turns.port, "job": name},
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        with self.log.open("wb") as log:
            for number, host in enumerate(hosts):
                command = [*host.prefix, *torchrun(hosts, number), *RUN, str(SCRIPT), *arguments]
                log.write((" ".join(command) + "\n\n").encode())
                log.flush()
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment(host), "FLEXSP_MEASURE": json.dumps(instructions)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait_until_ready(self) -> dict[str, Any]:
        """Wait until the job is about to train; returns what it says of itself."""
        return self._next_report(START_SECONDS)

    def run_step(self) -> dict[str, Any]:
        """Give the job its turn, if it waits for one, and wait until its next step is done."""
        if self._turns is not None:
            self._turns.set(f"{self.name}/turn/{len(self.steps)}", "")
        self.steps.append(self._next_report(STEP_SECONDS))
        return self.steps[-1]

    def finish(self) -> None:
        """Let the job end by itself; end it if it doesn't."""
        if self._turns is not None:
            self._turns.set(f"{self.name}/end", "")
        deadline = time.monotonic() + END_SECONDS
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.stop()

    def stop(self) -> None:
        """End the job if it still runs."""
        _end(self._processes)

    def _next_report(self, limit_seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit_seconds
        while True:
            has_ended = any(process.poll() is not None for process in self._processes)
            with self._report.open("rb") as report:
                report.seek(self._read_bytes)
                line = report.readline()
            if line.endswith(b"\n"):
                self._read_bytes += len(line)
                said: dict[str, Any] = json.loads(line)
                return said
            if has_ended or time.monotonic() > deadline:
                reason = "ended early" if has_ended else f"took longer than {limit_seconds:.0f} s"
                raise FlexSPError(f"the job {self.name} {reason}; {_end_of(self.log)}")
            time.sleep(0.02)


def run_to_end(host: Host, words: Sequence[str], log: Path) -> str:
    """Run a script under torchrun on one host; returns what it printed, which goes to the log too.

    Raises
    ------
    FlexSPError
        If it fails, with the end of the log.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*torchrun((host,), 0), *words],
            env=environment(host),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            process.wait(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            raise FlexSPError(f"a run took longer than {RUN_SECONDS:.0f} s; {_end_of(log)}") from None
        finally:
            _end([process])
    if process.returncode:
        raise FlexSPError(f"a run failed; {_end_of(log)}")
    return log.read_text(errors="replace")


def environment(host: Host) -> dict[str, str]:
    """Of ranks on this host."""
    return {
        **os.environ,
        # Gloo otherwise looks up the host's own name, which not every machine can resolve.
        "GLOO_SOCKET_IFNAME": host.interface,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }


def torchrun(hosts: Sequence[Host], number: int) -> Iterator[str]:
    """The launcher's command on one of the hosts, up to what it is to run."""
    host = hosts[number]
    yield from (sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={host.ranks}")
    if len(hosts) == 1:
        # Port 0 lets the rendezvous take a free one, so that jobs side by side don't meet.
        yield from ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", f"--local-addr={host.address}")
    else:
        yield from (f"--nnodes={len(hosts)}", f"--node-rank={number}")
        yield from (f"--master-addr={hosts[0].address}", f"--master-port={_PORT}", f"--local-addr={host.address}")


def _end(launchers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still run, and their ranks: torchrun passes the signal on."""
    running = [process for process in launchers if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def _end_of(log: Path) -> str:
    last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-_QUOTED_LINES:])
    return f"the end of {log}:\n{last_lines}"
