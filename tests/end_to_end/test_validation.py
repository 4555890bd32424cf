"""Validation on whole sets: every document once, each time."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import HERE, JOB, LLAMA, LOSS

VALIDATION = re.compile(r"validation-(\w+) loss at iteration (\d+) \| lm loss value: ([0-9.E+-]+)")


def write_documents(prefix: Path, lengths: list[int]) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(len(lengths))
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(torch.from_numpy(generator.integers(0, 256, length)), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_each_set_is_run_whole_each_time(torchrun: Callable, tmp_path: Path) -> None:
    """The weights stand still, and a training batch is all of the first set: so both have one loss."""
    first = write_documents(tmp_path / "first", [40, 3, 20, 9, 31, 2, 15, 28])
    second = write_documents(tmp_path / "second", [12, 47, 30])
    job = [*JOB, *LLAMA, "--global-batch-size", "8", "--train-iters", "3", "--lr", "1e-12", "--eval-interval", "1"]
    del job[job.index("--split") : job.index("--split") + 2]
    result = torchrun(
        2,
        *("-m", "megatron_flexsp.run", "--cpu", str(HERE.parents[1] / "scripts" / "pretrain_gpt.py"), *job),
        *("--train-data-path", first, "--valid-data-path", first, second, "--flexsp"),
        *("--full-validation", "--multiple-validation-sets", "--validation-set-names", "first", "second"),
        # Batches of 6 and of what is left.
        *("--eval-global-batch-size", "6", "--flexsp-max-tokens-per-rank", "64"),
    )
    output = result.stdout + result.stderr
    trained = {int(step): float(loss) for step, loss, _ in LOSS.findall(output)}
    validated = {(name, int(step)): float(loss) for name, step, loss in VALIDATION.findall(output)}
    assert validated.keys() >= {(name, step) for name in ("first", "second") for step in (1, 2)}
    assert validated["first", 1] == pytest.approx(trained[2], rel=1e-6)
    assert validated["first", 2] == pytest.approx(validated["first", 1], rel=1e-6)
    assert validated["second", 2] == pytest.approx(validated["second", 1], rel=1e-6)
    assert validated["second", 1] != pytest.approx(validated["first", 1], rel=1e-4)
