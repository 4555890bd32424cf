"""Megatron's own training on the CPU: it learns, its parallelisms agree, and it resumes where it stopped."""

from pathlib import Path

import pytest

from tests.cpu.conftest import Train

NO_DROPOUT = "--attention-dropout 0 --hidden-dropout 0"
DISTRIBUTED_OPTIMIZER = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --calculate-per-token-loss"


def test_one_process_learns(train: Train) -> None:
    losses = train(1, "--bf16 --recompute-granularity selective --eval-iters 1 --eval-interval 3", fresh=True)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert losses[6] < losses[1] - 0.2


@pytest.mark.slow
def test_sequence_parallelism_and_overlap_do_not_change_the_losses(train: Train) -> None:
    """Norms under sequence parallelism see a part of the tokens: their gradients must be summed over the ranks."""
    plain = train(4, f"{TP2_PP2} {NO_DROPOUT}")
    clever = train(
        4,
        f"{TP2_PP2} {NO_DROPOUT} {DISTRIBUTED_OPTIMIZER} --sequence-parallel"
        " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    )
    assert plain[6] < plain[1] - 0.2
    assert clever == pytest.approx(plain, abs=2e-6)


@pytest.mark.slow
def test_resumes_exactly(train: Train, tmp_path: Path) -> None:
    """With dropout, so that random states count too. Iteration 4 is the first after the resume; see `train` for 5."""
    whole = train(2, f"{DISTRIBUTED_OPTIMIZER} --save {tmp_path} --save-interval 3")
    rest = train(2, f"{DISTRIBUTED_OPTIMIZER} --load {tmp_path} --ckpt-step 3")
    assert list(rest) == [4, 5, 6]
    assert (rest[4], rest[6]) == (whole[4], whole[6])
