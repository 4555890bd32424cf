"""Megatron's multi-token prediction over packs: its rolls are answered from what was read with the slice.

The loss of a depth is summed over tokens like that of the next token, and weighs as much in each sequence. Megatron
takes that weight over a micro-batch on one rank; here each token has the weight that it has where its sequence is a
micro-batch by itself, so that the result doesn't depend on the plan.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.further_tokens import FurtherTokens
from megatron_flexsp.megatron.packed_attention import FlexSPPackedSeqParams
from megatron_flexsp.megatron.seams import Seam

_MODULE = "megatron.core.transformer.multi_token_prediction"


class Successors:
    """Answers the rolls of one micro-batch: after each tensor comes what stands one place further.

    Parameters
    ----------
    further
        On the device.
    tokens, positions
        What the model is given, ``[1, t]``; rolls are told apart by the tensor that is rolled.
    """

    def __init__(self, further: FurtherTokens, tokens: Tensor, positions: Tensor) -> None:
        # Megatron divides by its sum.
        self.loss_mask = further.weights.new_ones(1)
        self.factors = further.factors
        self._first_labels = further.labels[:1]
        chains = [
            [tokens, *further.tokens.split(1)],
            [positions, *further.positions.split(1)],
            [self._first_labels, *further.labels.split(1)[1:]],
            [self.loss_mask, *further.weights.split(1)],
        ]
        self._next = {id(one): following for chain in chains for one, following in itertools.pairwise(chain)}
        # Held, since an id is a tensor's own only as long as there is the tensor.
        self._held = chains

    def after(self, tensor: Tensor) -> Tensor:
        """What a tensor becomes when rolled."""
        following = self._next.get(id(tensor))
        if following is None:
            # Megatron copies the labels before it rolls them the first time; nothing else may be unknown.
            if _factors.get() is None or tensor.dtype != torch.int64:
                raise FlexSPError("Megatron rolls something else than tokens, positions, labels and the loss mask")
            following = self._first_labels
        return following


_factors: ContextVar[Iterator[Tensor] | None] = ContextVar("factors of the coming depths' losses", default=None)
"""There while a micro-batch's losses are added up."""


def _roll_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    """``roll_tensor`` of one tensor, which is returned with its sum, or of a list in newer releases."""

    @functools.wraps(original)
    def roll_tensor(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        params = bound.get("packed_seq_params")
        if not isinstance(params, FlexSPPackedSeqParams):
            return original(*args, **kwargs)
        successors = params.successors
        if successors is None:
            raise FlexSPError("Megatron rolls tokens for which nothing was read ahead: is --mtp-num-layers set?")
        rolled = next(iter(bound.values()))
        if isinstance(rolled, list):
            return [successors.after(tensor) for tensor in rolled]
        # On the host: the sum is only divided by, and asked whether it is 0.
        return (None, None) if rolled is None else (successors.after(rolled), torch.ones(()))

    return roll_tensor


def _process_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``process_mtp_loss`` with weights for each token."""

    @functools.wraps(original)
    def process_mtp_loss(*args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(original).bind(*args, **kwargs)
        params = bound.arguments.get("packed_seq_params")
        if not isinstance(params, FlexSPPackedSeqParams) or bound.arguments["labels"] is None:
            return original(*args, **kwargs)
        assert params.successors is not None
        bound.arguments["loss_mask"] = params.successors.loss_mask
        factors = iter(params.successors.factors.split(1))
        token = _factors.set(factors)
        try:
            hidden_states = original(*bound.args, **bound.kwargs)
        finally:
            _factors.reset(token)
        if next(factors, None) is not None:
            raise FlexSPError("Megatron has added up fewer losses than --mtp-num-layers says")
        return hidden_states

    return process_mtp_loss


def _attach_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``MTPLossAutoScaler.apply``, which hands a depth's losses to the backward pass."""

    def apply(output: Tensor, mtp_loss: Tensor) -> Tensor:
        factors = _factors.get()
        return original(output, mtp_loss if factors is None else mtp_loss * next(factors))

    return apply


def logs_each_token() -> bool:
    """Whether this Megatron logs a mean over all tokens; older ones log the mean of the micro-batches' means."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    save = getattr(MTPLossLoggingHelper, "save_loss_to_tracker", None)
    return save is not None and "num_tokens" in inspect.signature(save).parameters


def seams() -> list[Seam]:
    """What is changed where a model predicts several tokens."""
    return [
        Seam(
            f"{_MODULE}:roll_tensor",
            ("shifts", "dims", "cp_group", "packed_seq_params"),
            _roll_tensor,
            "is answered from what was read ahead",
        ),
        Seam(
            "megatron.core.models.gpt.gpt_model:process_mtp_loss",
            ("labels", "loss_mask", "packed_seq_params"),
            _process_loss,
            "weighs each sequence by itself",
        ),
        Seam(f"{_MODULE}:MTPLossAutoScaler.apply", (), _attach_loss, "weighs each sequence by itself"),
    ]
