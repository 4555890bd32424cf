"""Which jobs need all ranks side by side in their micro-batches, as the lockstep schedule has them."""

from __future__ import annotations

import argparse

from megatron_flexsp.megatron import experts, precision


def why_rounds(args: argparse.Namespace) -> str | None:
    """Why all ranks must run their micro-batches side by side; None if they needn't.

    Whatever the ranks of a domain do together in a layer, they must all come to in the same micro-batch; and what they
    count by micro-batches, and must agree on, they must count alike.
    """
    if getattr(args, "use_megatron_fsdp", False):
        return "Megatron-FSDP (--use-megatron-fsdp) gathers parameters from all ranks in every micro-batch"
    if precision.scales_weights_by_history(args):
        return (
            "the scales of 8-bit parameters (--fp8-param-gather with --fp8-recipe delayed) follow from how many "
            "micro-batches a rank has run"
        )
    return experts.why_rounds(args)
