"""Puts FlexSP into Megatron: the launcher's one call before it runs the training script."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import arguments, experts, precision, recomputation, releases, seams
from megatron_flexsp.megatron.seams import Seam


def install(command_line: Sequence[str]) -> None:
    """Register the flags; with ``--flexsp`` on the command line, put everything else in place too.

    With ``--sequence-packing-scheduler flexsp`` only our planner comes in, and Megatron's executor stays.

    Raises
    ------
    FlexSPError
        If a place that is to be changed is not as expected.
    """
    seams.install(flags_seams())
    profiles = any(word.split("=")[0] == "--flexsp-profile" for word in command_line)
    if asks_for_scheduler(command_line):
        # Imported here, as below: it needs more than a run without FlexSP has.
        from megatron_flexsp.megatron import packing_seams

        packing_seams.install(command_line)
    elif "--flexsp" in command_line or profiles:
        seams.install(training_seams(profiles))
    elif any(word.startswith("--flexsp-") for word in command_line):
        raise FlexSPError("there are --flexsp-... flags but no --flexsp, which switches them on: add it")


def asks_for_scheduler(command_line: Sequence[str]) -> bool:
    """Whether Megatron's ``--sequence-packing-scheduler`` is ``flexsp``; the last one counts."""
    words = [part for word in command_line for part in word.split("=", maxsplit=1)]
    values = [value for flag, value in pairwise(words) if flag == "--sequence-packing-scheduler"]
    return values[-1:] == ["flexsp"]


def flags_seams() -> list[Seam]:
    """What every run gets: the flags beside Megatron's own."""

    def register(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def parse_args(extra_args_provider: Any = None, *args: Any, **kwargs: Any) -> Any:
            def provider(parser: Any) -> Any:
                parser = arguments.add_flexsp_arguments(parser)
                return parser if extra_args_provider is None else extra_args_provider(parser)

            return original(provider, *args, **kwargs)

        return parse_args

    parameters = ("extra_args_provider", "ignore_unknown_args")
    return [Seam(place, parameters, register, "registers the flags") for place in releases.places_of("parse_args")]


def training_seams(profiles: bool) -> list[Seam]:
    """Everything that changes how a run trains. Making the list changes nothing."""
    # Imported here: a run without --flexsp never loads these.
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE

        from megatron_flexsp.megatron import (
            latent_attention,
            multi_token_prediction,
            packed_attention,
            profiling,
            routers,
            te_attention,
            training,
        )
        from megatron_flexsp.megatron.provenance import check_same_job
    except ImportError as error:
        if not (error.name or "").startswith("megatron."):
            raise
        raise seams.moved(error) from None

    run = training.FlexSPTraining()

    def check_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def validate_args(args: Any, defaults: Any = None) -> Any:
            arguments.check_compatibility(args)
            if args.micro_batch_size is None:
                args.micro_batch_size = 1
            arguments.settings_from_args(args)
            if profiles:
                profiling.prepare_arguments(args)
            precision.keep_scaling_in_tensor_parallel_group(args)
            validated = original(args, defaults or {})
            args.variable_seq_lengths = True  # pipeline stages exchange shapes
            experts.let_ranks_differ_in_tokens(args)
            args.dataloader_type = "external"  # our iterators are handed through as they are
            settings = arguments.settings_from_args(args)
            recomputation.check_release(args)
            if settings.cost_model is not None:
                check_same_job(args, settings.cost_model, settings.domain_size)
            run.configure(settings)
            print_seams(args)
            return validated

        return validate_args

    def print_seams(args: Any) -> None:
        if args.rank == 0:
            print(f" > [flexsp] in Megatron {seams.version()} of {seams.location().parents[1]}:")
            latent = latent_layers if args.multi_latent_attention else ()
            further = predicting if args.mtp_num_layers else ()
            for seam in [*planned, *latent, *further, *(routing if args.num_experts else ())]:
                print(f" > [flexsp] {seam.target} {seam.reason}")
            if (warning := seams.warning()) is not None:
                print(f" > [flexsp] warning: {warning}")

    pretrain_parameters = ("train_valid_test_dataset_provider", "forward_step_func")
    validation = "checks the flags and lets micro-batches differ in length"
    planned = [
        *(
            Seam(place, ("args", "defaults"), check_arguments, validation)
            for place in releases.places_of("validate_args")
        ),
        *(
            Seam(place, pretrain_parameters, run.wrap_pretrain, "plans documents or packs")
            for place in ("megatron.training:pretrain", "megatron.training.training:pretrain")
        ),
        Seam(
            "megatron.training.training:get_forward_backward_func",
            (),
            run.wrap_get_forward_backward_func,
            "runs the plan's micro-batches",
        ),
        *packed_attention.seams(),
    ]
    if profiles:
        planned.append(
            Seam(
                "megatron.training.training:train_step",
                ("forward_step_func", "data_iterator", "model", "optimizer"),
                profiling.Profiler(run).wrap_train_step,
                "measures the job instead of training it",
            )
        )
    if HAVE_TE:
        planned += te_attention.seams()
    routing, latent_layers, predicting = routers.seams(), latent_attention.seams(), multi_token_prediction.seams()
    counting = "megatron.training.training"
    if releases.sequences_report_lengths():
        called = [Seam(f"{counting}:update_seqlen_stats_from_cu_seqlens", ("cu_seqlens",), None, "counts operations")]
    else:
        called = []
        planned.append(
            Seam(
                f"{counting}:num_floating_point_operations",
                ("args", "batch_size"),
                run.wrap_num_floating_point_operations,
                "counts the operations of each document",
            )
        )
    called += [
        Seam("megatron.core.num_microbatches_calculator:get_current_running_global_batch_size", (), None, "is asked"),
        Seam(
            "megatron.core.transformer.moe.router:TopKRouter.attach_and_log_load_balancing_loss",
            ("self", "activation", "aux_loss_coeff", "aux_loss", "aux_loss_name", "reduce_group", "valid_token_count"),
            None,
            "takes a part of a balancing loss",
        ),
    ]
    return [*planned, *latent_layers, *predicting, *routing, *called]
