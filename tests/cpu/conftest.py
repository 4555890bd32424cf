"""A small GPT, trained by all of Megatron in real processes without a GPU."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]

# The command line of a GPU run: nothing here is for the CPU's sake.
_SMALL_LLAMA = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --seq-length 64 --max-position-embeddings 64
    --tokenizer-type NullTokenizer --vocab-size 256 --mock-data --num-workers 0
    --micro-batch-size 1 --global-batch-size 4 --train-iters 6 --lr 1e-3 --lr-decay-style constant
    --eval-interval 100 --eval-iters 0 --log-interval 1
"""

Losses = Mapping[int, float]
Train = Callable[..., Losses]


@pytest.fixture(scope="session")
def train(torchrun: Callable[..., object]) -> Train:
    """`train(4, "--tensor-model-parallel-size 2 ...")` gives the losses that were logged, by iteration.

    The second that a run logs is the mean of its first two, by Megatron's own doing.
    """

    def run(nproc: int, arguments: str = "", **options: object) -> Losses:
        command = [
            _HERE / "run_on_cpu.py",
            _ROOT / "scripts" / "pretrain_gpt.py",
            *f"{_SMALL_LLAMA} {arguments}".split(),
        ]
        done = torchrun(nproc, *map(str, command), timeout_seconds=400, **options)
        logged = re.findall(r"iteration +(\d+)/.*lm loss: (\S+)", done.stdout)  # type: ignore[attr-defined]
        return {int(iteration): float(loss) for iteration, loss in logged}

    return run
