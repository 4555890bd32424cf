"""What FlexSP gains on this machine's CPU: six schedules, one model, the same documents, alternating in one run.

    python benchmarks/cpu_throughput.py            # everything: both corpora, three settings
    python benchmarks/cpu_throughput.py --quick    # less of everything, to see that it works

Eight ranks train a small GPT with Megatron. Every global batch is trained once under each schedule: static groups, the
best single degree for the batch (batch-adaptive), lockstep as in the FlexSP paper, and nested. Two more fit the same
memory with fewer ranks: static groups that recompute all activations, and nested plans that recompute some. Settings:

* loopback: the machine as it is;
* two emulated hosts of four ranks each, joined by a slow link (Linux, root). Its rate is such that what the static
  group's all-to-all sends over it takes 1.1 and 2.3 times as long as the compute. These are the shares of groups of 16
  and of 64 GPUs in the paper (arXiv 2412.01523).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness.corpora import Corpus, source_files, wikipedia_lengths
from benchmarks.harness.hosts import EmulatedHosts, Host, why_not
from benchmarks.harness.jobs import RUN, Job, run_to_end
from benchmarks.harness.model import RANKS, ROOT, flexsp_arguments, training_arguments
from benchmarks.harness.summary import Summary
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel

SCHEDULES = ("static", "batch-adaptive", "lockstep", "nested", "static-recompute", "nested-recompute")
RECOMPUTE = "--flexsp-recompute"
LINK_TO_COMPUTE = (1.1, 2.3)
RANKS_PER_HOST = RANKS // 2
PROFILE_SECONDS = 30
_TCP_SHARE = 0.94
"""Of what the link carries, the part that is not headers."""

console = Console(highlight=False)

Summaries = dict[str, Summary]


@dataclass(frozen=True)
class Setting:
    """Where the ranks run."""

    name: str
    title: str
    bits_per_second: float | None = None
    """Of the link between two hosts; None for one host."""

    def hosts(self) -> AbstractContextManager[Sequence[Host]]:
        """Make them; they are there as long as the context."""
        if self.bits_per_second is None:
            return nullcontext((Host(RANKS),))
        return EmulatedHosts(RANKS_PER_HOST, self.bits_per_second)

    def cost_model(self, loopback: CostModel) -> CostModel:
        """What one measured, or estimated, over loopback becomes here.

        In a group of all ranks each sends half of its bytes over the link, and one host's ranks share it: with
        rate r bytes a second, a pack of S bytes takes S / (2 RANKS_PER_HOST r) * RANKS_PER_HOST / 2 one way.
        """
        if self.bits_per_second is None:
            return loopback
        link = 2 / (_TCP_SHARE * self.bits_per_second / 8)
        bandwidth = {
            degree: value if degree <= RANKS_PER_HOST else 1 / (1 / value + link)
            for degree, value in loopback.exchange_bandwidth_bytes_per_second.items()
        }
        return replace(loopback, exchange_bandwidth_bytes_per_second=bandwidth)


LOOPBACK = Setting("loopback", "one host")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write the figures down."""
    options = parse_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    mixes = {
        "files": source_files(options.documents_per_step // 2),
        "wikipedia": wikipedia_lengths(options.documents_per_step, options.lengths),
    }
    results: dict[str, dict[str, dict[str, float]]] = {}

    def run(corpus: Corpus, setting: Setting, loopback: CostModel | None) -> tuple[Summaries, CostModel]:
        summaries, cost_model = measure(corpus, setting, loopback, options)
        console.print(tabulated(summaries, corpus, setting))
        results[f"{corpus.name}, {setting.title}"] = figures(summaries)
        (options.output / "result.json").write_text(json.dumps(results, indent=1))
        return summaries, cost_model

    loopback = options.cost_model
    for name in options.mixes:
        corpus = mixes[name]
        if loopback is None and not options.quick:
            # The costs are the model's and the machine's: one profile serves all mixes.
            loopback = profiled(corpus, options)
        summaries, cost_model = run(corpus, LOOPBACK, loopback)
        if name == "wikipedia" and options.link_to_compute:
            reason = why_not()
            if reason is not None:
                console.print(f"[yellow]two emulated hosts are left out: {reason}")
                continue
            for setting in slow_links(summaries["static"], options.link_to_compute):
                run(corpus, setting, cost_model)
    console.print(f"logs and figures: {options.output}")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3, help="global batches under every schedule (%(default)s)")
    parser.add_argument("--documents-per-step", type=int, default=128, help="of the Wikipedia mix (%(default)s)")
    parser.add_argument("--mixes", nargs="+", choices=("files", "wikipedia"), default=["files", "wikipedia"])
    parser.add_argument(
        "--link-to-compute",
        nargs="*",
        type=float,
        default=list(LINK_TO_COMPUTE),
        metavar="RATIO",
        help="how long the static group's all-to-all keeps the link of the two hosts busy, as a multiple of the "
        "compute; none at all leaves them out",
    )
    parser.add_argument("--lengths", type=Path, help="lengths of Wikipedia's articles, one on each line")
    parser.add_argument("--cost-model", type=CostModel.load, help="measured over loopback; default: measures one")
    parser.add_argument("--quick", action="store_true", help="2 batches of 16 documents, planned by an estimate")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "cpu_throughput", help="where logs and figures go"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.batches, options.documents_per_step = 2, 16
    if options.batches < 2:
        parser.error("--batches must be at least 2: the first is not counted")
    if options.documents_per_step < 2 * RANKS or options.documents_per_step % (2 * RANKS):
        parser.error(f"--documents-per-step must be a multiple of {2 * RANKS}")
    if any(not ratio > 0 for ratio in options.link_to_compute):
        parser.error("--link-to-compute must be above 0")
    return options


def profiled(corpus: Corpus, options: argparse.Namespace) -> CostModel:
    """Measure the costs of this job on this machine, as a user would before training."""
    console.print(f"measuring a cost model: {corpus.title} ...")
    prefix, _ = corpus.prepare(options.output)
    path = options.output / f"{corpus.name}.cost_model.json"
    job = [*training_arguments(prefix, corpus.documents_per_step, 2), *flexsp_arguments("nested"), RECOMPUTE]
    profile = ("--flexsp-profile", str(path), "--flexsp-profile-seconds", str(PROFILE_SECONDS))
    log = options.output / f"{corpus.name}_profile.log"
    run_to_end(Host(RANKS), [*RUN, str(ROOT / "scripts" / "pretrain_gpt.py"), *job, *profile], log)
    return CostModel.load(path)


def measure(
    corpus: Corpus, setting: Setting, loopback: CostModel | None, options: argparse.Namespace
) -> tuple[Summaries, CostModel]:
    """One job whose steps alternate between the schedules; the first batch is not counted."""
    console.rule(f"{corpus.title}; {setting.title}")
    prefix, _ = corpus.prepare(options.output)
    name = f"{corpus.name}_{setting.name}"
    count = options.batches * len(SCHEDULES)
    arguments = [*training_arguments(prefix, corpus.documents_per_step, count), *flexsp_arguments("nested"), RECOMPUTE]
    if loopback is not None:
        path = options.output / f"{name}.cost_model.json"
        path.write_text(setting.cost_model(loopback).to_json())
        arguments += ["--flexsp-cost-model", str(path)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with setting.hosts() as hosts, Progress(*columns, console=console) as progress:
        task = progress.add_task(f"starting Megatron on {RANKS} ranks", total=count)
        job = Job(name, arguments, options.output, hosts, schedules=SCHEDULES)
        try:
            ready = job.wait_until_ready()
            progress.update(task, description="training")
            for _ in range(count):
                step = job.run_step()
                progress.console.print(f"{step['schedule']:>16} {step['seconds']:7.2f} s | {step['tokens']:6,} tokens")
                progress.advance(task)
            job.finish()
        finally:
            job.stop()
    counted = job.steps[len(SCHEDULES) :]
    by_schedule = {name: Summary([step for step in counted if step["schedule"] == name]) for name in SCHEDULES}
    return by_schedule, CostModel.from_json(ready["cost_model"])


def slow_links(static: Summary, ratios: Sequence[float]) -> Iterator[Setting]:
    """The links over which the static group's all-to-all takes so many times its compute."""
    cores = min(len(os.sched_getaffinity(0)), RANKS)
    compute_seconds = static.compute_cpu_seconds / cores
    for ratio in ratios:
        bits_per_second = static.link_bytes * 8 / (ratio * compute_seconds)
        title = f"two hosts, {bits_per_second / 1e6:.0f} Mbit/s, all-to-all {ratio:g} x compute"
        yield Setting(f"hosts_{ratio:g}", title, bits_per_second)


def figures(summaries: Summaries) -> dict[str, dict[str, float]]:
    """What the table shows, for other programs."""
    static = summaries["static"]
    return {
        name: {
            "seconds": summary.seconds,
            "tokens_per_second": summary.tokens_per_second,
            "speedup": summary.tokens_per_second / static.tokens_per_second,
            "predicted_speedup": summary.predicted_tokens_per_second / static.predicted_tokens_per_second,
            "exchange_cpu_share": summary.exchange_cpu_share,
            "link_bytes": summary.link_bytes,
            "padding_share": summary.padding_share,
            "waited_share": summary.waited_share,
            "recomputed_share": summary.recomputed_share,
            "planning_seconds": summary.planning_seconds,
        }
        for name, summary in summaries.items()
    }


def tabulated(summaries: Summaries, corpus: Corpus, setting: Setting) -> Table:
    """The figures of one setting, a schedule a column."""
    static = summaries["static"]
    table = Table("", *summaries, title=f"{corpus.title}; {setting.title}", title_justify="left")

    def row(label: str, text: Callable[[Summary], str]) -> None:
        table.add_row(label, *(text(summary) for summary in summaries.values()))

    row("tokens per second", lambda s: f"{s.tokens_per_second:,.0f}")
    row("ratio to static, measured", lambda s: f"{s.tokens_per_second / static.tokens_per_second:.2f}")
    row(
        "ratio to static, predicted",
        lambda s: f"{s.predicted_tokens_per_second / static.predicted_tokens_per_second:.2f}",
    )
    row("seconds a step", lambda s: f"{s.seconds:.2f}")
    # Ranks outnumber the cores, so that a rank's own clock mostly shows it waiting for one.
    row("all-to-all, of all processor time", lambda s: f"{s.exchange_cpu_share:.0%}")
    if setting.bits_per_second is not None:
        bytes_per_second = setting.bits_per_second / 8
        row("link busy with all-to-all", lambda s: f"{s.link_bytes / bytes_per_second / s.seconds:.0%}")
    row("padding", lambda s: f"{s.padding_share:.2%}")
    row("waiting for plans and data", lambda s: f"{s.waited_share:.2%}")
    row("planning a step, beside training", lambda s: f"{s.planning_seconds * 1e3:.0f} ms")
    row("tokens recomputed", lambda s: f"{s.recomputed_share:.0%}")
    row("micro-batches a step", lambda s: f"{s.micro_batches:.0f}")
    row(
        "tokens by ranks in their group",
        lambda s: ", ".join(f"{degree}: {share:.0%}" for degree, share in s.tokens_by_degree.items()),
    )
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlexSPError as error:
        console.print(f"[red]cpu_throughput: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
