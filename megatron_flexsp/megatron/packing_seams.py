"""Where ``--sequence-packing-scheduler flexsp`` enters Megatron: a scheduler's name, and the checks of its flags."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import releases, seams
from megatron_flexsp.megatron.packing_scheduler import NAME, PackingJob, scheduler_class
from megatron_flexsp.megatron.seams import Seam

_FLAG = "--sequence-packing-scheduler"
_MEGATRONS_OWN = "default_dynamic_cp"
_SCHEDULES = "megatron.core.datasets.data_schedule"
_TAKEN_FLAGS = ("--flexsp-cost-model", "--flexsp-degrees", "--flexsp-solver-time-limit")


def install(command_line: Sequence[str]) -> None:
    """Register the scheduler. Called where the command line asks for it, after the flags are registered.

    Raises
    ------
    FlexSPError
        If this Megatron has no such schedulers, or other flags ask for FlexSP's own executor.
    """
    _check_flags(command_line)
    schedules = _schedules()
    job = PackingJob()
    seams.install(_seams(job))
    schedules.scheduler_map[NAME] = scheduler_class(schedules.DefaultDynamicCPScheduler, job)


def _check_flags(command_line: Sequence[str]) -> None:
    given = {word.split("=")[0] for word in command_line if word.startswith("--flexsp")}
    if given & {"--flexsp", "--flexsp-profile"}:
        raise FlexSPError(
            f"--flexsp and {_FLAG} {NAME} are two ways: --flexsp plans and runs the micro-batches itself, the other "
            "plans for Megatron's dynamic context parallelism. Take one of them out"
        )
    if unknown := sorted(given - set(_TAKEN_FLAGS)):
        raise FlexSPError(f"{', '.join(unknown)}: {_FLAG} {NAME} takes only {', '.join(_TAKEN_FLAGS)}")


def _schedules() -> Any:
    """Megatron's module of schedulers.

    Raises
    ------
    FlexSPError
        If this Megatron has none that can be added to.
    """
    try:
        module = importlib.import_module(_SCHEDULES)
    except ImportError:
        module = None
    if not isinstance(getattr(module, "scheduler_map", {}).get(_MEGATRONS_OWN), type):
        raise FlexSPError(
            f"{_FLAG} {NAME}: Megatron {seams.version()} of {seams.location().parents[1]} has no dynamic context "
            "parallelism that schedulers can be added to. The dev branch of Megatron-LM has it (tried at d48bd6be); "
            "with this one use --flexsp"
        )
    return module


def _seams(job: PackingJob) -> list[Seam]:
    run_parameters = ("self", "data_iterator", "num_microbatches", "dp_group", "tp_group", "pp_group", "dp_cp_group")
    scheduler = f"{_SCHEDULES}:DefaultDynamicCPScheduler"
    names, checks = "takes flexsp as a scheduler's name", "takes flexsp as a scheduler's name, and checks the flags"
    return [
        *(
            Seam(place, ("extra_args_provider", "ignore_unknown_args"), _add_choice, names)
            for place in releases.places_of("parse_args")
        ),
        *(
            Seam(place, ("args", "defaults"), functools.partial(_check_arguments, job), checks)
            for place in releases.places_of("validate_args")
        ),
        Seam("megatron.core.transformer.transformer_config:TransformerConfig.__post_init__", (), _take_name, names),
        Seam(f"{_SCHEDULES}:wrap_data_iterator", ("data_iterator", "config", "num_microbatches"), None, "asks it"),
        Seam(f"{scheduler}.get_groups_and_subsamples", ("self", "sample_id_seqlens"), None, "is ours"),
        Seam(f"{scheduler}.run", run_parameters, None, "runs it"),
    ]


def _add_choice(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def parse_args(extra_args_provider: Any = None, *args: Any, **kwargs: Any) -> Any:
        def provider(parser: argparse.ArgumentParser) -> Any:
            for action in parser._actions:
                if _FLAG in action.option_strings and action.choices is not None:
                    action.choices = (*action.choices, NAME)
            return parser if extra_args_provider is None else extra_args_provider(parser)

        return original(provider, *args, **kwargs)

    return parse_args


def _check_arguments(job: PackingJob, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Any, defaults: Any = None) -> Any:
        if not args.dynamic_context_parallel:
            raise FlexSPError(f"{_FLAG} {NAME} needs --dynamic-context-parallel, whose groups it chooses: add it")
        if getattr(args, "thd_max_packed_sequences", None) is not None:
            raise FlexSPError(f"--thd-max-packed-sequences: {_FLAG} {NAME} packs any number of sequences. Take it out")
        # All that Megatron checks and derives for its own scheduler holds for ours.
        args.sequence_packing_scheduler = _MEGATRONS_OWN
        args = original(args, defaults or {})
        args.sequence_packing_scheduler = NAME
        if args.rank == 0:
            seams.print_installed()
        job.configure(args)
        return args

    return validate_args


def _take_name(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        named = getattr(self, "sequence_packing_scheduler", None)
        if named != NAME:
            original(self)
            return
        self.sequence_packing_scheduler = _MEGATRONS_OWN
        original(self)
        self.sequence_packing_scheduler = named

    return __post_init__
