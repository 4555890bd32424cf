"""Causal attention around a ring of blocks, each of which holds its share of every sequence of a pack.

Ring attention (Liu et al., arXiv 2310.01889) outside Ulysses' all-to-all, as in USP (Fang & Zhao, arXiv
2405.07719). Keys and values travel from block to block while each block attends over those that it has; partial
results are merged in fp32 by their log-sum-exps. The backward computes the scores again, and the gradients of
keys and values travel on, in fp32, one step behind the keys and values that they belong to.

By the zigzag order of the shares (``RingShares``), a block sees of each block before it the early stretches, and
of each block after it both, but with its own late stretches only: half of the products, every time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_flexsp.runtime.block_attention import Segments, block_attention, block_attention_backward
from megatron_flexsp.runtime.groups import SequenceGroup
from megatron_flexsp.runtime.packing import PackLayout

Rows = slice | Tensor


@dataclass(frozen=True)
class RingStep:
    """What a block computes while it has the keys and values of another one."""

    segments: Segments
    k_rows: Rows
    """Which of the other's keys are seen."""


@dataclass(frozen=True)
class RingPhase:
    """Consecutive steps in which the same queries take part."""

    q_rows: Rows
    steps: tuple[RingStep, ...]


@dataclass(frozen=True)
class _HostStep:
    q_lengths: NDArray[np.int64]
    k_lengths: NDArray[np.int64]
    k_rows: slice | NDArray[np.int64]


@dataclass(frozen=True)
class RingSchedule:
    """What one rank computes in ring attention over one pack, worked out once for all layers.

    Every number that a kernel reads from the device's memory is in one tensor, so that one copy brings them there.
    """

    table: Tensor
    """int32"""

    host_steps: tuple[_HostStep, ...]
    """From the rank's own block backwards around the ring."""

    late_rows: slice | NDArray[np.int64]
    """Which of its queries are in late stretches."""

    block: int

    @classmethod
    def of(cls, layout: PackLayout) -> RingSchedule:
        """The schedule of this rank, on the host."""
        shares, own = layout.shares, layout.block
        early, late, tokens = shares.early_tokens, shares.late_tokens, shares.tokens
        begins = np.cumsum(tokens, axis=1) - tokens
        padding = layout.block_tokens - tokens[own].sum()
        whole = np.append(tokens[own], padding) if padding else tokens[own]
        steps = [_HostStep(whole, whole, slice(0, layout.block_tokens))]
        for other in [*range(own - 1, -1, -1), *range(layout.ring_size - 1, own, -1)]:
            if other < own:
                steps.append(_HostStep(tokens[own], early[other], _rows(begins[other], early[other])))
            else:
                steps.append(_HostStep(late[own], tokens[other], _rows(begins[other], tokens[other])))
        late_rows = _rows(begins[own] + early[own], late[own])
        parts = [part for step in steps for part in (_bounds(step.q_lengths), _bounds(step.k_lengths), step.k_rows)]
        arrays = [part for part in (*parts, late_rows) if not isinstance(part, slice)]
        return cls(torch.from_numpy(np.concatenate(arrays).astype(np.int32)), tuple(steps), late_rows, own)

    def with_table(self, table: Tensor) -> RingSchedule:
        """The same with its table elsewhere: in pinned memory, or on the device."""
        return replace(self, table=table)

    @cached_property
    def _on_device(self) -> tuple[Segments, tuple[RingPhase, ...]]:
        offset = 0

        def take(count: int) -> Tensor:
            nonlocal offset
            offset += count
            return self.table[offset - count : offset]

        def rows(host_rows: slice | NDArray[np.int64]) -> Rows:
            return host_rows if isinstance(host_rows, slice) else take(len(host_rows))

        steps = []
        for step in self.host_steps:
            bounds = take(len(step.q_lengths) + 1), take(len(step.k_lengths) + 1)
            segments = Segments(tuple(step.q_lengths.tolist()), tuple(step.k_lengths.tolist()), *bounds)
            steps.append(RingStep(segments, rows(step.k_rows)))
        own, before, after = steps[0].segments, tuple(steps[1 : self.block + 1]), tuple(steps[self.block + 1 :])
        phases = []
        if before:
            phases.append(RingPhase(slice(0, sum(before[0].segments.q_lengths)), before))
        if after:
            phases.append(RingPhase(rows(self.late_rows), after))
        return own, tuple(phases)

    @property
    def own(self) -> Segments:
        """The block's own queries and keys, padding included: causal, each sequence for itself."""
        return self._on_device[0]

    @property
    def phases(self) -> tuple[RingPhase, ...]:
        """The steps with the blocks before, then those with the blocks after; either may be missing."""
        return self._on_device[1]


def ring_attention(
    q_BhD: Tensor, k_BgD: Tensor, v_BgD: Tensor, schedule: RingSchedule, group: SequenceGroup, softmax_scale: float
) -> Tensor:
    """Each sequence of the pack attends causally to itself, over all blocks of the group's ring.

    The kernel that ``ulysses_attention`` takes for a group that is a ring.

    Parameters
    ----------
    q_BhD, k_BgD, v_BgD
        All B tokens of this rank's block, of its heads, all of one width; h is a multiple of g.
    schedule
        This rank's, its table on the tensors' device.
    softmax_scale
        Factor of the scores before the softmax.

    Returns
    -------
    Tensor
        ``out_BhD``
    """
    return _RingAttention.apply(q_BhD, k_BgD, v_BgD, schedule, group, softmax_scale)  # type: ignore[no-any-return]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: RingSchedule, group: SequenceGroup, softmax_scale: float
    ) -> Tensor:
        heads = k.shape[1]
        pending = group.pass_on(torch.cat((k, v), dim=1))
        out, lse = block_attention(q, k, v, schedule.own, causal=True, softmax_scale=softmax_scale)
        out = out.float()
        left = group.ring_size - 1
        for phase in schedule.phases:
            q_now, out_now, lse_now = _take(q, phase.q_rows), _take(out, phase.q_rows), _take(lse, phase.q_rows, 1)
            for step in phase.steps:
                (kv,) = pending.wait()
                left -= 1
                if left:
                    pending = group.pass_on(kv)
                if step.segments.is_empty:
                    continue
                k_now, v_now = _take(kv, step.k_rows).tensor_split((heads,), dim=1)
                part = block_attention(q_now, k_now, v_now, step.segments, causal=False, softmax_scale=softmax_scale)
                _merge(out_now, lse_now, *part)
            if isinstance(phase.q_rows, Tensor):
                out.index_copy_(0, phase.q_rows.long(), out_now)
                lse.index_copy_(1, phase.q_rows.long(), lse_now)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.schedule, ctx.group, ctx.softmax_scale = schedule, group, softmax_scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, scale, heads = ctx.group, ctx.softmax_scale, k.shape[1]
        pending = group.pass_on(torch.cat((k, v), dim=1))
        (dout,) = gradients
        dq, dk, dv = (
            x.float()
            for x in block_attention_backward(
                dout, q, k, v, out, lse, ctx.schedule.own, causal=True, softmax_scale=scale
            )
        )
        (kv,) = pending.wait()
        left = group.ring_size - 1
        dkv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
        others_dkv: tuple[Tensor, ...] = ()
        for phase in ctx.schedule.phases:
            now = [_take(x, phase.q_rows) for x in (dout, q, out)]
            lse_now = _take(lse, phase.q_rows, 1)
            for step in phase.steps:
                left -= 1
                # Keys and values go on to the next block; what the step before added to their
                # predecessors' gradients goes after them.
                outgoing = ((kv,) if left else ()) + others_dkv
                pending = group.pass_on(*outgoing) if outgoing else None
                parts = None
                if not step.segments.is_empty:
                    seen = _take(kv, step.k_rows).tensor_split((heads,), dim=1)
                    parts = block_attention_backward(
                        *(now[0], now[1], *seen, now[2], lse_now, step.segments), causal=False, softmax_scale=scale
                    )
                    _add(dq, phase.q_rows, parts[0])
                if pending is not None:
                    incoming = pending.wait()
                    if left:
                        kv = incoming[0]
                    if others_dkv:
                        dkv = incoming[-1]
                if parts is not None:
                    _add(dkv[:, :heads], step.k_rows, parts[1])
                    _add(dkv[:, heads:], step.k_rows, parts[2])
                others_dkv = (dkv,)
        (dkv,) = group.pass_on(*others_dkv).wait()
        dk, dv = dk + dkv[:, :heads], dv + dkv[:, heads:]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _merge(out_ThD: Tensor, lse_hT: Tensor, part_ThD: Tensor, part_lse_hT: Tensor) -> None:
    """Add the attention over further keys to a result in place; the result's queries have seen some already."""
    weight_Th1 = torch.sigmoid(part_lse_hT - lse_hT).transpose(0, 1).unsqueeze(-1)
    out_ThD.lerp_(part_ThD.float(), weight_Th1)
    torch.logaddexp(lse_hT, part_lse_hT, out=lse_hT)


def _take(x: Tensor, rows: Rows, dim: int = 0) -> Tensor:
    """A view where the rows are a slice, else a copy."""
    return x.narrow(dim, rows.start, rows.stop - rows.start) if isinstance(rows, slice) else x.index_select(dim, rows)


def _add(x: Tensor, rows: Rows, y: Tensor) -> None:
    if isinstance(rows, slice):
        x[rows] += y
    else:
        x.index_add_(0, rows, y.to(x.dtype))


def _bounds(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(lengths)))


def _rows(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """The places of these stretches, in order: a slice where they are one."""
    total = int(lengths.sum())
    if not total:
        return slice(0, 0)
    rows = np.repeat(starts - _bounds(lengths)[:-1], lengths) + np.arange(total)
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == total else rows
