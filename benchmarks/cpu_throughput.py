"""What FlexSP gains on this machine's CPU: four schedules on the same model and documents, alternating in one run.

    python benchmarks/cpu_throughput.py            # everything, about 10 minutes
    python benchmarks/cpu_throughput.py --quick    # two steps of each schedule, to see that it works

Eight ranks train a small GPT with Megatron. Every global batch is trained four times: with static groups, with the best
single degree for the batch, in lockstep (as the FlexSP paper has it) and nested. Two settings:

* loopback: the machine as it is;
* two emulated hosts of four ranks each, joined by a link of limited speed (Linux, root). Its rate is set so that what
  the static group's all-to-all sends takes 1.1 and 2.3 times as long as its compute: the shares that the FlexSP paper
  (arXiv 2412.01523) reports for groups of 16 and of 64 GPUs.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.corpora import Corpus, source_files, wikipedia_lengths
from benchmarks.harness.hosts import EmulatedHosts, Host, why_not
from benchmarks.harness.jobs import Job
from benchmarks.harness.model import RANKS, ROOT, training_arguments
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel

SCHEDULES = ("static", "batch-adaptive", "lockstep", "nested")
WARM_UP_BATCHES = 1
EXCHANGE_TO_COMPUTE = (1.1, 2.3)

console = Console()


@dataclass(frozen=True)
class Setting:
    """Where the ranks run."""

    name: str
    title: str
    bits_per_second: float | None = None
    """Of the link between two hosts; None for one host."""


@dataclass(frozen=True)
class Summary:
    """One schedule's figures over its steps after the warm-up."""

    steps: list[dict[str, Any]]
    bits_per_second: float | None

    @property
    def seconds(self) -> float:
        """A step's."""
        return float(np.mean([step["seconds"] for step in self.steps]))

    @property
    def tokens_per_second(self) -> float:
        return sum(step["tokens"] for step in self.steps) / sum(step["seconds"] for step in self.steps)

    @property
    def predicted_tokens_per_second(self) -> float:
        predicted = sum(step["plan"]["predicted_seconds"] for step in self.steps)
        return sum(step["tokens"] for step in self.steps) / predicted

    @property
    def padding_share(self) -> float:
        return float(np.mean([step["padding_share"] for step in self.steps]))

    @property
    def micro_batches(self) -> float:
        """Micro-batches that the busiest rank runs in a step."""
        return float(np.mean([most_micro_batches(step["plan"]) for step in self.steps]))

    @property
    def exchange_cpu_share(self) -> float:
        """Of all processor time that the ranks took."""
        return self._sum("exchange_cpu_seconds") / self._sum("cpu_seconds")

    @property
    def exchange_wall_share(self) -> float:
        """Of the step, a rank's mean."""
        return self._sum("exchange_seconds") / RANKS / sum(step["seconds"] for step in self.steps)

    @property
    def exchange_link_seconds(self) -> float:
        """How long the link needs for what a step's all-to-all sends one way."""
        assert self.bits_per_second is not None
        busier = [max(one_way(step["exchange_link_bytes"])) for step in self.steps]
        return float(np.mean(busier)) * 8 / self.bits_per_second

    @property
    def waited_share(self) -> float:
        """Of the step, spent by the slowest rank in waits for plans and data."""
        waits = (max(step["waited_for_plan_seconds"]) + max(step["waited_for_data_seconds"]) for step in self.steps)
        return sum(waits) / sum(step["seconds"] for step in self.steps)

    def _sum(self, figure: str) -> float:
        return float(sum(sum(step[figure]) for step in self.steps))


def most_micro_batches(plan: dict[str, Any]) -> int:
    """How many micro-batches the busiest rank runs."""
    counts = np.zeros(plan["domain_size"], dtype=int)
    for item in plan["micro_batches"]:
        counts[item["first_rank"] : item["first_rank"] + item["degree"]] += 1
    return int(counts.max())


def one_way(by_rank: list[float]) -> tuple[float, float]:
    """A figure of the ranks, summed over each of the two hosts."""
    half = len(by_rank) // 2
    return sum(by_rank[:half]), sum(by_rank[half:])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    wikipedia = wikipedia_lengths(options.documents_per_step, options.lengths)
    corpora = {corpus.name: corpus for corpus in (source_files(options.documents_per_step // 2), wikipedia)}
    results = {}
    loopback = Setting("loopback", "one host, loopback")
    if "loopback" in options.settings:
        for corpus in corpora.values():
            results[f"{corpus.name}/loopback"] = measure(corpus, loopback, options)
    if "hosts" in options.settings:
        reason = why_not()
        if reason is not None:
            console.print(f"[yellow]two emulated hosts are left out: {reason}", highlight=False)
        else:
            for setting in link_settings(results, wikipedia, options):
                results[f"{wikipedia.name}/{setting.name}"] = measure(wikipedia, setting, options)
    (options.output / "result.json").write_text(json.dumps(results))
    console.print(f"logs and figures: {options.output}", highlight=False)
