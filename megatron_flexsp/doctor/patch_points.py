"""The places of Megatron that FlexSP changes or calls: the launcher's own list, resolved as the launcher does."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_flexsp.doctor.findings import Finding, ok, refused
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import plugin
from megatron_flexsp.megatron.seams import Seam


def examine_patch_points(args: argparse.Namespace | None) -> Iterator[Finding]:
    """Those that a job with these arguments needs; None for those of any job."""
    problems: list[FlexSPError] = []
    seams: list[Seam] = []
    try:
        training_seams = plugin.training_seams()
        run = training_seams.FlexSPTraining()
        needed = training_seams.EVERYTHING if args is None else args
        seams = [*plugin.flags_seams(), *training_seams.entry_seams(run), *training_seams.job_seams(run, needed)]
    except FlexSPError as problem:
        problems.append(problem)
    for seam in seams:
        try:
            seam.resolve()
        except FlexSPError as problem:
            problems.append(problem)
    for refusal in problems:
        yield refused("patch-points", refusal)
    if not problems:
        yield ok("patch-points", f"all {len(seams)} found with the expected parameters")
