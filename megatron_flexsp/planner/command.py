"""``flexsp plan``: plans the global batches of a file of lengths, and shows how good the plans are."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_flexsp.errors import named_by_flags
from megatron_flexsp.planner import ASKABLE_SCHEDULES, Plan, load_cost_model, plan, preset_names
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


@click.command(name="plan")
@click.argument("lengths_file", metavar="LENGTHS", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--cost-model",
    "cost_model_name",
    required=True,
    metavar="FILE_OR_PRESET",
    help=f"A cost model's JSON file, or one of {', '.join(preset_names())}.",
)
@click.option("--ranks", required=True, type=click.IntRange(min=1), help="Ranks in the domain.")
@batch_options
@click.option("--batches", type=click.IntRange(min=1), help="Plan so many batches; all by default.")
@click.option("--schedule", default="nested", show_default=True, type=click.Choice(ASKABLE_SCHEDULES))
@click.option("--static-degree", type=click.IntRange(min=1), help="The one degree of a static plan.")
@click.option("--degrees", type=Degrees(), help="Degrees that may be used, with commas; all by default.")
@capacity_options
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop improving a plan after this.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of the search's random choices.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write a plan a line, as JSON.")
@named_by_flags(FLAGS)
def plan_command(
    lengths_file: Path,
    cost_model_name: str,
    ranks: int,
    global_batch_size: int,
    skip_batches: int,
    max_sequence: int | None,
    overlong: str,
    pad_each_to: int,
    batches: int | None,
    schedule: str,
    static_degree: int | None,
    degrees: tuple[int, ...] | None,
    max_tokens_per_rank: int | None,
    recompute: bool,
    max_recomputed_tokens_per_rank: int | None,
    time_limit: float | None,
    seed: int,
    output: Path | None,
) -> None:
    """Plan the global batches of LENGTHS, a text file with the tokens of one sequence on each line.

    \b
    flexsp plan lengths.txt --cost-model gpt-7b-192k --ranks 64 --global-batch-size 512 --batches 3
    """
    cost_model = load_cost_model(cost_model_name)
    recomputed = recomputed_capacity(cost_model, max_tokens_per_rank, recompute, max_recomputed_tokens_per_rank)
    lengths = sequences_of(read_lengths(lengths_file), max_sequence, overlong, pad_each_to)
    source = BatchSource(lengths, str(lengths_file), shuffle_seed=None)
    drawn = source.batches(global_batch_size, batches, skip_batches)
    console = Console(highlight=False)
    table, plans = _new_table(), []
    with opened(output) as file:
        for number, batch in enumerate(_with_progress(drawn), start=skip_batches):
            made = plan(
                batch,
                cost_model,
                ranks,
                schedule=schedule,
                degrees=degrees,
                static_degree=static_degree,
                token_capacity=max_tokens_per_rank,
                recomputed_token_capacity=recomputed,
                time_limit_seconds=time_limit,
                seed=seed,
            )
            plans.append(made)
            _add_plan(table, number, made)
            if file is not None:
                file.write(planned_line(made, batch, cost_model, batch=number) + "\n")
    _add_total(table, plans)
    console.print(table)
    if output is not None:
        console.print(f"{len(plans)} plans written to {output}", soft_wrap=True)


def _with_progress(batches: Sequence[Lengths]) -> Iterator[Lengths]:
    """The batches, with a bar on a terminal and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(batches, description="planning batches")


def _new_table() -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("batch", "micro-batches", "seconds", "bound", "gap", "status", "solve s"):
        table.add_column(name, justify="right")
    table.add_column("micro-batches of each degree")
    return table


def _add_plan(table: Table, number: int, made: Plan) -> None:
    degrees = Counter((item.degree, item.recomputed) for item in made.micro_batches if not item.is_filler)
    fillers = sum(item.is_filler for item in made.micro_batches)
    by_degree = [
        f"{count}x{degree}{' recomputed' if recomputed else ''}"
        for (degree, recomputed), count in sorted(degrees.items(), reverse=True)
    ]
    table.add_row(
        str(number),
        str(len(made.micro_batches)),
        f"{made.predicted_seconds:.3f}",
        f"{made.lower_bound_seconds:.3f}",
        _gap(made.predicted_seconds, made.lower_bound_seconds),
        made.status,
        f"{made.solve_seconds:.3f}",
        " ".join([*by_degree, f"{fillers} fillers"] if fillers else by_degree),
    )


def _add_total(table: Table, plans: list[Plan]) -> None:
    seconds = sum(made.predicted_seconds for made in plans)
    bound = sum(made.lower_bound_seconds for made in plans)
    table.add_section()
    table.add_row(
        "total",
        str(sum(len(made.micro_batches) for made in plans)),
        f"{seconds:.3f}",
        f"{bound:.3f}",
        _gap(seconds, bound),
        "",
        f"{sum(made.solve_seconds for made in plans):.3f}",
        "",
    )


def _gap(seconds: float, bound: float) -> str:
    return f"{seconds / bound - 1:.2%}" if bound > 0 else "-"
