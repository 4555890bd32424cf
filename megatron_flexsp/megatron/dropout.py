"""Dropout whose masks depend on seed, step and rank alone.

Megatron's random states run on from micro-batch to micro-batch. Ranks here run different numbers of those, while a
checkpoint keeps one rank's states for all; and ranks of a group, which hold parts of the same sequences, begin with
equal ones. So every training step begins with fresh states on each rank: a resumed run drops what the uninterrupted one
would have, as long as it has the same plans, and no two ranks of a domain drop alike.
"""

from __future__ import annotations

import argparse

import numpy as np
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def has_dropout(args: argparse.Namespace) -> bool:
    """Whether anything is dropped in training."""
    return bool(args.attention_dropout or args.hidden_dropout)


def step_seed(seed: int, consumed_samples: int, domain_rank: int, pipeline_rank: int) -> int:
    """A seed for one rank and step, the same for the tensor-parallel ranks of one place.

    Megatron adds small numbers to it for tensor- and expert-parallel ranks; seeds of other ranks and steps are far off.
    """
    mixed = np.random.SeedSequence([seed, consumed_samples, domain_rank, pipeline_rank])
    return int(mixed.generate_state(1)[0]) >> 1  # leaves room for what Megatron adds


def seed_dropout(args: argparse.Namespace, domain_rank: int) -> None:
    """Set the random states that this rank's dropout draws from in the step to come. Waits for no device."""
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    model_parallel_cuda_manual_seed(step_seed(args.seed, args.consumed_train_samples, domain_rank, pipeline_rank))
