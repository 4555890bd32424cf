"""Global batches ahead of time: lengths from the index, a plan from the planning process, this rank's slices.

The iterator that Megatron's training loop is handed yields one ``PlannedBatch`` for each step. The coming
steps' plans are shared and their slices read in the background while the current one trains.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_flexsp.errors import FlexSPError, named_by_flags
from megatron_flexsp.megatron.background import Background
from megatron_flexsp.megatron.further_tokens import FurtherTokens, FurtherTokensBuilder
from megatron_flexsp.megatron.plan_channel import PlanChannel
from megatron_flexsp.megatron.sequences import Sequences, SequenceSource, TokenSource
from megatron_flexsp.megatron.settings import PLANNER_FLAGS
from megatron_flexsp.planner import MicroBatch, Plan
from megatron_flexsp.planner.service import PendingPlan, PlanningService
from megatron_flexsp.runtime import PackLayout, RingSchedule, ring_size_of

_BATCHES_IN_HAND = 2
"""Batches whose plans are shared and slices read, or about to be."""


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
    """Of the whole pack, as its layout has them: attention sees all of it."""
    tokens: Tensor | None
    labels: Tensor | None
    loss_mask: Tensor | None
    ring: RingSchedule | None = None
    """What ring attention computes, where the group is a ring."""
    further: FurtherTokens | None = None
    """For multi-token prediction."""
    recomputed: bool = False
    """Whether its layers keep their inputs alone and run again in the backward pass."""


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch, planned, with what this rank runs of it."""

    lengths: NDArray[np.int64]
    plan: Plan
    micro_batches: list[LocalMicroBatch]
    waited_for_plan_seconds: float
    waited_for_data_seconds: float
    samples: int
    """Megatron's samples that it is made of: as many as sequences, unless a sample holds several."""


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
    further_depths
        How many tokens beyond the next one are predicted.
    logs_each_token
        See ``FurtherTokensBuilder``.
    """

    def __init__(
        self,
        source: TokenSource,
        domain_rank: int,
        slice_multiple: int,
        reads_tokens: bool,
        gpu: int | None,
        query_heads: int | None = None,
        further_depths: int = 0,
        logs_each_token: bool = False,
    ) -> None:
        self._source = source
        self._domain_rank = domain_rank
        self._slice_multiple = slice_multiple
        self._reads_tokens = reads_tokens
        self._gpu = gpu
        self._query_heads = query_heads
        self._further_depths = further_depths
        self._logs_each_token = logs_each_token

    def read(self, plan: Plan, sequences: Sequences) -> list[LocalMicroBatch]:
        """What this rank runs, in order."""
        items = plan.micro_batches_of_rank(self._domain_rank)
        layouts = [self._layout(item, sequences.lengths) for item in items]
        laid_out = list(zip(items, layouts, strict=True))
        if self._reads_tokens:
            self._source.prepare(
                sequences.handles[item.sequences[piece.sequence]]
                for item, layout in laid_out
                for piece in layout.pieces
            )
        return [self._read_one(item, layout, sequences) for item, layout in laid_out]

    def _layout(self, item: MicroBatch, lengths: NDArray[np.int64]) -> PackLayout:
        return PackLayout(
            lengths=tuple(int(lengths[k]) for k in item.sequences),
            degree=item.degree,
            member=self._domain_rank - item.first_rank,
            slice_multiple=self._slice_multiple,
            ring_size=1 if self._query_heads is None else ring_size_of(item.degree, self._query_heads),
        )

    def _read_one(self, item: MicroBatch, layout: PackLayout, sequences: Sequences) -> LocalMicroBatch:
        ring = None
        if layout.ring_size > 1:
            ring = RingSchedule.of(layout)
            ring = ring.with_table(self._pinned(ring.table))
        tokens = labels = loss_mask = further = None
        if self._reads_tokens:
            held = [sequences.handles[position] for position in item.sequences]
            builder = None
            if self._further_depths:
                builder = FurtherTokensBuilder(
                    layout,
                    self._further_depths,
                    lambda sequence, length: self._source.learned(held[sequence], length),
                    None if self._logs_each_token else sequences.samples / len(sequences.lengths),
                )
            # Padding reads token 0 and predicts it with no weight.
            tokens = np.zeros(layout.slice_tokens, dtype=np.int64)
            labels = np.zeros(layout.slice_tokens, dtype=np.int64)
            loss_mask = np.zeros(layout.slice_tokens, dtype=np.float32)
            offset = 0
            for piece in layout.pieces:
                count = piece.stop - piece.start
                ahead = min(self._further_depths, layout.lengths[piece.sequence] - piece.stop)
                found = self._source.stretch(held[piece.sequence], piece.start, count + ahead)
                tokens[offset : offset + count] = found.tokens[:count]
                labels[offset : offset + count] = found.labels[:count]
                loss_mask[offset : offset + count] = 1.0 if found.learned is None else found.learned[:count]
                if builder is not None:
                    builder.add(offset, piece.sequence, piece.start, piece.stop, found)
                offset += count
            if builder is not None:
                further = builder.build().map(self._pinned)
        return LocalMicroBatch(
            first_rank=item.first_rank,
            layout=layout,
            positions=self._tensor(layout.positions),
            cu_seqlens=self._tensor(layout.cu_seqlens),
            tokens=None if tokens is None else self._tensor(tokens),
            labels=None if labels is None else self._tensor(labels),
            loss_mask=None if loss_mask is None else self._tensor(loss_mask),
            ring=ring,
            further=further,
            recomputed=item.recomputed,
        )

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return self._pinned(torch.from_numpy(array))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor if self._gpu is None else tensor.pin_memory()


@dataclass(frozen=True)
class _Ready:
    """A batch with its plan and this rank's slices."""

    samples: int
    lengths: NDArray[np.int64]
    plan: Plan
    micro_batches: list[LocalMicroBatch]
    planned_at: float
    """When the plan had come, on ``time.perf_counter``'s clock."""


@dataclass(frozen=True)
class _Asked:
    """A batch whose plan is under way."""

    sequences: Sequences
    pending: PendingPlan | None
    """On the planning rank only."""


class PlannedBatches:
    """Iterates over the planned batches of one split.

    ``__next__`` and ``prepare`` are collective: every rank calls them for the same steps in the same order. What is
    collective in them happens in the background, where all splits of a run take turns in one thread.

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
    background
        Shares plans and reads slices, in the order in which they are asked for. No other thread may use the
        channel at the same time.
    """

    def __init__(
        self,
        source: SequenceSource,
        reader: SliceReader,
        channel: PlanChannel,
        batches: Iterator[range],
        planner: PlanningService | None,
        plan_ahead: int,
        background: Background,
    ) -> None:
        self.source = source
        self._reader = reader
        self._channel = channel
        self._batches = batches
        self._planner = planner
        self._plan_ahead = plan_ahead
        self._background = background
        self._asked: deque[Future[_Asked]] = deque()
        self._in_hand: deque[Future[_Ready]] = deque()
        self._ask_ahead()

    def __iter__(self) -> Iterator[PlannedBatch]:
        return self

    def __next__(self) -> PlannedBatch:
        if not self._in_hand:
            self.prepare()
        if not self._in_hand:
            raise StopIteration
        started = time.perf_counter()
        ready = self._in_hand.popleft().result()
        waited = time.perf_counter() - started
        waited_for_plan = min(waited, max(0.0, ready.planned_at - started))
        waited_for_data = waited - waited_for_plan
        micro_batches = ready.micro_batches
        return PlannedBatch(ready.lengths, ready.plan, micro_batches, waited_for_plan, waited_for_data, ready.samples)

    def expect(self, batch: PlannedBatch | None, samples: int) -> PlannedBatch:
        """The batch that ``__next__`` gave, if it is what Megatron asks for.

        Raises
        ------
        FlexSPError
            If the data is used up, or the batch has another number of samples.
        """
        if batch is None:
            raise FlexSPError(
                f"{self.source.name}: its {len(self.source):,} samples are used up. A resumed run must ask for as "
                "many as before: keep --train-iters or --train-samples, --eval-iters, --eval-interval and the batch "
                "size"
            )
        if batch.samples != samples:
            raise FlexSPError(
                f"the batch has {batch.samples} samples where Megatron expects {samples}: the batch size "
                "changed in a way that was not foreseen. Resume from the last checkpoint"
            )
        return batch

    def prepare(self) -> None:
        """Have the coming plans shared and their slices read, for the steps after the next one."""
        while len(self._in_hand) < _BATCHES_IN_HAND and self._asked:
            asked = self._asked.popleft()
            self._ask_ahead()
            self._in_hand.append(self._background.submit(self._share_and_read, asked))

    def _ask_ahead(self) -> None:
        while len(self._asked) < self._plan_ahead and (samples := next(self._batches, None)) is not None:
            self._asked.append(self._background.submit(self._ask_for_plan, samples))

    def _ask_for_plan(self, samples: range) -> _Asked:
        sequences = self.source.sequences(samples, self._channel)
        pending = None if self._planner is None else self._planner.submit(sequences.lengths)
        return _Asked(sequences, pending)

    def _share_and_read(self, future: Future[_Asked]) -> _Ready:
        asked = future.result()
        lengths = asked.sequences.lengths
        planned: Plan | FlexSPError | None = None
        if self._planner is not None and asked.pending is not None:
            try:
                with named_by_flags(PLANNER_FLAGS):
                    planned = self._planner.result(asked.pending)
            except FlexSPError as error:
                planned = error
        plan = self._channel.share(lengths, planned)
        planned_at = time.perf_counter()
        read = partial(self._reader.read, plan, asked.sequences)
        micro_batches = read() if self.source.has_index else self._channel.together(read)
        return _Ready(asked.sequences.samples, lengths, plan, micro_batches, planned_at)


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
