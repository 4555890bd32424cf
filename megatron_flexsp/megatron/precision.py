"""What 8-bit floating point asks of a job: how long slices are, and who shares scaling factors.

Matrix products in 8 bits run over the tokens of a slice, and their kernels ask for a multiple of some number of those.
Packs are padded to it; nothing else in FlexSP knows of it, since attention stays in 16 bits.
"""

from __future__ import annotations

import argparse

_BLOCK = 128
"""Tokens of a block that has one scaling factor under ``--fp8-recipe blockwise``."""


def slice_multiple(args: argparse.Namespace) -> int:
    """What the tokens of a rank's slice must divide by.

    Under sequence parallelism each tensor-parallel rank has an equal part of the slice, quantised before the parts are
    gathered; so the kernels' multiple is owed by each part. Of blocks only whole ones can be gathered: Transformer
    Engine asserts it until 2.13, and from 2.14 on gathers others in 16 bits, quantised twice.
    """
    parts = int(args.tensor_model_parallel_size) if args.sequence_parallel else 1
    if not args.fp8:
        return parts
    # Imported here: a job in 16 bits needs nothing of it.
    from megatron.core.fp8_utils import get_fp8_align_size

    if parts > 1 and args.fp8_recipe == "blockwise":
        return parts * _BLOCK
    return parts * int(get_fp8_align_size(args.fp8_recipe))


def scales_weights_by_history(args: argparse.Namespace) -> bool:
    """Whether ranks must have run equally many micro-batches to give a weight the same scale.

    Each rank casts its part of a weight by its own scale, and the others read it by theirs. With delayed scaling it
    follows from a history, which moves on by one entry in every micro-batch. The entries are the same on all ranks: the
    optimizer reduces over them the greatest of the values that it casts (``cast_master_weights_to_fp8``).
    """
    return bool(args.fp8 and args.fp8_recipe == "delayed" and getattr(args, "fp8_param_gather", False))


def keep_scaling_in_tensor_parallel_group(args: argparse.Namespace) -> None:
    """Have delayed scaling reduce over tensor-parallel ranks alone.

    By default it reduces over data-parallel ranks as well, at the end of every micro-batch's forward and backward;
    with different numbers of micro-batches they would wait for each other for ever. Megatron's configuration has
    the choice (``tp_only_amax_red``) and its command line doesn't.
    """
    if args.fp8 and args.fp8_recipe == "delayed":
        args.tp_only_amax_red = True
