"""Older releases of Megatron: every place that is changed fits, and losses and gradients are as in the equality tests.

``scripts/test.sh`` installs each of them into a folder of its own, which stands before the installed release.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import TRANSFORMER_ENGINE
from .test_equality import GQA, INTERLEAVED, INTERLEAVED_PLAN, OVERLAPS, assert_equal
from .test_experts import EACH_SEQUENCE, MOE, TWO_PARTS


@pytest.mark.parametrize("release", ["0.17.1", "0.18.2"])
def test_experts_on_two_ranks_with_both_overlaps(release: str, train: Callable, reference: Callable) -> None:
    """Passes by every seam but Transformer Engine's."""
    folder = Path(sys.prefix, f"megatron-{release}")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; scripts/test.sh makes it")
    model = (*MOE, *TWO_PARTS, *EACH_SEQUENCE)
    plan = "[01] [0] [1] [01] [0] [1]"
    run = train(2, *model, *OVERLAPS, plan=plan, gradients=True, megatron=folder)
    # Megatron adds the commit of the repository that it lies in to its version.
    assert re.search(rf"\[flexsp\] in Megatron {release}\S* of {folder}:", run.output)
    assert_equal(run, reference(2, *model, megatron=folder))


def test_the_oldest_release_with_transformer_engine_and_an_interleaved_pipeline(
    train: Callable, reference: Callable
) -> None:
    folder = Path(sys.prefix, "megatron-0.17.1")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; scripts/test.sh makes it")
    model = (*GQA, *INTERLEAVED, *TRANSFORMER_ENGINE)
    run = train(4, *model, plan=INTERLEAVED_PLAN, gradients=True, megatron=folder)
    assert_equal(run, reference(2, *model, megatron=folder))
