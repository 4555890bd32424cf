"""Options that ``flexsp plan`` and ``flexsp simulate`` share, and what follows from them."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import click

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.batches import OVERLONG, Lengths, with_longest
from megatron_flexsp.planner.cost_model import CostModel

FLAGS = {
    "token_capacity": "--max-tokens-per-rank",
    "recomputed_token_capacity": "--max-recomputed-tokens-per-rank",
    "degrees": "--degrees",
    "lengths": "--max-sequence",
}
"""What stands in errors in the place of the planner's parameters."""


class Degrees(click.ParamType):
    """Whole numbers with commas between them."""

    name = "degrees"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(int(degree) for degree in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list such as 2,4,8", param, ctx)


def capacity_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what a rank holds, and let plans recompute activations."""
    for option in (
        click.option(
            "--max-recomputed-tokens-per-rank",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="What a rank holds where activations are recomputed; default: what the cost model says, in proportion "
            "to --max-tokens-per-rank where that is given.",
        ),
        click.option(
            "--recompute",
            is_flag=True,
            help="Let plans recompute the activations of single micro-batches, as --flexsp-recompute does.",
        ),
        click.option(
            "--max-tokens-per-rank",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="What a rank holds in one micro-batch; default: what the cost model says.",
        ),
    ):
        command = option(command)
    return command


def batch_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which sequences the documents become, and which batches of them are taken."""
    for option in (
        click.option(
            "--pad-each-to", default=1, type=click.IntRange(min=1), help="Pad each sequence to a multiple of this."
        ),
        click.option(
            "--overlong",
            default="split",
            show_default=True,
            type=click.Choice(OVERLONG),
            help="What longer ones become, as --flexsp-overlong.",
        ),
        click.option("--max-sequence", type=click.IntRange(min=1), help="The longest sequence, as --seq-length."),
        click.option(
            "--skip-batches", default=0, type=click.IntRange(min=0), help="Leave out so many batches at the start."
        ),
        click.option("--global-batch-size", required=True, type=click.IntRange(min=1), help="Sequences of a batch."),
    ):
        command = option(command)
    return command


def sequences_of(lengths: Lengths, max_sequence: int | None, overlong: str, pad_each_to: int) -> Lengths:
    """The sequences that ``batch_options`` make of documents."""
    return -(-with_longest(lengths, max_sequence, overlong) // pad_each_to) * pad_each_to


def recomputed_capacity(
    cost_model: CostModel, max_tokens_per_rank: int | None, recompute: bool, max_recomputed_tokens_per_rank: int | None
) -> int | None:
    """What a rank holds of a recomputed micro-batch under ``capacity_options``; None where none may be.

    Raises
    ------
    FlexSPError
        If it is neither given nor in the cost model.
    """
    given = max_recomputed_tokens_per_rank
    if not recompute:
        if given is not None:
            raise FlexSPError("--max-recomputed-tokens-per-rank needs --recompute", "add it, or take the capacity out")
        return None
    if given is None and max_tokens_per_rank is not None:
        given = cost_model.scaled_recomputed_capacity(max_tokens_per_rank)
    if given is None and cost_model.recomputed_activation_bytes_per_token == 0:
        raise FlexSPError(
            "--recompute: the cost model has no recomputed_activation_bytes_per_token, so the capacity is unknown",
            "give --max-recomputed-tokens-per-rank",
        )
    return cost_model.recomputed_token_capacity if given is None else given


def opened(output: Path | None) -> IO[str] | nullcontext[None]:
    """The file of ``--output``, or nothing."""
    if output is None:
        return nullcontext()
    try:
        return output.open("w", encoding="utf-8")
    except OSError as error:
        raise FlexSPError(f"--output {output}: cannot write ({error.strerror})", "give another path") from None
