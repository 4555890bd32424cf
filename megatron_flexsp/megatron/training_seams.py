"""Where FlexSP enters a training run: what must be there before the script imports it, and what the job then needs.

Which functions a job needs changed, its arguments say. A Megatron that has moved one of experts' routers still trains a
model without experts, so the larger part is put in place where Megatron has validated the arguments: before it makes
process groups or a model. All of these are looked up as they are called, in a module of Megatron's own or in a class,
so that what was imported meanwhile meets them too.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_flexsp.megatron import (
    argument_changes,
    experts,
    flag_checks,
    latent_attention,
    multi_token_prediction,
    packed_attention,
    precision,
    profiling,
    recomputation,
    releases,
    routers,
    seams,
    te_attention,
)
from megatron_flexsp.megatron.provenance import check_same_job
from megatron_flexsp.megatron.seams import Seam
from megatron_flexsp.megatron.settings import settings_from_args
from megatron_flexsp.megatron.training import FlexSPTraining

EVERYTHING = argparse.Namespace(flexsp_profile="", multi_latent_attention=True, mtp_num_layers=1, num_experts=1)
"""Of a job's arguments those that say which places it needs, where it needs all of them."""

_TRAINING = "megatron.training.training"


def entry_seams(run: FlexSPTraining) -> list[Seam]:
    """What a script imports, and so must be in place before it runs."""
    parameters = ("train_valid_test_dataset_provider", "forward_step_func")
    checks = "checks the flags, and puts the rest in place"
    return [
        *(
            Seam(place, ("args", "defaults"), functools.partial(_check_arguments, run), checks)
            for place in releases.places_of("validate_args")
        ),
        *(
            Seam(place, parameters, run.wrap_pretrain, "plans documents or packs")
            for place in ("megatron.training:pretrain", f"{_TRAINING}:pretrain")
        ),
    ]


def job_seams(run: FlexSPTraining, args: argparse.Namespace) -> list[Seam]:
    """What else this job needs. Making the list changes nothing."""
    needed = [*_step_seams(run), *packed_attention.seams()]
    if HAVE_TE:  # whatever --transformer-impl says: a script's own layers may use it
        needed += te_attention.seams()
    if args.multi_latent_attention:
        needed += latent_attention.seams()
    if args.mtp_num_layers:
        needed += multi_token_prediction.seams()
    if args.num_experts:
        needed += routers.seams()
    if args.flexsp_profile is not None:
        needed.append(_measuring_seam(run))
    return needed


def _step_seams(run: FlexSPTraining) -> list[Seam]:
    """A step's micro-batches, and what Megatron counts of them."""
    return [
        Seam(
            f"{_TRAINING}:get_forward_backward_func",
            (),
            run.wrap_get_forward_backward_func,
            "runs the plan's micro-batches",
        ),
        Seam("megatron.core.num_microbatches_calculator:get_current_running_global_batch_size", (), None, "is asked"),
        Seam(f"{_TRAINING}:update_seqlen_stats_from_cu_seqlens", ("cu_seqlens",), None, "counts operations")
        if releases.sequences_report_lengths()
        else Seam(
            f"{_TRAINING}:num_floating_point_operations",
            ("args", "batch_size"),
            run.wrap_num_floating_point_operations,
            "counts the operations of each document",
        ),
    ]


def _measuring_seam(run: FlexSPTraining) -> Seam:
    return Seam(
        f"{_TRAINING}:train_step",
        ("forward_step_func", "data_iterator", "model", "optimizer"),
        profiling.Profiler(run).wrap_train_step,
        "measures the job instead of training it",
    )


def _check_arguments(run: FlexSPTraining, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Any, defaults: Any = None) -> Any:
        flag_checks.check_compatibility(args)
        changes = argument_changes.ArgumentChanges()
        with changes.seen(args):
            _prepare_validation(args)
        validated = original(args, defaults or {})
        with changes.seen(args):
            _follow_validation(args)
        settings = settings_from_args(args)
        recomputation.check_release(args)
        if settings.cost_model is not None:
            check_same_job(args, settings.cost_model, settings.domain_size)
        if not run.is_configured:  # a script may validate twice
            seams.install(job_seams(run, args))
        run.configure(settings)
        if args.rank == 0:
            seams.print_installed()
            changes.print()
        return validated

    return validate_args


def _prepare_validation(args: Any) -> None:
    """Have Megatron validate what FlexSP will train."""
    if args.micro_batch_size is None:
        args.micro_batch_size = 1
    flag_checks.check_flags(args)
    if args.flexsp_profile is not None:
        profiling.prepare_arguments(args)
    precision.keep_scaling_in_tensor_parallel_group(args)


def _follow_validation(args: Any) -> None:
    """Set what validation forces otherwise or doesn't know."""
    args.variable_seq_lengths = True  # pipeline stages exchange shapes
    experts.let_ranks_differ_in_tokens(args)
    args.dataloader_type = "external"  # our iterators are handed through as they are
