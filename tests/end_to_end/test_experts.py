"""Mixtures of experts: losses and gradients equal those of a run without packs, the routers' gradients among them.

The reference has the run's own expert-parallel layout too, since initial weights depend on it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import LLAMA
from .test_equality import OVERLAPS, TENSOR, assert_equal

MOE = (
    *(*LLAMA, "--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
    *("--moe-layer-freq", "[0,1,1,1]", "--moe-z-loss-coeff", "0.01", "--moe-token-dispatcher-type", "alltoall"),
)
EACH_SEQUENCE = ("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1")
BIAS = ("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate")
TWO_PARTS = ("--expert-model-parallel-size", "2")


@pytest.fixture(scope="module")
def write_documents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int]], Path]:
    """Write a data set of documents of these lengths and return its prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(lengths: list[int]) -> Path:
        generator = np.random.default_rng(8)
        prefix = tmp_path_factory.mktemp("documents") / "documents"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for length in lengths:
            builder.add_document(torch.from_numpy(generator.integers(0, 256, length)), [length])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


def test_experts_on_two_ranks(train: Callable, reference: Callable) -> None:
    """Packs of one sequence, padded, and fillers: what a balancing loss is taken over is Megatron's micro-batch."""
    model = (*MOE, *TWO_PARTS, "--moe-shared-expert-intermediate-size", "32")
    model += ("--moe-router-load-balancing-type", "aux_loss", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1", "0.05")
    plan = "[0123]:0 [01]:1 [2]:2 [3]:3 [0]:4 [1]:5 [23]:6 [0]:7 [1]: [2]:8 [3]:9 [01]:10 [2]: [3]:11"
    run = train(4, *model, *OVERLAPS, plan=plan, gradients=True)
    assert " > [flexsp] lockstep schedule" in run.output
    assert_equal(run, reference(2, *model))


def test_experts_inside_of_a_tensor_parallel_group(
    train: Callable, reference: Callable, write_documents: Callable
) -> None:
    """Nobody waits for another micro-batch: nested. Routers run again in the backward pass."""
    # Sequence parallelism, which Megatron wants for experts, takes no odd lengths without packs.
    even = write_documents([2 * half + 1 for half in range(1, 23)] * 3)
    model = (*MOE, *EACH_SEQUENCE, *BIAS, "0.1", *TENSOR, "--sequence-parallel", *TWO_PARTS)
    model += ("--expert-tensor-parallel-size", "1", "--data-path", str(even))
    recompute = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    run = train(4, *model, *recompute, plan="[01] [0] [1] [1]", gradients=True)
    assert " > [flexsp] nested schedule" in run.output
    assert_equal(run, reference(2, *model))
