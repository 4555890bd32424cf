"""What FlexSP would do with a job: the cost model that it plans by, what fits, and the plan of one batch."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from megatron_flexsp.doctor.data import Corpus
from megatron_flexsp.doctor.findings import Finding, ok, refused, warning
from megatron_flexsp.doctor.inside import Request
from megatron_flexsp.errors import FlexSPError, named_by_flags
from megatron_flexsp.megatron.context import (
    degree_for_longest,
    plan_request,
    recomputed_token_capacity,
    token_capacity,
)
from megatron_flexsp.megatron.estimate import estimate_cost_model
from megatron_flexsp.megatron.provenance import check_same_job, installed_versions
from megatron_flexsp.megatron.settings import PLANNER_FLAGS, Settings
from megatron_flexsp.planner import CostModel, narrowest_degree, usable_capacity
from megatron_flexsp.planner.service import PlanRequest
from megatron_flexsp.profiler.record import check_writable

_SECONDS_A_PLAN = 0.5
_MOST_SEQUENCES, _MOST_RANKS = 8192, 1024
"""Larger batches and domains take longer than a doctor may."""

_WORTH_IT = 1.02


def examine_cost_model(
    args: argparse.Namespace, settings: Settings, request: Request, vocabulary: int | None
) -> Generator[Finding, None, CostModel]:
    """Where the costs come from, and whether they are this job's; returns them."""
    if settings.profile is not None:
        try:
            check_writable(settings.profile)
            yield ok("profile", f"this run measures, trains nothing, and writes {settings.profile}")
        except FlexSPError as problem:
            yield refused("profile", problem)
    measured = settings.cost_model
    if measured is None:
        yield from _examine_estimate(args, request, vocabulary)
        estimated = copy.copy(args)
        estimated.padded_vocab_size = vocabulary or 0
        return estimate_cost_model(
            estimated,
            settings.degrees,
            gpu=None if request.cpu else (request.gpu_capability[0], request.gpu_memory_bytes),
            ranks_per_node=request.ranks_per_node,
            micro_batches_in_flight=settings.micro_batches_in_flight,
        )
    path = args.flexsp_cost_model
    if not measured.measurement:
        yield warning(
            "cost-model",
            f"{path} does not say on which job and machine it was measured",
            "make sure that it was this model on this cluster, or measure with --flexsp-profile",
        )
        return measured
    try:
        check_same_job(args, measured, settings.domain_size)
    except FlexSPError as problem:
        yield refused("cost-model", problem)
        return measured
    yield _examine_origin(path, measured.measurement, request.gpu_name)
    return measured


def _examine_estimate(args: argparse.Namespace, request: Request, vocabulary: int | None) -> Iterator[Finding]:
    found = "none given: costs are estimated from the model's arguments"
    remedy = "measure: run the job once with --flexsp-profile cost_model.json, then train with --flexsp-cost-model"
    if request.gpu_is_assumed and not request.cpu:
        remedy += "; --gpu-memory-gib says what a GPU has"
        found += f" and {request.gpu_memory_bytes / 2**30:.0f} GiB a GPU, assumed since none is here"
    if vocabulary is None:
        found += ", without the vocabulary, whose size only the tokenizer knows"
    yield warning("cost-model", found, remedy)


def _examine_origin(path: str, measurement: Any, gpu_name: str | None) -> Finding:
    """When and on what it was measured, and with which versions; ``gpu_name`` is None where there is none here."""
    date, device = measurement.get("date"), measurement.get("device", "an unknown device")
    age = ""
    if isinstance(date, str):
        try:
            days = (datetime.now(UTC) - datetime.fromisoformat(date)).days
            age = f", {days} days ago"
        except (ValueError, TypeError):
            pass
    found = f"{path}: measured on this job's shape, {device}{age}"
    then, now = measurement.get("versions") or {}, installed_versions()
    changed = [f"{name} {then[name]}, here {now[name]}" for name in now if name in then and then[name] != now[name]]
    if gpu_name is not None and device != gpu_name:
        changed.insert(0, f"{device}, here {gpu_name}")
    if changed:
        return warning("cost-model", f"{found}; since then changed: {'; '.join(changed)}", "measure again")
    return ok("cost-model", found)


def examine_capacity(
    args: argparse.Namespace, settings: Settings, cost_model: CostModel, corpus: Corpus | None
) -> Generator[Finding, None, None]:
    """What a rank holds, the groups that the lengths need, and the plan of one batch."""
    try:
        capacity = token_capacity(settings, cost_model)
        most = recomputed_token_capacity(settings, cost_model, capacity) or capacity
    except FlexSPError as problem:
        yield refused("capacity", problem)
        return
    per_slice = usable_capacity(most, settings.slice_multiple)
    widest = max(settings.degrees, default=1)
    holds = f"{capacity:,} tokens a rank and micro-batch"
    if settings.recompute:
        holds += f", {most:,} where activations are recomputed"
    holds += f"; the widest group, {widest} ranks, holds {widest * per_slice:,}"
    if corpus is None and settings.samples != "packed":
        yield ok("capacity", holds)
        return
    longest = args.seq_length  # what was not read may be as long as it gets
    if corpus is not None and not corpus.is_sample:
        longest = min(longest, int(corpus.sequences.max()))
    name = "--flexsp-samples packed" if corpus is None else corpus.name
    try:
        narrowest = degree_for_longest(settings, most, longest, name)
    except FlexSPError as problem:
        yield refused("capacity", problem)
        return
    yield ok("capacity", f"{holds}; the longest sequence, {longest:,} tokens, needs {narrowest}")
    if corpus is None:
        return
    yield _examine_degrees_needed(settings, per_slice, corpus)
    try:
        request = plan_request(settings, cost_model, capacity, narrowest)
        yield _examine_plan(args, settings, request, longest, corpus)
    except FlexSPError as problem:
        yield refused("plan", problem, "look at the numbers above for what is too small")


def _examine_degrees_needed(settings: Settings, per_slice: int, corpus: Corpus) -> Finding:
    """Which share of sequences and tokens needs which degree at least."""
    needed = np.searchsorted(np.array(settings.degrees) * per_slice, corpus.sequences)
    tokens = corpus.sequences.sum()
    shares = []
    for place, degree in enumerate(settings.degrees):
        chosen = corpus.sequences[needed == place]
        if len(chosen):
            shares.append(
                f"{degree}: {len(chosen) / len(corpus.sequences):.2%} of the sequences, {chosen.sum() / tokens:.1%} of "
                "the tokens"
            )
    return ok("degrees-needed", "; ".join(shares))


@named_by_flags(PLANNER_FLAGS)
def _examine_plan(
    args: argparse.Namespace, settings: Settings, request: PlanRequest, longest: int, corpus: Corpus
) -> Finding:
    """One batch of the job's own lengths, planned, against what the job would run without FlexSP."""
    size = args.global_batch_size
    advice = "flexsp simulate compares all schedules on many batches"
    if size > _MOST_SEQUENCES or settings.domain_size > _MOST_RANKS:
        return ok("plan", f"{size:,} sequences on {settings.domain_size:,} ranks are too many for a glance; {advice}")
    generator = np.random.default_rng(args.seed)
    batch = generator.choice(corpus.sequences, size, replace=size > len(corpus.sequences))
    request = replace(request, time_limit_seconds=_SECONDS_A_PLAN)
    made = request.make(batch)
    plan = f"micro-batches of each degree in one batch: {made.counted_by_degree()}"
    if settings.recompute:
        plan += f"; recomputed: {made.counted_by_degree(recomputed=True) or 'none'}"
    plan += f"; {made.predicted_seconds:.3g} s predicted"
    if settings.schedule in ("static", "batch-adaptive"):
        return ok("plan", plan)
    others = [(static.make(batch).predicted_seconds, what) for what, static in _static_requests(request, longest)]
    if not others:
        return ok("plan", plan)
    seconds, what = min(others)
    gain = seconds / made.predicted_seconds
    found = f"{plan}, {gain:.2f} times as fast as {what} if the cost model holds"
    if gain < _WORTH_IT:
        return warning("plan", found, f"there is little to gain on this data; {advice}")
    return ok("plan", f"{found}; {advice}")


def _static_requests(request: PlanRequest, longest: int) -> Iterator[tuple[str, PlanRequest]]:
    """Groups as a job has them without FlexSP, the narrowest that hold the longest sequence; what they are called.

    Where plans may recompute, such a job recomputes everything or nothing.
    """
    ways = [("", replace(request, recomputed_token_capacity=None))]
    if request.recomputed_token_capacity is not None:
        ways.append((", all recomputed", request.always_recomputed()))
    for how, static in ways:
        degree = narrowest_degree(
            static.options["degrees"],
            longest,
            static.token_capacity,
            slice_multiple=static.slice_multiple,
            static_domain_size=static.domain_size,
        )
        if degree is not None:
            options = {**static.options, "schedule": "static", "static_degree": degree}
            yield f"static groups of {degree}{how}", replace(static, options=options)
