"""A SLURM of two nodes on this machine, over the loopback address, with all of its state in one folder."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SECONDS_TO_START = 30.0

_CONFIGURATION = """
ClusterName=flexsp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
KillWait=30
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why this machine can't run it; None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    missing = [program for program in PROGRAMS if _find(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _has_ended(shown: dict[str, str]) -> bool:
    return shown["JobState"] in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Cluster:
    """Starts its daemons on entry; on exit ends them, and every process of the jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.folder / "state").mkdir()
        controller_port, *node_ports = _free_ports(3)
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                host=socket.gethostname().split(".")[0],
                controller_port=controller_port,
                node_ports=",".join(map(str, node_ports)),
            )
        )
        munge = [f"--{what}={self.folder}/munge.{what.split('-')[0]}" for what in ("key-file", "socket", "pid-file")]
        munge += [f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"]
        self._run("munged", "--foreground", "--force", *munge)
        _wait_for(lambda: (self.folder / "munge.socket").exists(), "munged", self.folder / "munge.log")
        self._run("slurmctld", "-D")
        for name in ("node1", "node2"):
            self._run("slurmd", "-D", "-N", name)
        _wait_for(self._is_idle, "the cluster", self.folder / "slurmctld.log")

    def _run(self, program: str, *arguments: str) -> None:
        path = _find(program)
        assert path is not None
        with (self.folder / f"{program}.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [path, *arguments], env=self.environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
                )
            )

    def _is_idle(self) -> bool:
        done = self.call("sinfo", "--noheader", "--format=%D %T", check=False)
        return done.stdout.split() == ["2", "idle"]

    def _stop(self) -> None:
        """End the daemons and what they started: job steps have their own sessions and outlive their slurmd."""
        folder = str(self.folder / "slurm.conf")
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == folder:
                    process.kill()
            except psutil.Error:
                continue

    def environment(self) -> dict[str, str]:
        """This process's environment, with this cluster in it and no other."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**inherited, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one of SLURM's commands, or a script that calls them."""
        done = subprocess.run(
            command,
            env={**self.environment(), **(env or {})},
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The id of a job that ``sbatch`` is given."""
        return self.call("sbatch", "--parsable", *arguments, env=env, cwd=cwd).stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job).stdout))

    def wait(
        self, job: str, until: Callable[[dict[str, str]], bool] = _has_ended, timeout_seconds: float = 180.0
    ) -> dict[str, str]:
        """Wait for the end of a job, or for what ``until`` says of it; return what SLURM then shows."""
        deadline = time.monotonic() + timeout_seconds
        hurried = None
        while not until(shown := self.show(job)):
            assert not _has_ended(shown) and time.monotonic() < deadline, f"job {job}: {shown}"
            if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime" and hurried != shown["Restarts"]:
                # SLURM has a requeued job wait for two minutes. It needs one second: its credential has to be newer.
                hurried = shown["Restarts"]
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now+1", check=False)
            time.sleep(0.1)
        return shown


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait_for(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} does not start: {log.read_text() if log.exists() else 'no log'}")
        time.sleep(0.1)
