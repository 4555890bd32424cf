"""Runs ``inside`` in a process of its own, and makes a finding of however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_flexsp.doctor.findings import Finding, error
from megatron_flexsp.doctor.inside import Request

_SECONDS = 120.0
# This very package, wherever it was found, and nothing else from beside it.
_START = (
    "import sys; sys.path.insert(0, {folder!r}); from megatron_flexsp.doctor import inside; "
    "sys.path.remove({folder!r}); inside.main()"
)
_SAID_BY_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "FLEXSP_DEVICE")


class Inside:
    """The second process; it runs while this one looks at other things.

    >>> with Inside(request) as inside:  # doctest: +SKIP
    ...     findings = inside.findings()
    """

    def __init__(self, request: Request, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        environment = {name: value for name, value in os.environ.items() if name not in _SAID_BY_THE_LAUNCHER}
        environment |= request.variables
        environment["RANK"] = "0"
        environment["WORLD_SIZE"] = str(request.world_size or 1)
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed on exit)
        # -P: the working folder is not where training looks for modules.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", _START.format(folder=str(Path(__file__).parents[2]))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asdict(request)))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended already; findings() says how
        self._process.stdin = None

    def __enter__(self) -> Inside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def findings(self) -> list[Finding]:
        """What it found, and how it ended if it did not end well."""
        try:
            output, _ = self._process.communicate(timeout=self._seconds)
            ended = ""
        except subprocess.TimeoutExpired:
            self._process.kill()
            output, _ = self._process.communicate()
            ended = f"took more than {self._seconds:.0f} s"
        lines = [json.loads(line) for line in output.splitlines()]
        found = [Finding(**line["finding"]) for line in lines if "finding" in line]
        if not ended and lines and lines[-1].get("done"):
            return found
        doing = next((line["doing"] for line in reversed(lines) if "doing" in line), "starting Python")
        status = self._process.returncode
        if not ended:
            ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        self._stderr.seek(0)
        last = next((line.strip() for line in reversed(self._stderr.readlines()) if line.strip()), "no message")
        remedy = "try again: is the file system slow?" if "took" in ended else "look at the message first"
        return [*found, error("inside", f"{doing}: the process {ended}; its last line: {last[:400]}", remedy)]
