"""A job's arguments, as Megatron and FlexSP would take them: parsed, checked, and what follows from them.

Runs in the second process, with Megatron imported. Every section yields findings; one that can't go on says why.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import linecache
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from megatron.training import arguments as megatron_arguments

from megatron_flexsp.compatibility import JOB_REFUSALS, in_place_of_full, refusals
from megatron_flexsp.doctor import checkpoints, data, forecast
from megatron_flexsp.doctor.findings import Finding, error, ok, refused, warning
from megatron_flexsp.doctor.inside import Request, Say
from megatron_flexsp.doctor.kernels import examine_kernels
from megatron_flexsp.doctor.patch_points import examine_patch_points
from megatron_flexsp.doctor.tokenizer import vocabulary_size
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import flag_checks, recomputation, rounds
from megatron_flexsp.megatron.arguments import add_flexsp_arguments
from megatron_flexsp.megatron.settings import Settings, settings_from_args
from megatron_flexsp.planner import legal_degrees
from megatron_flexsp.runtime import ring_size_of

# What pretrain_gpt.py hands to Megatron for arguments that are not given.
_SCRIPT_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}


def examine_job(request: Request, say: Say) -> Iterator[Finding]:
    """Everything about one job."""
    say("parsing the job's arguments")
    args = yield from _parsed(request)
    if args is None:
        return
    say("looking at the patch points")
    yield from examine_patch_points(args)
    say("comparing the job's arguments with what FlexSP takes")
    yield from _examine_flags(args, request)
    say("looking at the job's files")
    yield from _guarded("data", data.examine_files(args))
    settings = None
    if request.world_size is None:
        yield error(
            "ranks",
            "neither the command nor this machine says how many ranks the job has",
            "give --ranks, or --nodes and --gpus-per-node",
        )
    else:
        say("checking the shape of the job")
        _mend(args)
        settings = yield from _settled(args, request)
    if settings is None:
        return
    yield from _guarded("shape", _examine_shape(args, settings))
    yield from _guarded("recompute", _examine_recomputation(args))
    yield from _guarded("model", examine_kernels(args, cpu=request.cpu))
    yield from _guarded("steps", data.examine_steps(args))
    vocabulary = vocabulary_size(args)
    say("looking at the cost model")
    cost_model = yield from _guarded("cost-model", forecast.examine_cost_model(args, settings, request, vocabulary))
    say("reading the lengths of the data set")
    corpus = yield from _guarded("lengths", data.examine_lengths(args, settings))
    if cost_model is not None:
        say("planning a batch")
        yield from _guarded("plan", forecast.examine_capacity(args, settings, cost_model, corpus))
    say("counting the bytes of a checkpoint")
    yield from _guarded("checkpoint-room", checkpoints.examine_room(args, vocabulary))


def _guarded[T](check: str, findings: Generator[Finding, None, T]) -> Generator[Finding, None, T | None]:
    """One section; where it fails for a reason that nobody foresaw, the others still speak."""
    try:
        return (yield from findings)
    except Exception as problem:
        yield warning(check, f"this check failed itself: {type(problem).__name__}: {problem}", "please report it")
        return None


def _parsed(request: Request) -> Generator[Finding, None, argparse.Namespace | None]:
    """The arguments as Megatron's own parser takes them; None where it refuses them."""
    words = list(request.words or ())
    if any(word.split("=")[0] == "--yaml-cfg" for word in words):
        entry = next(entry for entry in JOB_REFUSALS if "--yaml-cfg" in entry.flags)
        yield refused("arguments", entry.problem)
        return None
    if not any(word.split("=")[0] in ("--flexsp", "--flexsp-profile") for word in words):
        yield warning("flexsp", "--flexsp is not among the arguments", "add it; what follows is as if it were there")
        words.append("--flexsp")
    sys.argv = [request.script or "pretrain_gpt.py", *words]
    unknown: list[str] = []
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: Any, *args: Any, **kwargs: Any) -> Any:
        namespace, rest = original(self, *args, **kwargs)
        unknown.extend(rest)
        return namespace, rest

    flags: list[str] = []

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = add_flexsp_arguments(parser)
        flags.extend(parser._option_string_actions)
        return parser

    complaint = io.StringIO()
    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]
    try:
        with contextlib.redirect_stderr(complaint):
            args: argparse.Namespace = megatron_arguments.parse_args(provider, ignore_unknown_args=True)
    except SystemExit:
        said = complaint.getvalue().strip().splitlines() or ["refused without a message"]
        yield error("arguments", said[-1].partition("error: ")[2] or said[-1], "correct it: Megatron's parser stops")
        return None
    except Exception as problem:
        yield error("arguments", f"Megatron's parser: {_text(problem)}", "correct the argument that it names")
        return None
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]
    strange = [word.split("=")[0] for word in unknown if word.startswith("--")]
    for flag in strange:
        yield from _unknown(flag, flags, request.script)
    if not strange and unknown:
        yield error("arguments", f"nothing takes {' '.join(unknown)!r}", "put its flag in front of it, or take it out")
    elif not unknown:
        yield ok("arguments", f"Megatron's parser takes all {len(request.words or ())} words")
    return args


def _unknown(flag: str, flags: list[str], script: str | None) -> Iterator[Finding]:
    """A flag that neither Megatron nor FlexSP has; the script's folder may."""
    if script is not None:
        for path in Path(script).absolute().parent.glob("*.py"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if flag in path.read_text(encoding="utf-8"):
                    return
    close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.75)
    yield error(
        "arguments",
        f"{flag}: Megatron's parser doesn't know it" + (f"; {close[0]} is near" if close else ""),
        "correct it or take it out, unless the script adds it itself",
    )


def _examine_flags(args: argparse.Namespace, request: Request) -> Iterator[Finding]:
    """What doesn't go with FlexSP."""
    problems = [refusal.problem for refusal in refusals(args)]
    if args.transformer_impl == "transformer_engine" and not request.cpu:
        problems += flag_checks.transformer_engine_problems(args)
    for problem in problems:
        yield refused("flags", problem, "take it out, or train without --flexsp")
    if not problems:
        yield ok("flags", "none that FlexSP can't be combined with")


def _mend(args: argparse.Namespace) -> None:
    """Put right what is refused and easily put right, so that the rest can be foreseen."""
    before = (args.micro_batch_size or 1, args.context_parallel_size)
    if args.flexsp_max_tokens_per_rank is None and args.seq_length and before != (1, 1):
        args.flexsp_max_tokens_per_rank = before[0] * args.seq_length // before[1]  # what has fitted so far
    args.context_parallel_size = args.micro_batch_size = 1
    args.hybrid_context_parallel = False
    args.calculate_per_token_loss = True


def _settled(args: argparse.Namespace, request: Request) -> Generator[Finding, None, Settings | None]:
    """FlexSP's settings after Megatron's own validation; None where either refuses."""
    try:
        flag_checks.check_flags(args)
        recomputation.check_release(args)
    except FlexSPError as problem:
        yield refused("shape", problem, "correct it: FlexSP refuses to start")
        return None
    # Megatron-FSDP refuses what the others ask for.
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ and not getattr(args, "use_megatron_fsdp", False):
        if args.tensor_model_parallel_size > 1 and request.gpu_capability[0] < 10 and not request.cpu:
            yield warning(
                "environment",
                "CUDA_DEVICE_MAX_CONNECTIONS is not set here; before Blackwell, Megatron asks for 1 with tensor "
                "parallelism",
                "export CUDA_DEVICE_MAX_CONNECTIONS=1 where the job starts",
            )
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    try:
        megatron_arguments.validate_args(args, dict(_SCRIPT_DEFAULTS))
        settings = settings_from_args(args)
    except FlexSPError as problem:
        yield refused("shape", problem, "correct it: FlexSP refuses to start")
        return None
    except Exception as problem:  # Megatron asserts, and asks for devices
        yield error("validation", f"Megatron refuses the arguments: {_text(problem)}", "correct what it names")
        return None
    yield ok("validation", "Megatron takes the arguments")
    return settings


def _text(problem: Exception) -> str:
    """An exception in one line; many of Megatron's assertions have no message."""
    text = " ".join(str(problem).split())
    if text:
        return f"{text}" if isinstance(problem, AssertionError) else f"{type(problem).__name__}: {text}"
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(problem).__name__
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return f"{type(problem).__name__} at {line!r}"


def _examine_shape(args: argparse.Namespace, settings: Settings) -> Generator[Finding, None, None]:
    """The domain, the schedule and the degrees."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    yield ok(
        "domain",
        f"{args.world_size} ranks / (tensor {tensor} x pipeline {pipeline}) = {settings.domain_size} data-parallel "
        f"ranks, {args.global_batch_size} {'packs' if settings.samples == 'packed' else 'documents'} a step",
    )
    reason = rounds.why_rounds(args)
    why = "asked for" if args.flexsp_schedule != "auto" else reason or "nobody has to wait for anybody"
    yield ok("schedule", f"{settings.schedule}: {why}")
    heads = settings.query_heads
    left_out = [degree for degree in legal_degrees(settings.domain_size) if degree not in settings.degrees]
    found = f"{', '.join(map(str, settings.degrees))} of {settings.domain_size} ranks; {heads} attention heads a rank"
    if rings := [degree for degree in settings.degrees if ring_size_of(degree, heads) > 1]:
        found += f"; {', '.join(map(str, rings))} by ring attention"
    if left_out and args.flexsp_degrees is None and args.flexsp_static_degree is None:
        found += f"; not offered, for heads or bandwidths: {', '.join(map(str, left_out))}"
    yield ok("degrees", found)


def _examine_recomputation(args: argparse.Namespace) -> Generator[Finding, None, None]:
    """Whether everything is recomputed where single micro-batches could be."""
    instead = in_place_of_full(args)
    if instead is None:
        return
    try:
        recomputation.check_release(instead)
    except FlexSPError:
        return
    held = args.flexsp_max_tokens_per_rank
    remedy = "put --flexsp-recompute in its place and in that of --recompute-method and --recompute-num-layers"
    if held is not None:
        less = " (less, since a pipeline's other micro-batches keep theirs)"
        remedy += (
            f", with --flexsp-max-recomputed-tokens-per-rank {held}"
            f"{less if args.pipeline_model_parallel_size > 1 else ''}, and lower --flexsp-max-tokens-per-rank to what "
            "fits without recomputing; or leave both numbers to a cost model that --flexsp-profile FILE "
            "--flexsp-recompute has measured"
        )
    elif args.flexsp_cost_model is not None:
        remedy += ", and measure the cost model again with --flexsp-profile FILE --flexsp-recompute"
    yield warning("recompute", "--recompute-granularity full recomputes what fits without, too", remedy)
