"""Runs real training steps of given plans and times them, and the bare all-to-alls of the job's groups.

Here, and only here, devices are waited for: what is measured must be over.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import RerunDataIterator
from numpy.typing import NDArray
from torch import Tensor

from megatron_flexsp.megatron.batches import GivenBatch, PlannedBatch, SliceReader
from megatron_flexsp.megatron.context import Context, on_cpu
from megatron_flexsp.megatron.sequences import Sequences, Stretch
from megatron_flexsp.planner import Plan, first_ranks
from megatron_flexsp.profiler.memory import SavedBytes, optimizer_tensors, state_bytes


class RandomText:
    """Tokens that no file holds, the same for every sequence that begins at the same place."""

    def __init__(self, vocabulary: int, longest: int) -> None:
        self._tokens = np.random.default_rng(0).integers(0, vocabulary, longest + 1)

    def prepare(self, handles: Iterable[int]) -> None:
        """Nothing: it is all there."""

    def stretch(self, handle: int, start: int, count: int) -> Stretch:
        """``count`` tokens from ``start``."""
        text = self._tokens[start : start + count + 1]
        return Stretch(text[:-1], text[1:], None)

    def learned(self, handle: int, length: int) -> NDArray[np.bool_] | None:
        """All labels count."""
        return None


@dataclass(frozen=True)
class MeasuredBytes:
    """What one step kept on this rank."""

    state: float
    """Between steps: parameters, gradients, optimizer."""

    activations: float
    """The most that was kept on top of it at one time."""


class StepRunner:
    """Calls Megatron's own ``train_step`` with batches of our choice.

    Parameters
    ----------
    train_step
        Megatron's.
    call
        The arguments of the call that it was about to get.
    context
        The run's groups.
    """

    def __init__(self, train_step: Callable[..., Any], call: inspect.BoundArguments, context: Context) -> None:
        self._train_step = train_step
        self._call = call
        self._context = context
        data_iterator = call.arguments["data_iterator"]
        self._chunks = len(data_iterator) if isinstance(data_iterator, list) else None
        self._model = call.arguments["model"]

    def batch(self, plan: Plan, sequences: Sequences, reader: SliceReader) -> PlannedBatch:
        """What this rank runs of a plan."""
        micro_batches = reader.read(plan, sequences)
        return PlannedBatch(sequences.lengths, plan, micro_batches, 0.0, 0.0, sequences.samples)

    def seconds(self, batch: PlannedBatch) -> float:
        """Run one step from a common start; what it took on the slowest rank. Collective."""
        return self._slowest(lambda: self._run(batch, lambda: None))

    def bytes(self, batch: PlannedBatch) -> MeasuredBytes:
        """Run one step and find the memory that it needs here. Collective."""
        return MeasuredBytes(*(self._counted_bytes(batch) if on_cpu() else self._allocated_bytes(batch)))

    def exchange_seconds(self, degree: int, bytes_per_rank: int, repeats: int) -> list[float]:
        """Seconds of one all-to-all of so many bytes from each rank, all groups of the degree at once. Collective.

        In rings among the ranks of each block, as in training: the others never exchange.
        """
        domain_size, rank = self._context.settings.domain_size, self._context.domain_rank
        first_rank = rank // degree * degree
        group, ranks = None, 1
        if first_rank in first_ranks(degree, domain_size):
            group = self._context.groups.group(first_rank, degree)
            ranks = group.block_size
        device = torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())
        outgoing = torch.zeros(ranks, max(1, bytes_per_rank // ranks // 4), dtype=torch.float32, device=device)

        def exchange() -> None:
            if group is not None and ranks > 1:
                group.exchange_in_block(outgoing)

        exchange()
        return [self._slowest(exchange) for _ in range(repeats)]

    def _run(self, batch: PlannedBatch, after_schedule: Callable[[], None]) -> None:
        iterator = RerunDataIterator(GivenBatch(batch, after_schedule))
        arguments = {
            **self._call.arguments,
            "data_iterator": iterator if self._chunks is None else [iterator] * self._chunks,
        }
        call = inspect.BoundArguments(self._call.signature, arguments)  # type: ignore[arg-type]
        self._train_step(*call.args, **call.kwargs)

    def _slowest(self, work: Callable[[], None]) -> float:
        _wait_for_device()
        self._context.hosts.barrier()
        started = time.perf_counter()
        work()
        _wait_for_device()
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        self._context.hosts.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken)

    def _allocated_bytes(self, batch: PlannedBatch) -> tuple[float, float]:
        _wait_for_device()
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), 0

        def look() -> None:
            nonlocal peak
            # The allocator counts on the host, in the order of the calls: nothing has to be waited for.
            peak = torch.cuda.max_memory_allocated()

        self._run(batch, look)
        return float(before), float(peak - before)

    def _counted_bytes(self, batch: PlannedBatch) -> tuple[float, float]:
        state: list[Tensor | None] = [*self._held_by_model(), *optimizer_tensors(self._call.arguments["optimizer"])]
        with ExitStack() as stack:
            saved = stack.enter_context(SavedBytes(self._held_by_model()))
            self._run(batch, lambda: None)
        return float(state_bytes(state)), float(saved.peak)

    def _held_by_model(self) -> list[Tensor]:
        held: list[Tensor] = []
        for chunk in self._model:
            # By the class: on Megatron's wrapper the name is a list of gradient buffers.
            held += [*chunk.parameters(), *torch.nn.Module.buffers(chunk)]
            held += _gradients(chunk.parameters())
        return held


def _gradients(parameters: Iterable[Any]) -> list[Tensor]:
    found = (getattr(parameter, "main_grad", parameter.grad) for parameter in parameters)
    return [gradient for gradient in found if gradient is not None]


def _wait_for_device() -> None:
    if not on_cpu():
        torch.cuda.synchronize()
