"""A signal ends a process that waits for something that never comes, but not in the middle of a file."""

import signal
import subprocess
import sys

import pytest

WAITS = """
import ctypes, signal, sys, time
from megatron_flexsp.profiler.interruption import EndsAtOnce

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with EndsAtOnce(lambda: "last words") as signals:
    if sys.argv[1] == "writing":
        with signals.undisturbed():
            print("ready", flush=True)
            time.sleep(1)
            print("written", flush=True)
    print("ready", flush=True)
    # As in a collective: Python does not come back for a signal.
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("doing", ["waiting", "writing"])
def test_a_signal_ends_a_process_that_waits(sent: signal.Signals, doing: str) -> None:
    command = [sys.executable, "-c", WAITS, doing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        try:
            stdout, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 128 + sent
    assert stderr.strip() == "last words"
    assert ("written" in stdout) == (doing == "writing")
