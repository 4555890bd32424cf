"""The flags of a Megatron job that don't go with FlexSP: which, why, and what to do. Needs neither torch nor Megatron.

Tables for the launcher, which refuses at start-up, and for ``flexsp convert`` and ``flexsp doctor``, which read a
job's arguments before it is started. In: an ``argparse`` namespace with Megatron's names, Megatron's defaults where a
flag isn't given. Out: the entries that apply.
"""

from __future__ import annotations

import argparse

from megatron_flexsp.compatibility.experts import (
    EXPERT_REFUSALS,
    PADDED_BY_HYBRIDEP,
    flex_backend,
    load_balancing_types,
)
from megatron_flexsp.compatibility.jobs import JOB_REFUSALS
from megatron_flexsp.compatibility.recomputation import RECOMPUTE_REFUSALS, recomputes_some
from megatron_flexsp.compatibility.refusal import Refusal

__all__ = [
    "EXPERT_REFUSALS",
    "JOB_REFUSALS",
    "PADDED_BY_HYBRIDEP",
    "RECOMPUTE_REFUSALS",
    "Refusal",
    "flex_backend",
    "in_place_of_full",
    "load_balancing_types",
    "refusals",
]


def refusals(args: argparse.Namespace) -> list[Refusal]:
    """What of a job's arguments doesn't go with FlexSP, in the tables' order.

    Parameters
    ----------
    args
        Megatron's arguments, as parsed and not yet validated. Names that only some Megatron versions have may be
        missing.
    """
    table = JOB_REFUSALS
    if args.num_experts:
        table += EXPERT_REFUSALS
    if recomputes_some(args):
        table += RECOMPUTE_REFUSALS
    return [entry for entry in table if entry.applies(args)]


def in_place_of_full(args: argparse.Namespace) -> argparse.Namespace | None:
    """A job's arguments with ``--flexsp-recompute`` in place of ``--recompute-granularity full``.

    None where that isn't there or can't be replaced.
    """
    if args.recompute_granularity != "full":
        return None
    gone = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    instead = argparse.Namespace(**{**vars(args), "flexsp_recompute": True, **dict.fromkeys(gone)})
    before = refusals(args)
    return instead if all(entry in before for entry in refusals(instead)) else None
