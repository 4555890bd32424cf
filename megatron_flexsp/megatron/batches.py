"""Global batches ahead of time: lengths from the index, a plan from the planning process, this rank's slices.

The iterator that Megatron's training loop is handed yields one ``PlannedBatch`` for each step. The coming
steps' plans are shared and their slices read while the current one trains.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.documents import SampleSource
from megatron_flexsp.megatron.plan_channel import PlanChannel
from megatron_flexsp.planner import MicroBatch, Plan
from megatron_flexsp.planner.service import PendingPlan, PlanningService
from megatron_flexsp.runtime import PackLayout, RingSchedule, ring_size_of

_BATCHES_IN_HAND = 2
"""Batches whose plans all ranks have and whose slices are read or being read."""


@dataclass(frozen=True)
class LocalMicroBatch:
    """This rank's part of one micro-batch; the tensors lie on the host.

    Tensors are ``[slice_tokens]`` where nothing else is said. A stage in the middle of a pipeline has no
    tokens and no labels.
    """

    first_rank: int
    layout: PackLayout
    positions: Tensor
    cu_seqlens: Tensor
    """Of the whole pack, int32 ``[segments + 1]``: attention sees all of it."""
    tokens: Tensor | None
    labels: Tensor | None
    loss_mask: Tensor | None
    ring: RingSchedule | None = None
    """What ring attention computes, where the group is a ring."""


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch, planned, with what this rank runs of it."""

    lengths: NDArray[np.int64]
    plan: Plan
    micro_batches: list[LocalMicroBatch]
    waited_for_plan_seconds: float
    waited_for_data_seconds: float


class TokenSource(Protocol):
    """Where tokens come from."""

    def read(self, sample: int, start: int, count: int) -> NDArray[Any]:
        """``count`` tokens of a sample from ``start``."""


class SliceReader:
    """Reads a rank's slices of a planned batch.

    Parameters
    ----------
    source
        Where tokens come from.
    domain_rank
        This rank's place in its domain.
    slice_multiple
        What a slice must divide by.
    reads_tokens
        False in the middle of a pipeline, where only lengths matter.
    gpu
        The CUDA device that the tensors go to, so that they are pinned for it; None without one.
    query_heads
        Attention heads of a tensor-parallel rank; wider groups are rings. None: there are enough for any.
    """

    def __init__(
        self,
        source: TokenSource,
        domain_rank: int,
        slice_multiple: int,
        reads_tokens: bool,
        gpu: int | None,
        query_heads: int | None = None,
    ) -> None:
        self._source = source
        self._domain_rank = domain_rank
        self._slice_multiple = slice_multiple
        self._reads_tokens = reads_tokens
        self._gpu = gpu
        self._query_heads = query_heads

    def start_thread(self) -> None:
        """Prepare a thread that reads: a new one would pin for device 0, and take memory there."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def read(self, plan: Plan, samples: range, lengths: NDArray[np.int64]) -> list[LocalMicroBatch]:
        """What this rank runs, in order."""
        return [self._read_one(item, samples, lengths) for item in plan.micro_batches_of_rank(self._domain_rank)]

    def _read_one(self, item: MicroBatch, samples: range, lengths: NDArray[np.int64]) -> LocalMicroBatch:
        layout = PackLayout(
            lengths=tuple(int(lengths[k]) for k in item.sequences),
            degree=item.degree,
            member=self._domain_rank - item.first_rank,
            slice_multiple=self._slice_multiple,
            ring_size=1 if self._query_heads is None else ring_size_of(item.degree, self._query_heads),
        )
        ring = None
        if layout.ring_size > 1:
            ring = RingSchedule.of(layout)
            ring = ring.with_table(self._pinned(ring.table))
        tokens = labels = loss_mask = None
        if self._reads_tokens:
            # Padding reads token 0 and predicts it with no weight.
            tokens = np.zeros(layout.slice_tokens, dtype=np.int64)
            labels = np.zeros(layout.slice_tokens, dtype=np.int64)
            loss_mask = np.zeros(layout.slice_tokens, dtype=np.float32)
            offset = 0
            for piece in layout.pieces:
                count = piece.stop - piece.start
                text = self._source.read(samples[item.sequences[piece.sequence]], piece.start, count + 1)
                tokens[offset : offset + count] = text[:-1]
                labels[offset : offset + count] = text[1:]
                loss_mask[offset : offset + count] = 1.0
                offset += count
        return LocalMicroBatch(
            first_rank=item.first_rank,
            layout=layout,
            positions=self._tensor(layout.positions),
            cu_seqlens=self._tensor(layout.cu_seqlens),
            tokens=None if tokens is None else self._tensor(tokens),
            labels=None if labels is None else self._tensor(labels),
            loss_mask=None if loss_mask is None else self._tensor(loss_mask),
            ring=ring,
        )

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return self._pinned(torch.from_numpy(array))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor if self._gpu is None else tensor.pin_memory()


class PlannedBatches:
    """Iterates over the planned batches of one split.

    ``__next__`` is collective: every rank calls it for the same steps in the same order.

    Parameters
    ----------
    source, reader, channel
        Lengths; slices; the way that plans reach all ranks.
    batches
        The samples of each coming batch.
    planner
        Makes the plans; on the planning rank only.
    plan_ahead
        Batches that are planned before they are needed.
    """

    def __init__(
        self,
        source: SampleSource,
        reader: SliceReader,
        channel: PlanChannel,
        batches: Iterator[range],
        planner: PlanningService | None,
        plan_ahead: int,
    ) -> None:
        self.source = source
        self._reader = reader
        self._channel = channel
        self._batches = batches
        self._planner = planner
        self._plan_ahead = plan_ahead
        self._planning: deque[tuple[range, NDArray[np.int64], PendingPlan | None]] = deque()
        self._reading: deque[tuple[NDArray[np.int64], Plan, float, Future[list[LocalMicroBatch]]]] = deque()
        self._reader_thread = ThreadPoolExecutor(1, "flexsp-reader", initializer=reader.start_thread)
        self._start_planning()

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self

    def __next__(self) -> PlannedBatch:
        if not self._reading:
            self.prepare()
        if not self._reading:
            raise StopIteration
        lengths, plan, waited_for_plan, slices = self._reading.popleft()
        started = time.perf_counter()
        micro_batches = slices.result()
        waited_for_data = time.perf_counter() - started
        return PlannedBatch(lengths, plan, micro_batches, waited_for_plan, waited_for_data)

    def expect(self, batch: PlannedBatch | None, sequences: int) -> PlannedBatch:
        """The batch that ``__next__`` gave, if it is what Megatron asks for.

        Raises
        ------
        FlexSPError
            If the data is used up, or the batch has another number of sequences.
        """
        if batch is None:
            raise FlexSPError(
                f"{self.source.name}: its {len(self.source):,} sequences are used up. A resumed run must ask for as "
                "many as before: keep --train-iters or --train-samples, --eval-iters, --eval-interval and the batch "
                "size"
            )
        if len(batch.lengths) != sequences:
            raise FlexSPError(
                f"the batch has {len(batch.lengths)} sequences where Megatron expects {sequences}: the batch size "
                "changed in a way that was not foreseen. Resume from the last checkpoint"
            )
        return batch

    def prepare(self) -> None:
        """Share the coming plans and begin to read their slices. Collective, as ``__next__`` is.

        Call it when the step's work is launched: what is shared then is for the steps after the next one.
        """
        while len(self._reading) < _BATCHES_IN_HAND and self._planning:
            self._share_next()

    def _start_planning(self) -> None:
        while len(self._planning) < self._plan_ahead and (samples := next(self._batches, None)) is not None:
            lengths = self.source.lengths(np.arange(samples.start, samples.stop))
            pending = None if self._planner is None else self._planner.submit(lengths)
            self._planning.append((samples, lengths, pending))

    def _share_next(self) -> None:
        samples, lengths, pending = self._planning.popleft()
        self._start_planning()
        started = time.perf_counter()
        planned: Plan | FlexSPError | None = None
        if self._planner is not None and pending is not None:
            try:
                planned = self._planner.result(pending)
            except FlexSPError as error:
                planned = error
        plan = self._channel.share(lengths, planned)
        waited = time.perf_counter() - started
        slices = self._reader_thread.submit(self._reader.read, plan, samples, lengths)
        self._reading.append((lengths, plan, waited, slices))


class GivenBatch:
    """In the place of ``PlannedBatches``: one batch that is not the training data's, for measuring.

    Parameters
    ----------
    batch
        What this rank runs.
    after_schedule
        Called when the step's last backward is launched.
    """

    def __init__(self, batch: PlannedBatch, after_schedule: Callable[[], None]) -> None:
        self._batches = iter((batch,))
        self.prepare = after_schedule

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self

    def __next__(self) -> PlannedBatch:
        return next(self._batches)


def batches_from(consumed: int, total: int, size_at: Callable[[int], int]) -> Iterator[range]:
    """The samples of each batch from ``consumed`` on, as Megatron's sequential sampler takes them.

    ``size_at`` gives the batch's size when so many samples are consumed; an incomplete last batch is left out.
    """
    while consumed + (size := size_at(consumed)) <= total:
        yield range(consumed, consumed + size)
        consumed += size
