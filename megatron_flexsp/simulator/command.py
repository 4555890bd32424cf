"""``flexsp simulate``: what FlexSP would bring on one's own data, before a GPU hour is spent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_flexsp.errors import FlexSPError, named_by_flags
from megatron_flexsp.planner import load_cost_model, preset_names
from megatron_flexsp.planner.batches import BatchSource, Lengths
from megatron_flexsp.planner.command_options import (
    FLAGS,
    Degrees,
    batch_options,
    capacity_options,
    opened,
    recomputed_capacity,
    sequences_of,
)
from megatron_flexsp.planner.lengths_file import read_lengths
from megatron_flexsp.planner.plans_file import planned_line
from megatron_flexsp.simulator.comparison import (
    RECOMPUTING,
    STRATEGIES,
    Cluster,
    Outcome,
    compare,
    holds_without_recomputing,
    static_degree_for,
)
from megatron_flexsp.simulator.document_lengths import read_document_lengths
from megatron_flexsp.simulator.stragglers import Stragglers

_USUAL_BATCHES = 10
_SCALE_BATCHES = 3
"""At each size of ``--scale``: large batches differ little from each other."""


class _Strategies(click.ParamType):
    """Names with commas between them."""

    name = "strategies"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in str(value).split(",")))
        for name in names:
            if name not in STRATEGIES:
                self.fail(f"{name!r} is none of {', '.join(STRATEGIES)}", param, ctx)
        return names


@click.command(name="simulate")
@click.argument(
    "lengths_file", metavar="[LENGTHS]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--data-path", metavar="PREFIX", help="A Megatron data set (PREFIX.idx) in the place of LENGTHS.")
@click.option(
    "--cost-model",
    "cost_model_name",
    required=True,
    metavar="FILE_OR_PRESET",
    help=f"A cost model's JSON file, or one of {', '.join(preset_names())}.",
)
@click.option("--ranks", required=True, type=click.IntRange(min=1), help="Data-parallel ranks (the domain).")
@batch_options
@click.option(
    "--batches",
    type=click.IntRange(min=1),
    help=f"Simulate so many batches; by default {_USUAL_BATCHES}, or all where there are fewer.",
)
@click.option(
    "--compare",
    "strategies",
    type=_Strategies(),
    help=f"Ways to train, with commas, of {', '.join(STRATEGIES)}; speeds are relative to the first. Default: all, "
    "those that end in -recompute with --recompute alone.",
)
@click.option("--static-degree", type=click.IntRange(min=1), help="Of static; default: what the longest needs.")
@click.option("--degrees", type=Degrees(), help="Degrees that may be used, with commas; all by default.")
@capacity_options
@click.option("--scale", type=Degrees(), metavar="N,N,...", help="Also on so many ranks, batches growing with them.")
@click.option("--pipeline-stages", default=1, type=click.IntRange(min=1), help="Simulate a 1F1B pipeline.")
@click.option("--reduction-seconds", default=0.0, type=click.FloatRange(min=0), help="What the end of a step takes.")
@click.option("--straggler-share", default=0.0, type=click.FloatRange(0, 1), help="Ranks that are slow in a step.")
@click.option("--straggler-slowdown", default=1.5, show_default=True, type=click.FloatRange(min=1), help="How slow.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop improving a plan after this.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of all random choices.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the plans, for flexsp report.",
)
@named_by_flags(FLAGS)
def simulate_command(
    lengths_file: Path | None,
    data_path: str | None,
    cost_model_name: str,
    ranks: int,
    global_batch_size: int,
    skip_batches: int,
    max_sequence: int | None,
    overlong: str,
    pad_each_to: int,
    batches: int | None,
    strategies: tuple[str, ...] | None,
    static_degree: int | None,
    degrees: tuple[int, ...] | None,
    max_tokens_per_rank: int | None,
    recompute: bool,
    max_recomputed_tokens_per_rank: int | None,
    scale: tuple[int, ...] | None,
    pipeline_stages: int,
    reduction_seconds: float,
    straggler_share: float,
    straggler_slowdown: float,
    time_limit: float | None,
    seed: int,
    output: Path | None,
) -> None:
    """Simulate training on the sequences of LENGTHS, a text file with the tokens of one on each line.

    \b
    flexsp simulate lengths.txt --cost-model gpt-7b-192k --ranks 64 --global-batch-size 512
    flexsp simulate --data-path my_corpus_text_document --max-sequence 32768 \\
        --cost-model cost_model.json --ranks 64 --global-batch-size 512 --scale 128,256
    """
    source = _source(lengths_file, data_path, max_sequence, overlong, pad_each_to, seed)
    stragglers = Stragglers(straggler_share, straggler_slowdown, seed) if straggler_share else None
    cost_model = load_cost_model(cost_model_name)
    recomputed = recomputed_capacity(cost_model, max_tokens_per_rank, recompute, max_recomputed_tokens_per_rank)

    def cluster(domain_size: int) -> Cluster:
        return Cluster(
            cost_model=cost_model,
            domain_size=domain_size,
            degrees=degrees,
            static_degree=static_degree,
            token_capacity=max_tokens_per_rank,
            recomputed_token_capacity=recomputed,
            pipeline_stages=pipeline_stages,
            reduction_seconds=reduction_seconds,
            stragglers=stragglers,
            time_limit_seconds=time_limit,
            seed=seed,
        )

    console = Console(highlight=False)
    drawn = source.batches(global_batch_size, batches, skip_batches)[: batches or _USUAL_BATCHES]
    strategies = _strategies(strategies, drawn, cluster(ranks))
    with opened(output) as file:
        outcomes = _outcomes(drawn, strategies, cluster(ranks), "simulating", file)
    console.print(_describe(drawn, ranks), soft_wrap=True)
    console.print(_comparison_table(outcomes))
    console.print(_verdict(outcomes, drawn, cluster(ranks)), soft_wrap=True)
    if scale is not None:
        rows = []
        for size in scale:
            per_batch = max(1, round(global_batch_size * size / ranks))
            wider = source.drawn(per_batch, min(batches or _USUAL_BATCHES, _SCALE_BATCHES), seed)
            rows.append((size, per_batch, _outcomes(wider, strategies, cluster(size), f"simulating {size} ranks")))
        console.print(_scale_table(rows))


def _strategies(asked: tuple[str, ...] | None, batches: Sequence[Lengths], cluster: Cluster) -> tuple[str, ...]:
    """What to compare: by default what can run, with everything recomputed or not."""
    recomputes = cluster.recomputed_token_capacity is not None
    for name in asked or ():
        if name in RECOMPUTING and not recomputes:
            raise FlexSPError(f"--compare {name} needs --recompute", "add it")
    if asked is not None:
        return asked
    if not recomputes:
        return tuple(name for name in STRATEGIES if name not in RECOMPUTING)
    return STRATEGIES if holds_without_recomputing(batches, cluster) else RECOMPUTING


def _source(
    lengths_file: Path | None,
    data_path: str | None,
    max_sequence: int | None,
    overlong: str,
    pad_each_to: int,
    seed: int,
) -> BatchSource:
    if (lengths_file is None) == (data_path is None):
        raise FlexSPError("give either a file of LENGTHS or --data-path, and not both")
    if lengths_file is not None:
        lengths, name, shuffle_seed = read_lengths(lengths_file), str(lengths_file), None
    else:
        assert data_path is not None
        lengths, name, shuffle_seed = read_document_lengths(data_path), f"--data-path {data_path}", seed
    return BatchSource(sequences_of(lengths, max_sequence, overlong, pad_each_to), name, shuffle_seed)


def _outcomes(
    batches: Sequence[Lengths],
    strategies: Sequence[str],
    cluster: Cluster,
    description: str,
    file: IO[str] | None = None,
) -> dict[str, Outcome]:
    """What each strategy makes of the batches, with a bar on a terminal; plans go to the file."""
    outcomes = {strategy: Outcome(strategy) for strategy in strategies}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        steps: Iterator = compare(batches, strategies, cluster)
        for strategy, number, made, timeline in progress.track(
            steps, total=len(batches) * len(strategies), description=description
        ):
            outcomes[strategy].add(made, batches[number], timeline)
            if file is not None:
                about = {"strategy": strategy, "batch": number, "pipeline_stages": cluster.pipeline_stages}
                file.write(planned_line(made, batches[number], cluster.costs(strategy), **about) + "\n")
    return outcomes


def _describe(batches: Sequence[Lengths], ranks: int) -> str:
    lengths = np.concatenate(batches)
    return (
        f"{len(batches)} batches of {len(batches[0])} sequences on {ranks} ranks; tokens of a sequence: median "
        f"{np.median(lengths):,.0f}, mean {lengths.mean():,.0f}, longest {lengths.max():,}"
    )


def _comparison_table(outcomes: dict[str, Outcome]) -> Table:
    first = next(iter(outcomes.values()))
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("", min_width=max(map(len, outcomes)))
    for name in ("step s", "spread", "tokens/s", "speed", "busy", "padding", "gap", "solve s"):
        table.add_column(name, justify="right")
    for outcome in outcomes.values():
        seconds = np.array(outcome.step_seconds)
        table.add_row(
            outcome.strategy,
            f"{seconds.mean():.3f}",
            f"±{seconds.std():.3f}",
            f"{outcome.tokens_per_second:,.0f}",
            f"{outcome.speed_over(first):.2f}",
            f"{np.mean(outcome.busy_shares):.1%}",
            f"{np.mean(outcome.padding_shares):.2%}",
            f"{np.mean(outcome.bound_ratios) - 1:.1%}" if outcome.bound_ratios else "-",
            f"{np.mean(outcome.solve_seconds):.2f}",
        )
    return table


def _verdict(outcomes: dict[str, Outcome], batches: Sequence[Lengths], cluster: Cluster) -> str:
    """One sentence that answers whether it is worth it."""
    first, *others = outcomes.values()
    if not others:
        return ""
    best = max(others, key=lambda outcome: outcome.tokens_per_second)
    speeds = best.speeds_over(first)
    name = first.strategy
    if name.startswith("static"):
        degree = static_degree_for(max(int(batch.max()) for batch in batches), cluster, name)
        name = f"one static degree of {degree}{', all recomputed,' if name in RECOMPUTING else ''}"
    return (
        f"{best.strategy} would train {best.speed_over(first):.2f} times as fast as {name} "
        f"({speeds.min():.2f} to {speeds.max():.2f} from batch to batch), if the cost model holds."
    )


def _scale_table(rows: Sequence[tuple[int, int, dict[str, Outcome]]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("ranks", "sequences", "", "step s", "tokens/s a rank", "speed"):
        table.add_column(name, justify="right" if name else "left")
    for ranks, sequences, outcomes in rows:
        first = next(iter(outcomes.values()))
        for outcome in outcomes.values():
            table.add_row(
                *((f"{ranks:,}", f"{sequences:,}") if outcome is first else ("", "")),
                outcome.strategy,
                f"{np.mean(outcome.step_seconds):.3f}",
                f"{outcome.tokens_per_second / ranks:,.0f}",
                f"{outcome.speed_over(first):.2f}",
            )
    return table
