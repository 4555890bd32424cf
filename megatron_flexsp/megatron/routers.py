"""Mixtures of experts over packs: what a router counts, and over which ranks it adds up.

A pack lies on the ranks of its own group, and holds several sequences and perhaps padding. Megatron's router knows
one static context-parallel group and takes a micro-batch for one sample. Here its balancing losses add up over the
pack's ranks, and over each sequence by itself where they are defined so; padding counts nowhere.

The losses are Megatron's own (``moe_utils.switch_load_balancing_loss_func``) with the weights that
``--calculate-per-token-loss`` gives them: what a loss is taken over weighs as much as it has tokens. Summed over the
global batch, ``seq_aux_loss`` and the z-loss then don't depend on the plan. ``aux_loss`` is taken over a pack and
``global_aux_loss`` over the micro-batches that all ranks have run so far in the step, so these two do.

In a pipeline other micro-batches' forward passes come between one's own forward and backward. A router knows its pack
from the forward step that it runs in, and recomputation, wherever it happens, from the pass that it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import Router, TopKRouter
from torch import Tensor

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.packed_attention import FlexSPPackedSeqParams
from megatron_flexsp.megatron.seams import Seam


@dataclass(frozen=True)
class RoutedPack:
    """What routers need to know of the micro-batch that runs."""

    params: FlexSPPackedSeqParams
    batch_tokens: int
    """Tokens of all sequences of the global batch."""

    domain_size: int
    micro_batches_expected: int
    """Megatron divides what it logs by this number of micro-batches, however many there are."""

    @property
    def sequences(self) -> int:
        """How many sequences the pack holds; none if it is a filler."""
        assert self.params.layout is not None
        return len(self.params.layout.lengths)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the pack; None for one rank alone."""
        assert self.params.group is not None
        return self.params.group.process_group

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """The place in the pack of each local token's sequence, int64 ``[t]``; padding has the number of sequences."""
        layout, positions = self.params.layout, self.params.positions
        assert layout is not None and positions is not None
        if layout.ring_size > 1:
            # A block may begin in the middle of each of its sequences, so positions don't tell them apart.
            tokens = np.full(layout.slice_tokens, self.sequences)
            held = [piece.stop - piece.start for piece in layout.pieces]
            tokens[: sum(held)] = np.repeat([piece.sequence for piece in layout.pieces], held)
            sequence_of_token = torch.from_numpy(tokens)
            if positions.is_cuda:
                sequence_of_token = sequence_of_token.pin_memory()
            return sequence_of_token.to(positions.device, non_blocking=True)
        # Positions are on the device already. A sequence starts where they are 0, and so does each token of padding.
        begun = self.sequences
        if layout.pieces:
            first = layout.pieces[0]
            begun = first.sequence if first.start > 0 else first.sequence - 1
        return (torch.cumsum(positions == 0, dim=0) + begun).clamp(max=self.sequences)

    @cached_property
    def padding(self) -> Tensor | None:
        """Which local tokens are padding, bool ``[t]``; None where the pack has no padding."""
        assert self.params.layout is not None
        if self.params.layout.padded_tokens == self.params.layout.total_tokens:
            return None
        return self.sequence_of_token == self.sequences


_running: ContextVar[RoutedPack] = ContextVar("running micro-batch")


@contextmanager
def routed(pack: RoutedPack) -> Iterator[None]:
    """Routers that run inside route this pack."""
    token = _running.set(pack)
    try:
        yield
    finally:
        _running.reset(token)


def _running_pack() -> RoutedPack:
    try:
        return _running.get()
    except LookupError:
        raise FlexSPError(
            "a router runs outside of FlexSP's forward step, where it can't know what is padding. If it is recomputed "
            "under --fp8-format, leave the experts out of the recomputation"
        ) from None


def _local(router: Any, tokens: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a slice, as sequence parallelism cuts it."""
    if not router.config.sequence_parallel or router.tp_group.size() == 1:
        return tokens
    return tokens.chunk(router.tp_group.size())[router.tp_group.rank()]


def _add_up(counts: Tensor, *groups: dist.ProcessGroup | None) -> Tensor:
    """Sum over each of the groups in turn, in place."""
    for group in groups:
        if group is not None and group.size() > 1:
            dist.all_reduce(counts, group=group)
    return counts


def _attach(
    router: Any, activation: Tensor, name: str, coefficient: float, loss_sum: Tensor, weight: float = 1.0
) -> Tensor:
    """Give a loss to the backward pass, times a weight, and to Megatron's log.

    ``loss_sum`` is this rank's part of a loss times the tokens that it is taken over. Megatron's function takes a mean
    and a number of tokens: their product goes to the backward pass, scaled as the installed version scales it, and the
    mean to the log. There it is averaged over the ranks and the micro-batches that Megatron expects. What is given as
    the mean makes that the average over the tokens of the global batch.
    """
    pack = _running_pack()
    for_log = pack.domain_size * pack.micro_batches_expected / pack.batch_tokens
    attached: Tensor = router.attach_and_log_load_balancing_loss(
        activation,
        coefficient,
        coefficient * loss_sum * for_log,
        name,
        router.tp_cp_group,
        valid_token_count=weight / (for_log * router.tp_cp_group.size()),
    )
    return attached


def _switch_loss(router: Any, scores: Tensor, routing_map: Tensor, sequence_of_token: Tensor | None) -> Tensor:
    """This rank's part of the balancing loss (Fedus et al., arXiv 2101.03961) times the tokens that it is taken over.

    Parameters
    ----------
    scores, routing_map
        ``[t, experts]``; zero for padding.
    sequence_of_token
        The loss is taken over each sequence by itself; None takes it over the whole pack.

    Returns
    -------
    Tensor
        A scalar. Over the pack's ranks it adds up to the sum of all sequences' losses, each times its tokens.
    """
    pack = _running_pack()
    if sequence_of_token is None:
        counts = routing_map.sum(dim=0, keepdim=True, dtype=torch.float32)
    else:
        counts = routing_map.new_zeros((pack.sequences, routing_map.shape[1]), dtype=torch.float32)
        counts.index_add_(0, sequence_of_token, routing_map.float())
    _add_up(counts, router.tp_cp_group, pack.process_group)
    # Every token goes to topk experts, so this is topk x tokens.
    shares = counts * (router.num_experts / counts.sum(dim=1, keepdim=True))
    if sequence_of_token is not None:
        shares = shares.index_select(0, sequence_of_token)
    return (scores * shares).sum()


def _aux_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``_apply_aux_loss``: over all tokens of the pack."""

    def apply_aux_loss(
        self: Any,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
        **others: Any,
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0 or _running_pack().sequences == 0:
            return probs
        loss_sum = _switch_loss(self, scores_for_aux_loss, routing_map, None)
        return _attach(self, probs, "load_balancing_loss", coefficient, loss_sum)

    return apply_aux_loss


def _seq_aux_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``_apply_seq_aux_loss``: over each sequence, wherever its parts lie."""

    def apply_seq_aux_loss(
        self: Any,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
        **others: Any,
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        pack = _running_pack()
        if coefficient == 0 or pack.sequences == 0:
            return probs
        # Padding counts for the last sequence, with zeros.
        sequence_of_token = _local(self, pack.sequence_of_token).clamp(max=pack.sequences - 1)
        loss_sum = _switch_loss(self, scores_for_aux_loss, routing_map, sequence_of_token)
        return _attach(self, probs, "seq_load_balancing_loss", coefficient, loss_sum)

    return apply_seq_aux_loss


def _global_aux_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``_apply_global_aux_loss``: shares of the experts among all tokens that were routed so far in this step.

    Megatron takes the mean of the micro-batches' counts; with micro-batches of unequal size their sum over the sum of
    their tokens is meant. It can't be the whole step's: early micro-batches go backward before late ones are routed.
    Collective over all data-parallel ranks of a pipeline stage, and so for the lockstep schedule only. As in Megatron,
    each micro-batch's loss counts 1 / data-parallel size.
    """

    def apply_global_aux_loss(
        self: Any, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if coefficient == 0:
            return probs
        counts = routing_map.sum(dim=0, dtype=torch.float32)
        self.global_tokens_per_expert += _add_up(counts, self.tp_dp_cp_group)
        shares = self.global_tokens_per_expert * (self.num_experts / self.global_tokens_per_expert.sum().clamp(min=1))
        loss_sum = (scores_for_aux_loss * shares).sum()
        weight = 1 / _running_pack().domain_size
        return _attach(self, probs, "global_load_balancing_loss", coefficient, loss_sum, weight)

    return apply_global_aux_loss


def _z_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``apply_z_loss`` (Zoph et al., arXiv 2202.08906, section 3.3), each token by itself."""

    def apply_z_loss(self: Any, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares = torch.logsumexp(logits, dim=-1).square()
        if padding_mask is not None:
            squares = squares.masked_fill(padding_mask, 0)
        return _attach(self, logits, "z_loss", coefficient, squares.sum())

    return apply_z_loss


def _expert_bias(original: Callable[..., None]) -> Callable[..., None]:
    """``_apply_expert_bias``, which takes a mask of tokens for one of experts."""

    def apply_expert_bias(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        original(self, routing_map)

    return apply_expert_bias


def _router_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``TopKRouter.forward`` told what is padding."""

    def forward(self: Any, input: Tensor, padding_mask: Tensor | None = None, *more: Any, **others: Any) -> Any:
        # Under --bf16 Megatron turns these counts to bfloat16, which can't count past 256.
        for counts in (self.local_tokens_per_expert, self.global_tokens_per_expert):
            if counts is not None and counts.dtype != torch.float32:
                counts.data = counts.data.float()
        padding = _running_pack().padding
        padding_mask = None if padding is None else _local(self, padding).unsqueeze(1)
        return original(self, input, padding_mask, *more, **others)

    return forward


def _checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    """``CheckpointFunction.forward`` whose function runs again in the micro-batch that it ran in first."""

    def forward(ctx: Any, run_function: Callable[..., Any], distribute_saved_activations: bool, *args: Any) -> Any:
        pack = _running.get(None)
        if pack is None:
            return original(ctx, run_function, distribute_saved_activations, *args)

        def in_its_micro_batch(*inputs: Any) -> Any:
            with routed(pack):
                return run_function(*inputs)

        return original(ctx, in_its_micro_batch, distribute_saved_activations, *args)

    return staticmethod(forward)


def check_routers(model: Any) -> None:
    """Refuse a model whose routers would count padding, and each slice by itself."""
    for name, module in model.named_modules():
        if isinstance(module, Router) and type(module) is not TopKRouter:
            raise FlexSPError(
                f"the model's {name} is a {type(module).__name__}; FlexSP works with Megatron's own TopKRouter"
            )


def seams() -> list[Seam]:
    """What is changed where a model has experts."""
    router = "megatron.core.transformer.moe.router:TopKRouter"
    scored = ("self", "probs", "scores_for_aux_loss", "routing_map")
    return [
        Seam(f"{router}.forward", ("self", "input", "padding_mask"), _router_forward, "knows what is padding"),
        Seam(f"{router}._apply_aux_loss", scored, _aux_loss, "adds up over the pack's own group"),
        Seam(f"{router}._apply_seq_aux_loss", scored, _seq_aux_loss, "takes each sequence by itself"),
        Seam(f"{router}._apply_global_aux_loss", scored, _global_aux_loss, "weighs micro-batches by their tokens"),
        Seam(f"{router}.apply_z_loss", ("self", "logits", "padding_mask"), _z_loss, "leaves out padding"),
        Seam(
            f"{router}._apply_expert_bias",
            ("self", "routing_map", "padding_mask"),
            _expert_bias,
            "leaves out padding",
        ),
        Seam(
            # Not the function around it, which a script may have imported already.
            "megatron.core.tensor_parallel.random:CheckpointFunction.forward",
            ("ctx", "run_function", "distribute_saved_activations"),
            _checkpoint,
            "recomputes routers in their own micro-batch",
        ),
        Seam(
            f"{router}.attach_and_log_load_balancing_loss",
            ("self", "activation", "aux_loss_coeff", "aux_loss", "aux_loss_name", "reduce_group", "valid_token_count"),
            None,
            "takes a part of a balancing loss",
        ),
    ]
