"""Puts FlexSP into Megatron: the launcher's one call before it runs the training script."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import arguments, releases, seams
from megatron_flexsp.megatron.seams import Seam


def install(command_line: Sequence[str]) -> None:
    """Register the flags; with ``--flexsp`` on the command line, put in place what trains with it.

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
        training = training_seams()
        seams.install(training.entry_seams(training.FlexSPTraining()))
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


def training_seams() -> ModuleType:
    """The module ``training_seams``. A run without ``--flexsp`` never loads it.

    Raises
    ------
    FlexSPError
        If a module of Megatron that it needs is not there.
    """
    try:
        return importlib.import_module("megatron_flexsp.megatron.training_seams")
    except ImportError as error:
        if not (error.name or "").startswith("megatron."):
            raise
        raise seams.moved(error) from None
