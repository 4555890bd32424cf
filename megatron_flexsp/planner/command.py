"""``flexsp plan``: plans the global batches of a file of lengths, and shows how good the plans are."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import ASKABLE_SCHEDULES, CostModel, Plan, load_cost_model, plan, preset_names
from megatron_flexsp.planner.lengths_file import read_lengths
from megatron_flexsp.planner.plans_file import planned_line


class Degrees(click.ParamType):
    """Whole numbers with commas between them."""

    name = "degrees"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(int(degree) for degree in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list such as 2,4,8", param, ctx)


def recomputing_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that let plans recompute activations."""
    command = click.option(
        "--max-recomputed-tokens-per-rank",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="What a rank holds where activations are recomputed; default: what the cost model says.",
    )(command)
    return click.option(
        "--recompute",
        is_flag=True,
        help="Let plans recompute the activations of single micro-batches, as --flexsp-recompute does.",
    )(command)


def with_recomputing(cost_model: CostModel, recompute: bool, tokens: int | None) -> tuple[CostModel, int | None]:
    """The cost model and the capacity of recomputed micro-batches that the two options ask for.

    Raises
    ------
    FlexSPError
        If the capacity is neither given nor in the cost model.
    """
    if not recompute:
        if tokens is not None:
            raise FlexSPError("--max-recomputed-tokens-per-rank needs --recompute")
        return cost_model, None
    if tokens is not None:
        free_bytes = cost_model.memory_budget_bytes - cost_model.model_state_bytes
        # Half a token more: a whole number of them must survive the division.
        cost_model = replace(cost_model, recomputed_activation_bytes_per_token=free_bytes / (tokens + 0.5))
    elif cost_model.recomputed_activation_bytes_per_token == 0:
        raise FlexSPError(
            "--recompute: the cost model has no recomputed_activation_bytes_per_token, so the capacity is unknown; "
            "give --max-recomputed-tokens-per-rank"
        )
    return cost_model, cost_model.recomputed_token_capacity


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
@click.option("--global-batch-size", required=True, type=click.IntRange(min=1), help="Sequences of a batch.")
@click.option("--skip-batches", default=0, type=click.IntRange(min=0), help="Leave out so many batches at the start.")
@click.option("--batches", type=click.IntRange(min=1), help="Plan so many batches; all by default.")
@click.option("--schedule", default="nested", show_default=True, type=click.Choice(ASKABLE_SCHEDULES))
@click.option("--static-degree", type=click.IntRange(min=1), help="The one degree of a static plan.")
@click.option("--degrees", type=Degrees(), help="Degrees that may be used, with commas; all by default.")
@recomputing_options
@click.option("--pad-each-to", default=1, type=click.IntRange(min=1), help="Pad each sequence to a multiple of this.")
@click.option("--max-sequence", type=click.IntRange(min=1), help="Drop lengths above this.")
@click.option("--time-limit", type=click.FloatRange(min=0), metavar="SECONDS", help="Stop improving a plan after this.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of the search's random choices.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write a plan a line, as JSON.")
def plan_command(
    lengths_file: Path,
    cost_model_name: str,
    ranks: int,
    global_batch_size: int,
    skip_batches: int,
    batches: int | None,
    schedule: str,
    static_degree: int | None,
    degrees: tuple[int, ...] | None,
    recompute: bool,
    max_recomputed_tokens_per_rank: int | None,
    pad_each_to: int,
    max_sequence: int | None,
    time_limit: float | None,
    seed: int,
    output: Path | None,
) -> None:
    """Plan the global batches of LENGTHS, a text file with the tokens of one sequence on each line.

    \b
    flexsp plan lengths.txt --cost-model gpt-7b-192k --ranks 64 --global-batch-size 512 --batches 3
    """
    cost_model, recomputed_token_capacity = with_recomputing(
        load_cost_model(cost_model_name), recompute, max_recomputed_tokens_per_rank
    )
    lengths = read_lengths(lengths_file)
    if max_sequence is not None:
        lengths = lengths[lengths <= max_sequence]
    lengths = _padded(lengths, pad_each_to)
    numbers = _batch_numbers(len(lengths), global_batch_size, skip_batches, batches, lengths_file)
    console = Console(highlight=False)
    table, plans = _new_table(), []
    with opened(output) as file:
        for number in _with_progress(numbers):
            batch = lengths[number * global_batch_size : (number + 1) * global_batch_size]
            made = plan(
                batch,
                cost_model,
                ranks,
                schedule=schedule,
                degrees=degrees,
                static_degree=static_degree,
                recomputed_token_capacity=recomputed_token_capacity,
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


def _padded(lengths: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    return -(-lengths // multiple) * multiple


def _batch_numbers(num_lengths: int, size: int, skip: int, batches: int | None, path: Path) -> range:
    """Which whole batches to plan."""
    whole = num_lengths // size
    if skip >= whole:
        raise FlexSPError(
            f"{path} holds {num_lengths} usable lengths, {whole} batches of --global-batch-size {size}; "
            + (f"none is left after --skip-batches {skip}" if skip else "give more lengths or a smaller batch")
        )
    if batches is not None and skip + batches > whole:
        raise FlexSPError(
            f"--batches {batches} after --skip-batches {skip} asks for batch {skip + batches}; {path} holds {whole} "
            f"of --global-batch-size {size}"
        )
    return range(skip, whole if batches is None else skip + batches)


def opened(output: Path | None) -> IO[str] | nullcontext[None]:
    """The file of ``--output``, or nothing."""
    if output is None:
        return nullcontext()
    try:
        return output.open("w", encoding="utf-8")
    except OSError as error:
        raise FlexSPError(f"--output {output}: cannot write ({error.strerror})") from None


def _with_progress(numbers: Iterable[int]) -> Iterator[int]:
    """The numbers, with a bar on a terminal and nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield from progress.track(list(numbers), description="planning batches")


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
