"""What the tests of all rooms share: fixed seeds, a hypothesis profile, and real processes under torchrun."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

import hypothesis
import numpy as np
import pytest

from tests.launch import ForkServers, environment_of, quote, run_fresh

hypothesis.settings.register_profile(
    "flexsp",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flexsp")


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
        timeout_seconds: float = 240,
        env: Mapping[str, str] | None = None,
        check: bool = True,
        fresh: bool = False,
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def torchrun() -> Iterator[Torchrun]:
    """Run a script or ``-m module`` in ``nproc`` processes on this machine and return what they printed.

    ``torchrun(4, "tests/runtime/worker.py", "--degree", "2")``. ``env`` is added to the environment. With
    ``check``, an exit code other than 0 fails the test and shows the output. Running longer than
    ``timeout_seconds`` always fails it, and leaves no process behind.

    The processes are forked from one that has PyTorch, the stand-in for CUDA and Megatron imported, which saves
    most of a short job's time; ``PYTHONPATH`` in ``env`` decides which Megatron (and costs another such process).
    ``fresh`` starts them under torchrun instead: for what has to see a Python that has imported nothing.
    """
    with ForkServers() as servers:

        def run(
            nproc: int,
            *args: str,
            timeout_seconds: float = 240,
            env: Mapping[str, str] | None = None,
            check: bool = True,
            fresh: bool = False,
        ) -> subprocess.CompletedProcess[str]:
            start = run_fresh if fresh or not hasattr(os, "fork") else servers.run
            done = start(nproc, args, environment_of(env), timeout_seconds)
            if check and done.returncode != 0:
                message = f"{quote(done.args, done.stdout, done.stderr)}\nexit code {done.returncode}"
                pytest.fail(message, pytrace=False)
            return done

        yield run
