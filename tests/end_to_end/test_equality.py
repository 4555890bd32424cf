"""For any plan, loss and gradients equal those of the same sequences run one by one, unpacked.

The law that guards every change to the runtime. The reference has the run's own tensor- and
pipeline-parallel layout, since initial weights depend on it, and one data-parallel rank.
"""

import re
from collections.abc import Callable

import pytest

from .conftest import LLAMA, TRANSFORMER_ENGINE, Run

GQA = (*LLAMA, "--group-query-attention", "--num-query-groups", "2")
LEARNED = ("--position-embedding-type", "learned_absolute")

OVERLAPS = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
TENSOR = ("--tensor-model-parallel-size", "2")
PIPELINE = ("--pipeline-model-parallel-size", "2")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
INTERLEAVED = (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", "1")

NESTED = "[0123] [01] [2] [3] [0] [1] [3]"
UNEQUAL = "[0123] [01] [23] [0] [1] [2] [3] [2] [2] [3]"
STATIC = "[01] [23] [01] [23] [23]"
LOCKSTEP = "[0123] [01] [2] [3] [0] [1] [23]"
EACH_ALONE = "[0] [1] [2] [3] [3]"
NESTED_2 = "[01] [0] [1] [1]"


def assert_equal_losses(run: Run, reference: Run, tolerance: float = 1e-5) -> None:
    assert run.losses.keys() == reference.losses.keys() == {1, 2, 3, 4, 5}
    for step, loss in reference.losses.items():
        assert run.losses[step] == pytest.approx(loss, rel=tolerance), f"loss of step {step}"


def assert_equal(run: Run, reference: Run) -> None:
    assert_equal_losses(run, reference)
    gradients, expected = run.gradients, reference.gradients
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).abs().max().item()
        assert difference <= 1e-5 * gradient.abs().max().item(), f"gradient of {name}"


@pytest.mark.parametrize("plan", [NESTED, UNEQUAL, STATIC, LOCKSTEP, EACH_ALONE])
def test_any_plan_equals_the_unpacked_run(plan: str, train: Callable, reference: Callable) -> None:
    schedules = {STATIC: ("static", "--flexsp-static-degree", "2"), LOCKSTEP: ("lockstep",)}
    run = train(4, *GQA, "--flexsp-schedule", *schedules.get(plan, ("nested",)), plan=plan, gradients=True)
    assert_equal(run, reference(1, *GQA))
    # Groups of two, and Megatron's own group of all four; a static plan needs the groups of its degree alone.
    assert f"; {1 if plan == STATIC else 2} communicators on this rank" in run.output


def test_distributed_optimizer_with_both_overlaps(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, *OVERLAPS, plan=UNEQUAL, gradients=True)
    assert_equal(run, reference(1, *GQA))


def test_full_recompute_and_exchange_in_parts(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, *FULL, "--flexsp-exchange-parts", "2", plan=UNEQUAL, gradients=True)
    assert_equal(run, reference(1, *GQA))


def test_selective_recompute_and_learned_positions(train: Callable, reference: Callable) -> None:
    run = train(4, *LEARNED, "--recompute-granularity", "selective", plan=NESTED, gradients=True)
    assert_equal(run, reference(1, *LEARNED))


def test_tensor_parallel(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, *TENSOR, plan=NESTED_2, gradients=True)
    assert_equal(run, reference(2, *GQA, *TENSOR))


def test_sequence_parallel(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, *TENSOR, "--sequence-parallel", plan=NESTED_2, gradients=True)
    # The layers' weights and gradients are those of tensor parallelism alone.
    assert_equal(run, reference(2, *GQA, *TENSOR))


def test_pipeline(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, *PIPELINE, plan=NESTED_2, gradients=True)
    assert_equal(run, reference(2, *GQA, *PIPELINE))


INTERLEAVED_PLAN = "[01] [01] [0] [1] [0] [1] [1] [1]"


def test_interleaved_pipeline(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, *INTERLEAVED, plan=INTERLEAVED_PLAN, gradients=True)
    assert_equal(run, reference(2, *GQA, *INTERLEAVED))


def test_interleaved_pipeline_with_both_overlaps(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, *INTERLEAVED, *OVERLAPS, plan=INTERLEAVED_PLAN)
    # Megatron saves gradients that are not yet reduced here, so only the losses can tell.
    assert_equal_losses(run, reference(2, *GQA, *INTERLEAVED))


def test_fully_sharded_data_parallel(train: Callable, reference: Callable) -> None:
    """Megatron-FSDP gathers every layer's parameters in every micro-batch: rounds are chosen, and all ranks meet.

    Also in the backward passes of those rounds that the planner has recomputed.
    """
    sharded = ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params")
    model = (*GQA, *TENSOR, "--sequence-parallel")
    capacities = ("--flexsp-max-tokens-per-rank", "16", "--flexsp-max-recomputed-tokens-per-rank", "60")
    run = train(4, *model, *sharded, *OVERLAPS, "--ckpt-format", "fsdp_dtensor", "--flexsp-recompute", *capacities)
    assert re.search(r"\| lockstep \| micro-batches of each degree: .+? \| recomputed: ", run.output)
    # It keeps no gradients under the parameters' names, so only the losses can tell.
    assert_equal_losses(run, reference(2, *GQA, *TENSOR))


def test_fewer_key_value_heads_than_ranks(train: Callable, reference: Callable) -> None:
    one_head = (*LLAMA, "--group-query-attention", "--num-query-groups", "1")
    run = train(4, *one_head, plan="[0123] [01] [23]", gradients=True)
    assert_equal(run, reference(1, *one_head))


def test_bf16(train: Callable, reference: Callable) -> None:
    run = train(4, *GQA, "--bf16", plan=UNEQUAL)
    assert_equal_losses(run, reference(1, *GQA, "--bf16"), tolerance=1e-2)


def test_more_ranks_than_heads_with_recompute(train: Callable, reference: Callable) -> None:
    """Four ranks and two heads: two blocks of two ranks in a ring; in the narrower groups, none."""
    model = (*LLAMA, "--num-attention-heads", "2", "--group-query-attention", "--num-query-groups", "1")
    run = train(4, *model, *FULL, "--flexsp-degrees", "1,2,4", plan=UNEQUAL, gradients=True)
    assert_equal(run, reference(1, *model))


def test_more_ranks_than_heads_with_sequence_parallel(train: Callable, reference: Callable) -> None:
    """One head on each tensor-parallel rank: every group of two is a ring."""
    model = (*LLAMA, *TENSOR, "--num-attention-heads", "2")
    run = train(4, *model, "--sequence-parallel", "--flexsp-degrees", "1,2", plan=NESTED_2, gradients=True)
    assert_equal(run, reference(2, *model))


class TestTransformerEngine:
    """Megatron's real TEDotProductAttention and layers over the stand-in for Transformer Engine."""

    def test_any_plan(self, train: Callable, reference: Callable) -> None:
        run = train(4, *GQA, *TRANSFORMER_ENGINE, "--flexsp-exchange-parts", "2", plan=UNEQUAL, gradients=True)
        expected = reference(1, *GQA, *TRANSFORMER_ENGINE)
        assert_equal(run, expected)
        # And the stand-in is the same mathematics as Megatron's own layers.
        assert_equal_losses(expected, reference(1, *GQA))

    def test_sequence_parallel_and_full_recompute(self, train: Callable, reference: Callable) -> None:
        run = train(4, *GQA, *TENSOR, *TRANSFORMER_ENGINE, "--sequence-parallel", *FULL, plan=NESTED_2, gradients=True)
        assert_equal(run, reference(2, *GQA, *TENSOR, *TRANSFORMER_ENGINE))

    def test_windows_sinks_and_fewer_key_value_heads_than_ranks(self, train: Callable, reference: Callable) -> None:
        model = (*LLAMA, "--group-query-attention", "--num-query-groups", "1", "--window-size", "9,0")
        model += ("--softmax-type", "learnable", "--qk-layernorm", *TRANSFORMER_ENGINE)
        run = train(4, *model, "--recompute-granularity", "selective", plan="[0123] [01] [23]", gradients=True)
        assert any("softmax_offset" in name for name in run.gradients)
        assert_equal(run, reference(1, *model))

    def test_eight_bits_with_sequence_parallel_and_full_recompute(self, train: Callable, reference: Callable) -> None:
        """The stand-in rounds nothing, and refuses slices that the kernels of 8 bits couldn't multiply."""
        model = (*GQA, *TENSOR, *TRANSFORMER_ENGINE)
        eight_bits = ("--fp8-format", "hybrid", "--fp8-recipe", "mxfp8")
        run = train(4, *model, "--sequence-parallel", *FULL, *eight_bits, plan=NESTED_2, gradients=True)
        assert_equal(run, reference(2, *model))

    def test_delayed_scaling_with_unequal_counts(self, train: Callable, reference: Callable) -> None:
        """The stand-in reduces where the real one does, so that ranks would wait for ranks that run less."""
        model = (*GQA, *TENSOR, *TRANSFORMER_ENGINE)
        run = train(4, *model, "--fp8-format", "hybrid", plan=NESTED_2, gradients=True)
        assert_equal(run, reference(2, *model))
