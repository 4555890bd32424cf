"""Mixtures of experts: losses and gradients equal those of a run without packs, the routers' gradients among them.

The reference has the run's own expert-parallel layout too, since initial weights depend on it.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import LLAMA
from .test_equality import FULL, INTERLEAVED, OVERLAPS, PIPELINE, TENSOR, assert_equal, assert_equal_losses
from .test_recomputation import RECOMPUTE

MOE = (
    *(*LLAMA, "--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "32"),
    *("--moe-layer-freq", "[0,1,1,1]", "--moe-z-loss-coeff", "0.01", "--moe-token-dispatcher-type", "alltoall"),
)
EACH_SEQUENCE = ("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1")
BIAS = ("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate")
TWO_PARTS = ("--expert-model-parallel-size", "2")


def test_experts_on_two_ranks(train: Callable, reference: Callable) -> None:
    """Packs of one sequence, padded, and fillers: what a balancing loss is taken over is Megatron's micro-batch."""
    model = (*MOE, *TWO_PARTS, "--moe-shared-expert-intermediate-size", "32")
    model += ("--moe-router-load-balancing-type", "aux_loss", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1", "0.05")
    plan = "[0123]:0 [01]:1 [2]:2 [3]:3 [0]:4 [1]:5 [23]:6 [0]:7 [1]: [2]:8 [3]:9 [01]:10 [2]: [3]:11"
    run = train(4, *model, *OVERLAPS, plan=plan, gradients=True)
    assert " > [flexsp] lockstep schedule" in run.output
    assert_equal(run, reference(2, *model))


def test_experts_inside_of_a_tensor_parallel_group(train: Callable, reference: Callable, even_documents: Path) -> None:
    """Nobody waits for another micro-batch: nested. Routers run again in the backward pass."""
    model = (*MOE, *EACH_SEQUENCE, *BIAS, "0.1", *TENSOR, "--sequence-parallel", *TWO_PARTS)
    model += ("--expert-tensor-parallel-size", "1", "--data-path", str(even_documents))
    run = train(4, *model, *FULL, plan="[01] [0] [1] [1]", gradients=True)
    assert " > [flexsp] nested schedule" in run.output
    assert_equal(run, reference(2, *model))


def test_experts_on_two_ranks_of_an_interleaved_pipeline(train: Callable, reference: Callable) -> None:
    """Warm-up runs forward ahead of backward, which then runs the routers of recomputed rounds again."""
    model = (*MOE, *EACH_SEQUENCE, *BIAS, "0.1", *TWO_PARTS, *INTERLEAVED)
    plan = "[01]*:0,5,8 [0]:1 [1]:2,3 [01]:4 [0]*:6 [1]*: [0]:7,9 [1]:10 [0]*: [1]*:11"
    run = train(4, *model, *RECOMPUTE, plan=plan, gradients=True)
    assert " > [flexsp] lockstep schedule" in run.output
    assert_equal(run, reference(4, *model))


def test_experts_in_a_pipeline(train: Callable, reference: Callable) -> None:
    model = (*MOE, *EACH_SEQUENCE, *BIAS, "0.1", *PIPELINE)
    run = train(4, *model, plan="[01] [0] [1] [1]", gradients=True)
    assert " > [flexsp] nested schedule" in run.output
    assert "TopKRouter._apply_expert_bias leaves out padding" in run.output
    assert_equal(run, reference(2, *model))


def test_one_balance_of_the_global_batch(train: Callable, reference: Callable, write_documents: Callable) -> None:
    """Shares of the experts that run on from round to round, each of which holds what the reference runs side by side.

    Sequences of one length, for Megatron takes those of a step for equally long. Two ranks have parts of the same
    experts, and Megatron saves one rank's gradients: of them, the norm can tell.
    """
    model = (*MOE, *PIPELINE, "--expert-tensor-parallel-size", "2", "--data-path", str(write_documents([25] * 60)))
    model += ("--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", "0.5")
    plan = "[01]:0,1 [0]:2 [1]:3 [01]:4,5 [0]:6 [1]:7 [01]:8,9 [0]:10 [1]:11"
    run, expected = train(4, *model, *FULL, plan=plan), reference(4, *model)
    assert " > [flexsp] lockstep schedule" in run.output
    assert_equal_losses(run, expected)
    figures, expected_figures = (
        re.findall(r"(global_load_balancing_loss|z_loss|grad norm): ([0-9.E+-]+)", each.output)
        for each in (run, expected)
    )
    assert len(figures) == 3 * 5
    for (name, figure), (expected_name, expected_figure) in zip(figures, expected_figures, strict=True):
        assert name == expected_name
        assert float(figure) == pytest.approx(float(expected_figure), rel=1e-4, abs=1e-3), name
