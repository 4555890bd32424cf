"""Predicting further tokens: loss, gradients and what is logged of each depth are those of sequences by themselves."""

import re
from collections.abc import Callable

import pytest

from .conftest import Run
from .test_equality import FULL, GQA, NESTED_2, PIPELINE, assert_equal


def further_losses(run: Run) -> list[float]:
    """The logged loss of each depth, step after step."""
    return [float(loss) for loss in re.findall(r"mtp_\d+ loss: ([0-9.E+-]+)", run.output)]


def test_two_depths_on_the_last_stage(train: Callable, reference: Callable) -> None:
    """Sequences of a few tokens end before the second depth. The last stage has the embedding too."""
    model = (*GQA, *PIPELINE, "--mtp-num-layers", "2")
    run = train(4, *model, *FULL, plan=NESTED_2, gradients=True)
    expected = reference(2, *model)
    assert_equal(run, expected)
    assert len(further_losses(run)) == 10
    assert further_losses(run) == pytest.approx(further_losses(expected), rel=1e-5)
