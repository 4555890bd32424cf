"""Two hosts out of one machine: network namespaces whose only connection is a pair of shaped virtual links.

A rank on one host reaches a rank on the other at the speed that is asked for, and those beside it as fast as ever.
Needs Linux and root (or rights to the same).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from megatron_flexsp.errors import FlexSPError

_LINK = "flexsp0"
_NETWORK = "10.111.0"
_START_SECONDS = 10.0
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}

# A bucket of some packets keeps the rate exact; a queue of some more holds what TCP sends ahead.
_BURST_BYTES, _QUEUE_BYTES = 32_768, 1_000_000


@dataclass(frozen=True)
class Host:
    """Where ranks run."""

    ranks: int
    interface: str = "lo" if sys.platform == "linux" else "lo0"
    """The network interface that ranks talk over."""
    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()
    """What stands before a command so that it runs there."""


class EmulatedHosts:
    """Two hosts; a context manager that yields them.

    Each is a process in network and process namespaces of its own, which waits for its input to end. When the
    benchmark ends, in whatever way, so does that input, with it the process, and with it, by the kernel's hand, every
    other process of these namespaces and the link. Nothing is left to be cleaned up by anyone.

    Parameters
    ----------
    ranks_per_host
        How many ranks each will run.
    bits_per_second
        What the link carries in each direction; None for as much as it can.
    """

    def __init__(self, ranks_per_host: int, bits_per_second: float | None = None) -> None:
        self._ranks_per_host = ranks_per_host
        self._bits_per_second = bits_per_second
        self._keepers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> tuple[Host, Host]:
        try:
            first, second = self._start_keeper(), self._start_keeper()
            _run(*_on_net(first), "ip", "link", "add", _LINK, "type", "veth", "peer", "name", _LINK, "netns", second)
            return self._host(1, first), self._host(2, second)
        except BaseException:
            self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _start_keeper(self) -> str:
        """Start a host; returns its first process as this machine numbers it."""
        keeper = subprocess.Popen(
            ["unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # Ctrl-C is for the benchmark, which then ends the hosts.
            start_new_session=True,
        )
        self._keepers.append(keeper)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and keeper.poll() is None:
            with open(f"/proc/{keeper.pid}/task/{keeper.pid}/children", encoding="ascii") as children:
                (*_, child) = children.read().split() or [""]
            if child:
                return child
            time.sleep(0.01)
        keeper.kill()
        said = keeper.communicate()[1].decode(errors="replace").strip()
        raise FlexSPError(f"an emulated host does not start: {said or 'no answer'}")

    def _host(self, number: int, process: str) -> Host:
        address = f"{_NETWORK}.{number}"
        _run(*_on_net(process), "ip", "link", "set", "lo", "up")
        _run(*_on_net(process), "ip", "addr", "add", f"{address}/24", "dev", _LINK)
        _run(*_on_net(process), "ip", "link", "set", _LINK, "up")
        if self._bits_per_second is not None:
            shape = ("rate", f"{round(self._bits_per_second)}bit", "burst", f"{_BURST_BYTES}b")
            queue = ("limit", f"{_QUEUE_BYTES}b")
            _run(*_on_net(process), "tc", "qdisc", "add", "dev", _LINK, "root", "tbf", *shape, *queue)
        prefix = ("nsenter", "--target", process, "--net", "--pid", "--mount", "--wd=.")
        return Host(self._ranks_per_host, _LINK, address, prefix)

    def _end(self) -> None:
        for keeper in self._keepers:
            keeper.kill()  # --kill-child: its child ends with it
            keeper.communicate()


def why_not() -> str | None:
    """Why this machine can't emulate hosts, in words for its user; None if it can."""
    if sys.platform != "linux":
        return "it needs Linux"
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            return f"the command {tool} is missing (package {package})"
    try:
        with EmulatedHosts(1, 1e6):
            return None
    except FlexSPError as error:
        return f"{error}. Network namespaces and traffic shaping need root, and a container the right NET_ADMIN"


def _on_net(process: str) -> tuple[str, ...]:
    return "nsenter", "--target", process, "--net"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FlexSPError(f"`{' '.join(command)}` fails: {done.stderr.strip()}")
