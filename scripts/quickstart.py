"""Trains a small GPT on real text twice, side by side: with static groups and with FlexSP.

Both jobs are Megatron's own training loop on 8 ranks of this machine, with the same model, the same documents
in the same order. They take turns step by step. The end is a table: speed, padding, and both loss curves.

Two corpora, one after the other: the source files of Python's standard library, and the same text cut into
documents as long as those of the web, most of them short.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import Plan
from megatron_flexsp.prepare import MEGATRON_TOKENIZER_ARGUMENTS, Record, StandardLibrary, write_dataset

ROOT = Path(__file__).resolve().parents[1]
RANKS = 8
SCHEDULES = ("static", "nested")
CONTEXT, TOKENS_PER_RANK = 4096, 512
"""The longest document needs all 8 ranks."""
WEB_MEAN_TOKENS, WEB_SIGMA = 300, 1.2
"""Web-like lengths: lognormal."""
PLAN_WIDTH = 90
"""Characters in which a step is drawn."""
WARM_UP_STEPS = 1
LOSS_TOLERANCE = 1e-4
"""Relative; both runs start from the same weights and drift apart by rounding alone."""
START_SECONDS, STEP_SECONDS = 300, 600
"""The longest that the quickstart waits for a job to start, and for a step."""

MODEL = """
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 344 --num-attention-heads 8
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 8
"""
TRAINING = """
    --micro-batch-size 1 --lr 1e-3 --lr-decay-style constant --calculate-per-token-loss
    --split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
"""

console = Console()


@dataclass(frozen=True)
class Corpus:
    """What the two jobs train on."""

    name: str
    title: str
    documents_per_step: int


CORPORA = (
    Corpus("files", "Source files of Python's standard library, as they are", 24),
    Corpus("web_lengths", "The same text, cut to web-like lengths", 64),
)


class Job:
    """One torchrun of Megatron, and what its steps reported."""

    def __init__(
        self,
        schedule: str,
        corpus: Corpus,
        prefix: Path,
        options: argparse.Namespace,
        store: torch.distributed.TCPStore,
    ) -> None:
        self.schedule = schedule
        self.steps: list[dict[str, Any]] = []
        self.log = options.output / f"{corpus.name}_{schedule}.log"
        self._name = f"{corpus.name}/{schedule}"
        self._store = store
        arguments = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *("-m", "megatron_flexsp.run", "--cpu", str(ROOT / "scripts" / "quickstart_train.py")),
            *(*MODEL.split(), *TRAINING.split(), "--data-path", str(prefix), *MEGATRON_TOKENIZER_ARGUMENTS),
            *("--seq-length", str(CONTEXT), "--max-position-embeddings", str(CONTEXT)),
            *("--global-batch-size", str(corpus.documents_per_step), "--train-iters", str(options.steps)),
            *("--flexsp", "--flexsp-schedule", schedule, "--flexsp-overlong", "drop"),
            *("--flexsp-max-tokens-per-rank", str(TOKENS_PER_RANK)),
        ]
        environment = {
            **os.environ,
            "FLEXSP_QUICKSTART_JOB": self._name,
            "FLEXSP_QUICKSTART_PORT": str(store.port),
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
        }
        with self.log.open("w") as stream:
            stream.write(" ".join(arguments) + "\n\n")
            stream.flush()
            self._process = subprocess.Popen(
                arguments, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )

    def wait_for(self, what: str, limit_seconds: float) -> str:
        """Wait until the job has set a key; say what its log says if it ends instead."""
        key, deadline = f"{self._name}/{what}", time.monotonic() + limit_seconds
        while not self._store.check([key]):
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                last_lines = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
                reason = "ended early" if ended else f"took longer than {limit_seconds:.0f} s"
                raise FlexSPError(f"the {self.schedule} run {reason}; the end of {self.log}:\n{last_lines}")
            time.sleep(0.02)
        return self._store.get(key).decode()

    def run_step(self, number: int) -> dict[str, Any]:
        """Give the job its turn and wait until it is done."""
        self.wait_for(f"ready/{number}", START_SECONDS)
        self._store.set(f"{self._name}/turn/{number}", "")
        self.steps.append(json.loads(self.wait_for(f"done/{number}", STEP_SECONDS)))
        return self.steps[-1]

    def finish(self) -> None:
        """Let the job end by itself; end it if it doesn't."""
        self._store.set(f"{self._name}/end", "")
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.stop()

    def stop(self) -> None:
        """End the job and its ranks: torchrun passes the signal on."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()


@dataclass
class Summary:
    """One job's figures over its steps after the warm-up."""

    job: Job
    tokens_per_second: float = field(init=False)
    padding_share: float = field(init=False)
    micro_batches: float = field(init=False)
    degrees: Counter[int] = field(init=False)

    def __post_init__(self) -> None:
        steps = self.job.steps[WARM_UP_STEPS:]
        self.tokens_per_second = sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
        self.padding_share = statistics.mean(s["padding_share"] for s in steps)
        self.micro_batches = statistics.mean(len(s["plan"]["micro_batches"]) for s in steps)
        self.degrees = Counter()
        for step in steps:
            for item in step["plan"]["micro_batches"]:
                self.degrees[item["degree"]] += sum(step["lengths"][k] for k in item["sequences"])


def main() -> int:
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    prepare(options.output)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    compared = [(corpus, *compare(corpus, options, store)) for corpus in CORPORA]
    return report(compared, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "quickstart", help="where logs and results go")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}, which is not counted")
    return options


def prepare(output: Path) -> None:
    """Make the corpora the first time."""
    records = {"files": StandardLibrary(), "web_lengths": cut_to_web_lengths()}
    for corpus in CORPORA:
        prefix = output / corpus.name
        if prefix.with_suffix(".idx").exists():
            continue
        console.print(f"preparing the corpus: {corpus.title} ...", highlight=False)
        # The index is put there last: a data file without one is the rest of an interrupted run.
        prefix.with_suffix(".bin").unlink(missing_ok=True)
        summary = write_dataset(records[corpus.name], prefix)
        console.print(f"  {summary.documents:,} documents, {summary.tokens:,} tokens", highlight=False)


def cut_to_web_lengths() -> Iterator[Record]:
    """The standard library's text in documents of random length, a few thousand of them."""
    text = b"".join(record.text for record in StandardLibrary())
    generator = np.random.default_rng(1234)
    draws = generator.lognormal(np.log(WEB_MEAN_TOKENS) - WEB_SIGMA**2 / 2, WEB_SIGMA, 20_000)
    lengths = np.clip(np.rint(draws), 16, CONTEXT).astype(int)
    begins = generator.permutation(np.concatenate([[0], np.cumsum(lengths)[:-1]]))
    for begin, length in zip(begins, lengths, strict=True):
        document = text[begin % len(text) :][:length]
        yield Record(document, len(document))


def compare(corpus: Corpus, options: argparse.Namespace, store: torch.distributed.TCPStore) -> tuple[Job, Job]:
    """Both jobs on one corpus, step by step, now one first and then the other."""
    console.rule(corpus.title)
    jobs: list[Job] = []
    try:
        for schedule in SCHEDULES:
            jobs.append(Job(schedule, corpus, options.output / corpus.name, options, store))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"starting two Megatron jobs of {RANKS} ranks", total=options.steps)
            for job in jobs:
                job.wait_for("ready/0", START_SECONDS)
            progress.update(task, description="training")
            for number in range(options.steps):
                for job in jobs if number % 2 == 0 else reversed(jobs):
                    job.run_step(number)
                progress.console.print(_step_line(number, jobs), highlight=False)
                progress.advance(task)
        for job in jobs:
            job.finish()
    finally:
        for job in jobs:
            job.stop()
    static, nested = jobs
    return static, nested


def _step_line(number: int, jobs: list[Job]) -> str:
    times = " | ".join(f"{job.schedule} {job.steps[-1]['seconds']:5.2f} s" for job in jobs)
    return f"step {number + 1:2d} | loss {jobs[-1].steps[-1]['loss']:.4f} | {times}"


def report(compared: list[tuple[Corpus, Job, Job]], options: argparse.Namespace) -> int:
    """Print loss curves, a plan and the table; 1 if the curves differ."""
    largest_difference = max(print_losses(corpus, static, nested) for corpus, static, nested in compared)
    for corpus, _, nested in compared:
        print_plan(corpus, nested.steps[-1])
    speedups = {corpus.name: print_speeds(corpus, static, nested) for corpus, static, nested in compared}
    result = {
        "speedups": speedups,
        "largest_loss_difference": largest_difference,
        "steps": {corpus.name: {job.schedule: job.steps for job in jobs} for corpus, *jobs in compared},
    }
    (options.output / "result.json").write_text(json.dumps(result))
    console.print(f"logs and figures: {options.output}")
    if largest_difference > LOSS_TOLERANCE:
        console.print(f"[red]the loss curves differ by up to {largest_difference:.1e}; expected {LOSS_TOLERANCE:.0e}")
        return 1
    return 0


def print_losses(corpus: Corpus, static: Job, nested: Job) -> float:
    """Both loss curves; returns their largest relative difference."""
    table = Table("step", "loss, static group", "loss, FlexSP nested", "relative difference", title=corpus.title)
    differences = []
    for number, (first, second) in enumerate(zip(static.steps, nested.steps, strict=True), start=1):
        differences.append(abs(first["loss"] - second["loss"]) / abs(first["loss"]))
        table.add_row(str(number), f"{first['loss']:.6f}", f"{second['loss']:.6f}", f"{differences[-1]:.1e}")
    console.print(table)
    return max(differences)


def print_speeds(corpus: Corpus, static: Job, nested: Job) -> float:
    """What the comparison is about; returns the ratio of the speeds."""
    both = (Summary(static), Summary(nested))
    speedup = both[1].tokens_per_second / both[0].tokens_per_second
    table = Table("", "static group", "FlexSP nested", title=corpus.title)
    table.add_row("tokens per second", *(f"{summary.tokens_per_second:,.0f}" for summary in both))
    table.add_row("relative speed", "1.00", f"{speedup:.2f}")
    table.add_row("padding share", *(f"{summary.padding_share:.2%}" for summary in both))
    table.add_row("micro-batches a step", *(f"{summary.micro_batches:.1f}" for summary in both))
    table.add_row("tokens by ranks in their group", *(_shares(summary.degrees) for summary in both))
    console.print(table)
    return speedup


def _shares(tokens_by_degree: Counter[int]) -> str:
    total = sum(tokens_by_degree.values())
    return ", ".join(f"{degree}: {tokens / total:.0%}" for degree, tokens in sorted(tokens_by_degree.items()) if tokens)


def print_plan(corpus: Corpus, step: dict[str, Any]) -> None:
    """The last step's plan: a line for each rank, time to the right, each micro-batch drawn with its group's size."""
    plan = Plan.from_json(json.dumps(step["plan"]))
    ends, rows = np.zeros(plan.domain_size), [""] * plan.domain_size
    characters_a_second = PLAN_WIDTH / plan.predicted_seconds
    for item, seconds in zip(plan.micro_batches, step["micro_batch_seconds"], strict=True):
        end = ends[item.first_rank : item.first_rank + item.degree].max() + seconds
        for rank in item.ranks:
            ends[rank] = end
            width = round(end * characters_a_second) - len(rows[rank])
            rows[rank] += (str(item.degree) * (width - 1) + "|") if not item.is_filler else " " * width
    console.print(f"The last step as it was planned ({corpus.title}): time runs to the right, each stretch is a")
    console.print("micro-batch, its digit the number of ranks that share it", highlight=False)
    lines = [f"rank {rank} |{row}" for rank, row in enumerate(rows)]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlexSPError as error:
        console.print(f"[red]quickstart: {error}", markup=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
