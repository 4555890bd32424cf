"""``--flexsp-samples packed``: packs of the script's own, taken apart and planned, equal to one sequence at a time."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import HERE, Run
from .test_equality import GQA, LEARNED, TENSOR, assert_equal, assert_equal_losses
from .test_multi_token_prediction import further_losses

PACKED = ("--flexsp-samples", "packed")
PACKS = {"FLEXSP_TEST_SCRIPT": str(HERE / "packs.py")}
SEQUENCES = re.compile(r"\| sequences: (\d+) \| tokens: (\d+)")


def test_any_plan_equals_one_sequence_at_a_time(train: Callable, reference: Callable) -> None:
    """Labels are the sample's own, and what the loss mask leaves out at the end of a sequence is not run."""
    model = (*GQA, "--mtp-num-layers", "2")
    run: Run = train(4, *model, *PACKED, plan="[0123] [01] [23] [0] [1] [2] [3] [2]", gradients=True, script=PACKS)
    expected = reference(1, *model, packs=True)
    assert_equal(run, expected)
    assert "the script's training set (Packs): 60 packed samples" in run.output
    planned = [tuple(map(int, counts)) for counts in SEQUENCES.findall(run.output)]
    # The reference has a micro-batch for each sequence, and Megatron divides the sum by the number of samples. The
    # second step's is printed as a mean with the first's.
    means = [12 / sequences for sequences, _ in planned for _ in range(2)]
    logged = [loss * mean for loss, mean in zip(further_losses(expected), means, strict=True)]
    assert further_losses(run)[4:] == pytest.approx(logged[4:], rel=1e-5)
    assert further_losses(run)[:2] == pytest.approx(logged[:2], rel=1e-5)
    assert len({sequences for sequences, _ in planned}) > 1
    assert all(tokens < 12 * 48 for _, tokens in planned)


def test_tensor_parallel_and_a_resumed_run(train: Callable, reference: Callable, tmp_path: Path) -> None:
    """The script's provider builds data on first tensor-parallel ranks alone. Samples are counted as packs."""
    job = (
        4,
        *LEARNED,
        *TENSOR,
        *PACKED,
        "--flexsp-max-tokens-per-rank",
        "40",
        "--eval-iters",
        "1",
        "--eval-interval",
        "2",
    )
    job += ("--ckpt-format", "torch", "--num-workers", "1", "--flexsp-solver-time-limit", "60")
    run = train(*job, "--save", str(tmp_path / "saved"), "--save-interval", "3", script=PACKS)
    assert_equal_losses(run, reference(2, *LEARNED, *TENSOR, packs=True))
    resumed = train(*job, "--load", str(tmp_path / "saved"), "--ckpt-step", "3", script=PACKS)
    assert resumed.losses[4] == run.losses[4]
    assert "consumed samples:           60" in resumed.output
    validated = re.compile(r"validation loss at iteration 4 \| lm loss value: (\S+)")
    assert validated.findall(resumed.output) == validated.findall(run.output) != []


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FLEXSP_TEST_BAD_SAMPLE": "14"}, r"\(Packs\): sample 14 can't be planned: its cu_seqlens doesn't count"),
        ({"FLEXSP_TEST_CHANGES": "1"}, r"\(Packs\): sample \d+ is not what it was when its batch was planned"),
    ],
)
def test_a_sample_that_cannot_be_used_stops_all_ranks(
    environment: dict[str, str], message: str, train: Callable
) -> None:
    with pytest.raises(pytest.fail.Exception, match=message) as failed:
        train(2, *GQA, *PACKED, plan="[01] [0] [1]", script=PACKS | environment)
    assert "did not end" not in str(failed.value)
