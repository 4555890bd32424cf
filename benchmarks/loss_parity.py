"""Whether the loss is the same whatever the plan: 200 steps, static against nested against one process.

    python benchmarks/loss_parity.py            # some minutes on 2 cores
    python benchmarks/loss_parity.py --steps 5

Three runs, one after the other, of a small model in fp32 on the same documents: static groups and nested plans on 4
ranks, and one process that runs every document by itself, unpacked, through Megatron's stock attention, with no part of
the plugin in place. Losses are those that Megatron prints, with 7 digits.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.corpora import web_lengths
from benchmarks.harness.hosts import Host
from benchmarks.harness.jobs import RUN, run_to_end
from benchmarks.harness.model import ROOT, training_arguments
from megatron_flexsp.errors import FlexSPError

RANKS = 4
CONTEXT_TOKENS, TOKENS_PER_RANK = 512, 128
"""The longest document needs all 4 ranks."""
DOCUMENTS_PER_STEP, MEAN_TOKENS = 16, 60
UNPACKED = ROOT / "tests" / "end_to_end" / "unpacked.py"

_SMALL = f"""
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 172 --num-attention-heads 4
    --seq-length {CONTEXT_TOKENS} --max-position-embeddings {CONTEXT_TOKENS}
"""
_STEP = re.compile(r"iteration +\d+/.*?elapsed time per iteration \(ms\): ([0-9.]+).*? lm loss: ([0-9.E+-]+) ")
_WAITS = re.compile(r"waited for plan \(ms\): ([0-9.]+) \| waited for data \(ms\): ([0-9.]+)")
_START_UP_STEPS = 2
"""Steps whose plans wait for the planning process to start."""

console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """What a run printed."""

    output: str

    @property
    def losses(self) -> np.ndarray:
        """[steps]"""
        return np.array([float(loss) for _, loss in _STEP.findall(self.output)])

    @property
    def waited_share(self) -> float:
        """The part of the steps after the start in which rank 0 waits for plans and data."""
        waits = [float(plan) + float(data) for plan, data in _WAITS.findall(self.output)]
        steps = [float(milliseconds) for milliseconds, _ in _STEP.findall(self.output)]
        return sum(waits[_START_UP_STEPS:]) / sum(steps[_START_UP_STEPS:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="%(default)s")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "loss_parity", help="where all goes")
    options = parser.parse_args(arguments)
    if options.steps <= _START_UP_STEPS:
        parser.error(f"--steps must be more than {_START_UP_STEPS}")
    prefix, _ = web_lengths(DOCUMENTS_PER_STEP, MEAN_TOKENS, CONTEXT_TOKENS).prepare(options.output)
    job = [*training_arguments(prefix, DOCUMENTS_PER_STEP, options.steps), *_SMALL.split()]
    runs = {"one process": run("one process", 1, [str(UNPACKED), *job], options.output)}
    for schedule in ("static", "nested"):
        flags = ("--flexsp", "--flexsp-schedule", schedule, "--flexsp-max-tokens-per-rank", str(TOKENS_PER_RANK))
        script = str(ROOT / "scripts" / "pretrain_gpt.py")
        runs[schedule] = run(schedule, RANKS, [*RUN, script, *job, *flags], options.output)
    for name, finished in runs.items():
        if len(finished.losses) != options.steps:
            raise FlexSPError(f"the run {name!r} printed {len(finished.losses)} losses; expected {options.steps}")
    console.print(tabulated_losses(runs))
    console.print(tabulated_differences(runs))
    for schedule in ("static", "nested"):
        share = runs[schedule].waited_share
        steps = options.steps - _START_UP_STEPS
        console.print(f"{schedule}: {share:.3%} of {steps} steps' time in waits for plans and data")
    return 0


def run(name: str, ranks: int, words: Sequence[str], output: Path) -> Run:
    """Train to the end."""
    console.print(f"training: {name} ...")
    return Run(run_to_end(Host(ranks), words, output / f"{name.replace(' ', '_')}.log"))


def tabulated_losses(runs: dict[str, Run]) -> Table:
    """Some steps of the curves."""
    table = Table("step", *runs)
    steps = len(runs["static"].losses)
    for step in sorted({1, 2, steps, *range(25, steps, 25)}):
        table.add_row(str(step), *(f"{finished.losses[step - 1]:.6f}" for finished in runs.values()))
    return table


def tabulated_differences(runs: dict[str, Run]) -> Table:
    """Each pair of curves."""
    table = Table("relative difference of the loss", "largest of all steps", "mean")
    for first, second in (("static", "nested"), ("one process", "static"), ("one process", "nested")):
        reference = runs[first].losses
        difference = np.abs(runs[second].losses - reference) / np.abs(reference)
        table.add_row(f"{second} against {first}", f"{difference.max():.1e}", f"{difference.mean():.1e}")
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlexSPError as error:
        console.print(f"[red]loss_parity: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
