"""Forks the ranks of distributed jobs, with PyTorch, the stand-in for CUDA and Megatron imported already.

Importing them costs every process seconds of a core, many times what a small training step costs; this process
pays once and its children share the memory. A child is then a process as torchrun starts one: a session, an
environment and standard streams of its own, and a store to meet the others at. Each line of standard input is one
job, as JSON; each line of standard output its exit status. See ``tests/launch.py``.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

_POLL_SECONDS = 0.01
_GRACE_SECONDS = 5.0
"""Between asking the other ranks to end and killing them, once one has failed."""
_PORT_DIGITS = 5


def preload() -> None:
    """Import what the jobs import. Nothing here may start a thread: a child would not have it."""
    from megatron_flexsp import cpu

    cpu.install()

    import megatron_flexsp.megatron.plugin
    import megatron_flexsp.megatron.training  # noqa: F401

    # Objects that are never looked at again are never written to, and so stay shared.
    gc.collect()
    gc.freeze()


def serve() -> list[str]:
    """Run jobs until the input ends. Returns in the ranks only, with the command line to run."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed from here on must not pass for a reply
    print("ready", file=replies, flush=True)
    while line := sys.stdin.readline():
        job = json.loads(line)
        port_reader, port_writer = os.pipe()
        ranks: set[int] = set()
        for rank in range(job["nproc"]):
            pid = os.fork()
            if pid == 0:
                os.close(port_writer)
                replies.close()
                _become_rank(rank, job, port_reader)
                return list(job["command"])
            ranks.add(pid)
        os.close(port_reader)
        print(json.dumps(_see_through(ranks, port_writer, job["timeout_seconds"])), file=replies, flush=True)
    sys.exit()


def _become_rank(rank: int, job: dict[str, Any], port_reader: int) -> None:
    """Take over what the job gives its ranks."""
    os.setsid()
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["stdout"], os.O_WRONLY | os.O_APPEND),
        (2, job["stderr"], os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)  # ranks share a file; a line is written whole
    port = os.read(port_reader, _PORT_DIGITS)
    os.close(port_reader)
    if not port:
        os._exit(1)  # the server is gone
    size = str(job["nproc"])
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ.update(
        dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)),
        GROUP_RANK="0",
        GROUP_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(int(port)),
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_RUN_ID="tests",
        TORCHELASTIC_USE_AGENT_STORE="True",
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), size),
    )
    os.chdir(job["folder"])


def _see_through(ranks: set[int], port_writer: int, timeout_seconds: float) -> dict[str, Any]:
    """Open the store, tell the ranks where, and wait for them; a failure or the time limit ends them all."""
    # Only now: the store has a thread, and must have none when ranks are forked.
    from torch.distributed import TCPStore

    running = set(ranks)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with os.fdopen(port_writer, "w") as writer:
        writer.write(f"{store.port:0{_PORT_DIGITS}}" * len(ranks))
    deadline = time.monotonic() + timeout_seconds
    status, timed_out, kill_at = 0, False, float("inf")
    parent = os.getppid()
    while running:
        for pid in list(running):
            ended, wait_status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                status = status or os.waitstatus_to_exitcode(wait_status)
        now = time.monotonic()
        if now >= min(deadline, kill_at) or os.getppid() != parent:
            timed_out = timed_out or now >= deadline
            _signal(running, signal.SIGKILL)
        elif status and kill_at == float("inf"):
            _signal(running, signal.SIGTERM)
            kill_at = now + _GRACE_SECONDS
        time.sleep(_POLL_SECONDS)
    del store
    return {"returncode": status, "timed_out": timed_out}


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            os.kill(pid, number)  # not yet a session of its own; not reaped, so still there


def run(command: Sequence[str]) -> None:
    """What ``python COMMAND`` does."""
    if command[0] == "-m":
        sys.argv = [command[1], *command[2:]]
        sys.path[0] = os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    try:
        preload()
    except Exception:
        traceback.print_exc()
        sys.exit("the ranks' imports failed")
    run(serve())
