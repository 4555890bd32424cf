"""Whole runs: identical without the flag, exact after a resume, and a log whose figures are the batch's own."""

import math
import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .conftest import JOB, LLAMA, LOSS, ROOT

SCRIPT = str(ROOT / "scripts" / "pretrain_gpt.py")
ON_CPU = str(ROOT / "tests" / "cpu" / "run_on_cpu.py")
LAUNCHER = ("-m", "megatron_flexsp.run", "--cpu")


def logged(done: subprocess.CompletedProcess[str]) -> dict[int, tuple[str, str]]:
    """Loss and gradient norm of each iteration, to the last digit that Megatron prints."""
    return {int(step): (loss, norm) for step, loss, norm in LOSS.findall(done.stdout)}


def validated(done: subprocess.CompletedProcess[str]) -> dict[int, str]:
    """Validation losses by iteration."""
    found = re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", done.stdout)
    return {int(step): loss for step, loss in found}


def checkpoint(folder: Path, iteration: int) -> dict[str, Any]:
    """What ``--ckpt-format torch`` saved on the first rank."""
    return torch.load(folder / f"iter_{iteration:07}" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)


def tensors(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by where they are."""
    if isinstance(state, torch.Tensor):
        return {path: state}
    if isinstance(state, dict):
        items = list(state.items())
    elif isinstance(state, (list, tuple)):
        items = list(enumerate(state))
    else:
        return {}
    return {name: tensor for key, value in items for name, tensor in tensors(value, f"{path}/{key}").items()}


def test_without_the_flag_nothing_changes(torchrun: Callable, documents: Path, tmp_path: Path) -> None:
    """The launcher against a bare Megatron: what is printed, and every bit of weights, optimizer and random state."""
    arguments = [*JOB, *LLAMA, "--hidden-dropout", "0.1", "--train-iters", "3", "--data-path", str(documents)]
    saving = ["--save-interval", "3", "--ckpt-format", "torch"]
    runs = {}
    for name, start in (("bare", [ON_CPU, SCRIPT]), ("launcher", [*LAUNCHER, SCRIPT])):
        folder = tmp_path / name
        done = torchrun(1, *start, *arguments, *saving, "--save", str(folder), fresh=name == "launcher")
        assert "[flexsp]" not in done.stdout
        runs[name] = (logged(done), tensors({k: v for k, v in checkpoint(folder, 3).items() if k != "args"}))
    (losses, state), (bare_losses, bare_state) = runs["launcher"], runs["bare"]
    assert losses == bare_losses
    assert list(losses) == [1, 2, 3]
    assert state.keys() == bare_state.keys()
    assert sum("weight" in name for name in state) > 10
    assert sum("exp_avg" in name for name in state) > 10
    assert [name for name, tensor in state.items() if not torch.equal(tensor, bare_state[name])] == []


def test_a_resumed_run_goes_on_exactly(torchrun: Callable, documents: Path, tmp_path: Path) -> None:
    """Of two losses printed after a start or a resume the second is the mean of both: iteration 5 is left out."""
    arguments = [*JOB, *LLAMA, "--train-iters", "6", "--data-path", str(documents), "--use-distributed-optimizer"]
    arguments += ["--split", "90,10,0", "--eval-interval", "2", "--eval-iters", "1"]
    arguments += ["--flexsp", "--flexsp-max-tokens-per-rank", "40", "--flexsp-solver-time-limit", "60"]
    boards = ["--tensorboard-dir", str(tmp_path / "boards")] if find_spec("tensorboard") else []
    saving = ["--save", str(tmp_path / "saved"), "--save-interval", "3"]
    whole = torchrun(2, *LAUNCHER, SCRIPT, *arguments, *saving, *boards)
    resumed = torchrun(2, *LAUNCHER, SCRIPT, *arguments, "--load", str(tmp_path / "saved"), "--ckpt-step", "3")
    expected, found = logged(whole), logged(resumed)
    assert (list(expected), list(found)) == ([1, 2, 3, 4, 5, 6], [4, 5, 6])
    assert (found[4], found[6]) == (expected[4], expected[6])
    assert expected[5][1] == found[5][1]
    assert validated(whole).keys() == {2, 4, 6}
    assert validated(resumed) == {step: loss for step, loss in validated(whole).items() if step > 3}
    if boards:
        assert flexsp_scalars(tmp_path / "boards")


def test_dropout_goes_on_as_it_would_have(torchrun: Callable, documents: Path, tmp_path: Path) -> None:
    """Though ranks have run different numbers of micro-batches by then. Other plans would drop other things."""
    arguments = [*JOB, *LLAMA, "--attention-dropout", "0.1", "--hidden-dropout", "0.1", "--data-path", str(documents)]
    arguments += ["--train-iters", "3", "--save", str(tmp_path), "--save-interval", "2", "--use-distributed-optimizer"]
    arguments += ["--flexsp", "--flexsp-max-tokens-per-rank", "4096"]
    job = (2, *LAUNCHER, str(ROOT / "tests" / "end_to_end" / "prescribed.py"), *arguments)
    plan = {"FLEXSP_TEST_PLAN": "[01] [0] [1] [1]"}
    expected = logged(torchrun(*job, env=plan))
    found = logged(torchrun(*job, "--load", str(tmp_path), "--ckpt-step", "2", env=plan))
    assert found == {3: expected[3]}
    without = ["--attention-dropout", "0", "--hidden-dropout", "0", "--train-iters", "1"]
    assert logged(torchrun(*job, *without, env=plan))[1] != expected[1]


def flexsp_scalars(folder: Path) -> set[str]:
    """The names of the figures in a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name for name in events.Tags()["scalars"] if name.startswith("flexsp/")}


LENGTHS = "lognormal:mean=16,sigma=1,min=2,max=48"
LINE = re.compile(
    r"\[flexsp\] iteration +(?P<iteration>\d+) \| (?P<schedule>\w+)"
    r" \| micro-batches of each degree: (?P<degrees>[^|]+)"
    r" \| micro-batches a rank: (?P<fewest>\d+)-(?P<most>\d+)"
    r" \| sequences: (?P<sequences>\d+) \| tokens: (?P<tokens>\d+)"
    r" \| predicted balance: (?P<balance>[\d.]+)% \| padding: (?P<padding>[\d.]+)%"
    r" \| planning \(ms\): (?P<planning>[\d.]+)"
    r" \| waited for plan \(ms\): (?P<plan>[\d.]+) \| waited for data \(ms\): (?P<data>[\d.]+) "
)


def mock_batches(size: int, count: int) -> list[np.ndarray]:
    """The lengths of the run's global batches, worked out here."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from megatron_flexsp.megatron.documents import DocumentDataset, DocumentDatasetConfig
    from megatron_flexsp.megatron.mock_documents import MockDocuments, mock_lengths

    mock = MockDocuments(mock_lengths(LENGTHS, 48, seed=1234), vocabulary=257)
    config = DocumentDatasetConfig(
        random_seed=1234, sequence_length=48, blend=None, split="100,0,0", mock_documents=mock
    )
    samples = [size * count, 0, 0]
    dataset, _, _ = BlendedMegatronDatasetBuilder(DocumentDataset, samples, lambda: True, config).build()
    return list(dataset.lengths(np.arange(size * count)).reshape(count, size))


@pytest.mark.parametrize("layout", [(), ("--tensor-model-parallel-size", "2", "--sequence-parallel")])
def test_the_log_and_the_operation_count_are_those_of_the_batches(
    layout: tuple[str, ...], torchrun: Callable, tmp_path: Path
) -> None:
    from megatron.training.training import num_floating_point_operations

    done = torchrun(
        2,
        *(*LAUNCHER, SCRIPT, *JOB, *layout, "--train-iters", "3", "--mock-data", "--flexsp"),
        *("--flexsp-mock-lengths", LENGTHS, "--flexsp-max-tokens-per-rank", "48" if layout else "24"),
        *("--save", str(tmp_path), "--save-interval", "3", "--ckpt-format", "torch"),
    )
    changed = re.findall(r"^ > \[flexsp\] (megatron\S+)", done.stdout, re.MULTILINE)
    assert "megatron.training.arguments:parse_args" in changed and len(set(changed)) == len(changed)
    assert not [place for place in changed if "moe" in place or "latent" in place], "no model of this job has them"
    assert re.search(r"\[flexsp\] arguments set .*dataloader_type=external.* variable_seq_lengths=True", done.stdout)
    lines = [found.groupdict() for found in LINE.finditer(done.stdout)]
    batches = mock_batches(12, 3)
    assert [int(line["iteration"]) for line in lines] == [1, 2, 3], done.stdout
    assert [int(line["tokens"]) for line in lines] == [batch.sum() for batch in batches]
    assert {(line["schedule"], line["sequences"]) for line in lines} == {("nested", "12")}
    for line, batch in zip(lines, batches, strict=True):
        counts = {int(degree): int(count) for count, degree in re.findall(r"(\d+) x (\d+)", line["degrees"])}
        assert counts.keys() <= ({1} if layout else {1, 2})
        assert counts.get(2, 0) >= (max(batch) > 24) or layout
        assert 1 <= int(line["fewest"]) <= int(line["most"]) <= sum(counts.values())
        assert 0 < float(line["balance"]) <= 100
        assert 0 <= float(line["padding"]) < 100
        assert all(float(line[name]) >= 0 for name in ("planning", "plan", "data"))
    if not layout:
        assert any("x 2" in line["degrees"] for line in lines), "some sequence needs both ranks"

    saved = checkpoint(tmp_path, 3)
    operations = sum(
        num_floating_point_operations(
            saved["args"],
            len(batch),
            total_real_tokens_in_batch=float(batch.sum()),
            seqlen_squared_sum_in_batch=float((batch**2).sum()),
        )
        for batch in batches
    )
    assert math.isclose(saved["num_floating_point_operations_so_far"], operations, rel_tol=1e-12)


def test_autotune_refits_and_training_goes_on(train: Callable) -> None:
    arguments = ("--train-iters", "26", "--global-batch-size", "4")
    tuned, plain = train(2, *LLAMA, *arguments, "--flexsp-autotune"), train(2, *LLAMA, *arguments)
    assert "autotune: costs refitted to the last 20 steps: step overhead" in tuned.output
    assert tuned.losses[26] == pytest.approx(plain.losses[26], rel=1e-5)
