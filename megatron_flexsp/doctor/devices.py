"""The GPUs of this machine, asked of the driver and not of PyTorch, whose import takes seconds."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from megatron_flexsp.doctor.environment import installed, torch_cuda
from megatron_flexsp.doctor.findings import Finding, error, ok, warning

_FIELDS = "name,memory.total,memory.used,compute_cap"
_MIB = 1 << 20
_BUSY_SHARE = 0.1
"""A GPU with more of its memory in use belongs to somebody."""

_SECONDS = 10.0


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory_bytes: int
    used_bytes: int
    capability: tuple[int, int]


def find_gpus() -> list[Gpu]:
    """What nvidia-smi lists; empty without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return list(parse_gpus(done.stdout))


def parse_gpus(listed: str) -> Iterator[Gpu]:
    """GPUs from nvidia-smi's lines; those that are not in order are left out."""
    for line in listed.splitlines():
        with suppress(ValueError):
            name, total, used, capability = (word.strip() for word in line.split(","))
            major, _, minor = capability.partition(".")
            yield Gpu(name, int(total) * _MIB, int(used) * _MIB, (int(major), int(minor)))


def examine_devices(gpus: Sequence[Gpu], *, cpu: bool, is_login_node: bool) -> Iterator[Finding]:
    """Whether the GPUs are there, alike, free, and served by PyTorch and driver.

    ``is_login_node`` says that the job's GPUs are known to be elsewhere.
    """
    if cpu:
        yield ok("gpus", "none needed: --cpu stands in for CUDA")
        return
    if not gpus and is_login_node:
        yield ok("gpus", "none on this machine, taken for a login node: driver and memory are not looked at")
        return
    if not gpus:
        yield warning(
            "gpus",
            "none on this machine",
            "on a login node give the job's --nodes and --gpus-per-node; to run without a GPU add --cpu",
        )
        return
    kinds = Counter((gpu.name, gpu.memory_bytes) for gpu in gpus)
    found = ", ".join(f"{count} x {name} with {size / 2**30:.0f} GiB" for (name, size), count in kinds.items())
    if len(kinds) > 1:
        yield warning("gpus", f"{found}: they differ", "plans take all ranks for equally fast and equally large")
    else:
        yield ok("gpus", found)
    if busy := [number for number, gpu in enumerate(gpus) if gpu.used_bytes > _BUSY_SHARE * gpu.memory_bytes]:
        most = max(gpus[number].used_bytes for number in busy)
        yield warning(
            "gpu-memory",
            f"in use by others on GPU {', '.join(map(str, busy))}: up to {most / 2**30:.0f} GiB",
            "nvidia-smi says by whom; end it, or choose other GPUs with CUDA_VISIBLE_DEVICES",
        )
    yield _driver()


def _driver() -> Finding:
    built_for, served = torch_cuda(), driver_cuda()
    if built_for is None and installed("torch") is None:
        return warning("driver", "there is no PyTorch to compare it with", "install PyTorch first")
    if built_for is None:
        return error("driver", "PyTorch is built without CUDA", "install a build with CUDA from https://pytorch.org")
    if served is None:
        return warning("driver", "libcuda.so.1 does not say which CUDA it serves", "nvidia-smi shows the driver")
    found = f"serves CUDA {served[0]}.{served[1]}, PyTorch is built for {built_for}"
    if served[0] < int(built_for.partition(".")[0]):
        return error("driver", found, "upgrade the driver, or install a PyTorch that is built for an older CUDA")
    return ok("driver", found)


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves, major and minor."""
    version = ctypes.c_int()
    with suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return version.value // 1000, version.value % 1000 // 10
    return None
