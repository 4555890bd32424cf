"""Micro-batches that keep what goes into each layer, and run the layers again in the backward pass.

Megatron decides it for a whole run (``--recompute-granularity full``), but its blocks of layers ask their configuration
anew in each forward pass. Here a plan decides it for each micro-batch: the configuration says so while that one's
forward pass runs. A layer runs again with what its first pass had: the pack is in the checkpointed function's closure,
``routers`` has it told to routers, and random states are for Megatron's checkpoint to restore.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_flexsp.errors import FlexSPError

_FLAG, _CAPACITY_FLAG = "--flexsp-recompute", "--flexsp-max-recomputed-tokens-per-rank"
_EACH_LAYER = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
_ASKS = re.compile(r"self\.config\.recompute_granularity == ['\"]full['\"]")


def check_arguments(args: argparse.Namespace) -> None:
    """Check the flags against each other and against how the job's ranks meet.

    Raises
    ------
    FlexSPError
        Where they don't go together.
    """
    least, most = args.flexsp_max_tokens_per_rank, args.flexsp_max_recomputed_tokens_per_rank
    if not args.flexsp_recompute:
        if most is not None:
            raise FlexSPError(f"{_CAPACITY_FLAG} needs {_FLAG}", f"add {_FLAG}, or take the capacity out")
        return
    if least is not None and most is not None and most < least:
        raise FlexSPError(
            f"{_CAPACITY_FLAG} {most} is less than --flexsp-max-tokens-per-rank {least}: a rank that recomputes "
            "activations holds more tokens",
            f"raise it, or take {_FLAG} out",
        )


def check_release(args: argparse.Namespace) -> None:
    """Refuse a Megatron whose layers can't recompute as the job asks.

    Raises
    ------
    FlexSPError
        Names what is otherwise than expected.
    """
    if args.flexsp_recompute:
        _check_that_passes_are_asked(args)
    if args.mtp_num_layers and (args.flexsp_recompute or args.recompute_granularity == "full"):
        _check_further_tokens(args)


def _check_that_passes_are_asked(args: argparse.Namespace) -> None:
    """Each forward pass must ask whether it is to be recomputed."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
    from megatron.core.transformer.transformer_block import TransformerBlock

    for kind in (TransformerBlock, *([MultiTokenPredictionLayer] if args.mtp_num_layers else ())):
        if _ASKS.search(inspect.getsource(kind.forward)) is None:
            raise FlexSPError(
                f"{_FLAG}: this Megatron's {kind.__name__} doesn't decide in each forward pass whether it recomputes",
                "take the flag out",
            )


def _check_further_tokens(args: argparse.Namespace) -> None:
    """A layer that predicts further tokens must hand all that it has to what recomputes it."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    given = inspect.signature(MultiTokenPredictionLayer.forward).parameters
    taken = inspect.signature(MultiTokenPredictionLayer._checkpointed_forward).parameters
    # 0.18 hands the padding to what doesn't take it, and fails without FlexSP too. 0.17 hands the pack to a checkpoint
    # that takes tensors alone; by blocks it leaves these layers as they are.
    lost = {"padding_mask"} & given.keys()
    if args.flexsp_recompute or args.recompute_method != "block":
        lost |= {"packed_seq_params"}
    if lost - taken.keys():
        flag = _FLAG if args.flexsp_recompute else "--recompute-granularity full"
        raise FlexSPError(
            f"{flag} with --mtp-num-layers: this Megatron can't recompute further tokens; 0.19 can",
            "take one of the two out",
        )


def asked_configurations(model: Any) -> tuple[Any, ...]:
    """The configurations that a model's blocks of layers ask in a forward pass, each once."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
    from megatron.core.transformer.transformer_block import TransformerBlock

    kinds = (TransformerBlock, MultiTokenPredictionLayer)
    found = {id(module.config): module.config for module in model.modules() if isinstance(module, kinds)}
    return tuple(found.values())


@contextmanager
def each_layer_recomputed(configurations: Sequence[Any]) -> Iterator[None]:
    """Blocks that run inside, in training, keep each layer's input alone. Backward passes may come at any time."""
    before = [{name: getattr(item, name) for name in _EACH_LAYER} for item in configurations]
    try:
        for item in configurations:
            _set(item, _EACH_LAYER)
        yield
    finally:
        for item, values in zip(configurations, before, strict=True):
            _set(item, values)


def _set(configuration: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(configuration, name, value)
