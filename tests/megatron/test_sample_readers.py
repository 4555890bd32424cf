"""Processes that read samples: what is asked for, in order, and an error where one dies."""

import multiprocessing
import multiprocessing.context
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from megatron_flexsp.megatron.sample_readers import SampleReaders


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """PyTorch's loader puts a handler of its own in the place of this one."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_request_gets_its_samples_in_order(workers: int) -> None:
    state = torch.random.get_rng_state()
    readers = SampleReaders(lambda number: (number, os.getpid()), workers)
    for samples in ([], [7], list(range(40)), [3, 3, 1], [], list(range(100, 90, -1))):
        found = readers.read(samples)
        assert [number for number, _ in found] == samples
        assert all((process == os.getpid()) == (workers == 0) for _, process in found)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_data_sets_need_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.14 starts processes in a way in which they must, unless told otherwise. So does this, everywhere."""
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    assert SampleReaders(lambda number: -number, workers=1).read([1, 2]) == [-1, -2]


def test_a_dead_process_is_an_error() -> None:
    readers = SampleReaders(lambda number: os._exit(1) if number == 3 else number, workers=1)
    assert readers.read([1, 2]) == [1, 2]
    with pytest.raises(RuntimeError, match="worker"):
        readers.read([3])


def test_a_signal_for_training_is_not_for_them() -> None:
    readers = SampleReaders(lambda number: signal.getsignal(signal.SIGTERM), 1, ignored=signal.SIGTERM)
    assert readers.read([0]) == [signal.SIG_IGN]
