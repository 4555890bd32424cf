"""Emulated hosts: the link is as slow as asked for, and nothing outlives the benchmark."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.harness import hosts
from benchmarks.harness.hosts import EmulatedHosts
from megatron_flexsp.errors import FlexSPError

ROOT = Path(__file__).resolve().parents[2]
SENT_BYTES = 1_000_000
RECEIVER = """
import socket, time
server = socket.create_server(("10.111.0.2", 5000))
print("listening", flush=True)
connection, _ = server.accept()
received, started = 0, time.monotonic()
while data := connection.recv(65536):
    received += len(data)
print(received, time.monotonic() - started)
"""
SENDER = f"""
import socket
socket.create_connection(("10.111.0.2", 5000)).sendall(bytes({SENT_BYTES}))
"""
HOLDER = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from benchmarks.harness.hosts import EmulatedHosts
with EmulatedHosts(1) as pair:
    for host in pair:
        subprocess.Popen([*host.prefix, "sleep", "4321"])
    print("ready", flush=True)
    time.sleep(60)
"""

REASON = hosts.why_not()
emulates_hosts = pytest.mark.skipif(REASON is not None, reason=f"no emulated hosts: {REASON}")


def sleepers() -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "4321"]]


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A program that holds two hosts, in each of which a process runs."""
    command = [sys.executable, "-c", HOLDER, str(ROOT)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 10
        while len(sleepers()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(sleepers()) == 2
        yield process
        process.kill()


@emulates_hosts
def test_link_carries_what_was_asked_for():
    with EmulatedHosts(1, bits_per_second=20e6) as (first, second):
        command = [*second.prefix, sys.executable, "-c", RECEIVER]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None and receiver.stdout.readline() == "listening\n"
            subprocess.run([*first.prefix, sys.executable, "-c", SENDER], check=True, timeout=60)
            received, seconds = receiver.stdout.readline().split()
    assert int(received) == SENT_BYTES
    assert float(seconds) > 0.8 * 8 * SENT_BYTES / 20e6  # slower is a busy machine, faster no link


@emulates_hosts
@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_nothing_outlives_the_benchmark(holder, how):
    holder.kill() if how == "kill" else holder.send_signal(signal.SIGINT)
    holder.wait(timeout=30)
    deadline = time.monotonic() + 10
    while sleepers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not sleepers()


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", "")
    assert "iproute2" in (hosts.why_not() or "")


@emulates_hosts
def test_a_link_that_cannot_be_is_refused_and_leaves_nothing():
    before = {process.pid for process in psutil.process_iter()}
    with pytest.raises(FlexSPError, match="tc qdisc"), EmulatedHosts(1, bits_per_second=0):
        pass
    left = [process for process in psutil.process_iter(["name"]) if process.pid not in before]
    assert not [process for process in left if process.info["name"] == "unshare"]
