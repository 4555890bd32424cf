"""Megatron's own parser with the flags registered, and two real processes that share plans."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

JOB = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 8 --seq-length 48 --max-position-embeddings 128
    --global-batch-size 24 --attention-dropout 0 --hidden-dropout 0 --transformer-impl local
    --calculate-per-token-loss --flexsp
"""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """``parse("--bf16", world_size=8)``: a job that FlexSP takes, with more arguments, as Megatron parses it."""
    from megatron.training import arguments

    from megatron_flexsp.megatron.arguments import add_flexsp_arguments

    def run(more: str = "", *, world_size: int = 8, without: str = "") -> Namespace:
        words = [word for word in JOB.split() if word != without] + more.split()
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words])
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return arguments.parse_args(add_flexsp_arguments)

    return run


@pytest.fixture(scope="session")
def two_processes(torchrun: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the ranks saw; see two_processes.py."""
    folder = tmp_path_factory.mktemp("two_processes")
    torchrun(2, str(Path(__file__).parent / "two_processes.py"), str(folder), fresh=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
