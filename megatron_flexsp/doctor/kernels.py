"""What Megatron takes for granted of Transformer Engine and apex, and says only once it builds the model."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Generator

from megatron_flexsp.doctor.findings import Finding, error, ok
from megatron_flexsp.megatron import experts

_INSTALL = "or install Transformer Engine"


def examine_kernels(args: argparse.Namespace, *, cpu: bool) -> Generator[Finding, None, None]:
    """Fused kernels that the arguments ask for and nothing here brings, and Megatron's own check of its configuration.

    ``cpu`` says that the stand-in for CUDA chooses the kernels.
    """
    problems = [] if cpu else list(_missing(args))
    yield from problems
    try:
        _build_configuration(args)
    except Exception as problem:
        text = " ".join(str(problem).split()) or type(problem).__name__
        remedy = "correct what it names"
        if "apply_rope_fusion" in text:
            remedy = f"add --no-rope-fusion, {_INSTALL}"
        problems.append(error("model", f"Megatron refuses the model's configuration: {text}", remedy))
        yield problems[-1]
    if not problems:
        yield ok("model", "Megatron takes the model's configuration, and its kernels are there")


def _missing(args: argparse.Namespace) -> Generator[Finding, None, None]:
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    if args.gradient_accumulation_fusion and not getattr(layers, "_grad_accum_fusion_available", True):
        yield error(
            "model",
            "gradient accumulation fusion, which is Megatron's default, has no kernel here: it is a part of NVIDIA's "
            "apex",
            "add --no-gradient-accumulation-fusion, or build apex",
        )
    if args.transformer_impl != "local" or importlib.util.find_spec("amp_C") is not None:
        return
    if not args.no_persist_layer_norm:
        yield error(
            "model",
            "persistent layer norm, which is Megatron's default, has no kernel here",
            f"add --no-persist-layer-norm, {_INSTALL}",
        )
    if args.sequence_parallel:
        yield error(
            "model",
            "--sequence-parallel with --transformer-impl local: PyTorch's norm has no sequence parallelism",
            f"take --sequence-parallel out, {_INSTALL}",
        )


def _build_configuration(args: argparse.Namespace) -> None:
    """What building the model begins with, after what the plugin sets for every run."""
    adjusted = argparse.Namespace(**vars(args))
    adjusted.variable_seq_lengths = True
    experts.let_ranks_differ_in_tokens(adjusted)
    megatron_arguments = importlib.import_module("megatron.training.arguments")
    megatron_arguments.core_transformer_config_from_args(adjusted)
