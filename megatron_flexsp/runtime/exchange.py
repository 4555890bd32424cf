"""An all-to-all with a gradient that other work may come between, on its way there and on its way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_flexsp.runtime.groups import PendingExchange, SequenceGroup


class Exchange:
    """Rows of a tensor for the other ranks of a block, under way from here on until ``received``.

    In the backward it is the other way round: the gradient sets out where the tensor was received, and is waited for
    where that was sent. Autograd runs what was done last first, so what came between the two in the forward, or its
    gradient, comes between them in the backward too. All ranks of the block must begin their exchanges in one order.

    Parameters
    ----------
    group
        Whose block exchanges.
    outgoing
        ``[block_size, ...]``; row ``i`` goes to the block's rank ``i``.
    aside
        Whether anything comes between that needn't wait for it.
    """

    def __init__(self, group: SequenceGroup, outgoing: Tensor, aside: bool) -> None:
        self._group = group
        self._aside = aside
        self._pending: PendingExchange | None = None
        self._in_flight: Tensor | None = _Begin.apply(self, outgoing)

    def received(self) -> Tensor:
        """What the other ranks sent, in the order of their ranks, in the shape of what was sent. To be called once."""
        in_flight, self._in_flight = self._in_flight, None
        return _End.apply(self, in_flight)  # type: ignore[no-any-return]

    def begin(self, outgoing: Tensor) -> Tensor:
        """Send; returns the buffer that is being filled."""
        self._pending = self._group.begin_exchange_in_block(outgoing, self._aside)
        return self._pending.incoming

    def end(self) -> Tensor:
        """Wait; returns the buffer, filled."""
        pending, self._pending = self._pending, None
        assert pending is not None
        return pending.wait()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, outgoing: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(outgoing)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.exchange.end()


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, in_flight: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.end().view_as(in_flight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.exchange.begin(gradients[0])
