"""``flexsp prepare``: makes a data set, shows its progress, and prints the lengths of its documents."""

import shlex
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_flexsp.prepare.dataset import MEGATRON_TOKENIZER_ARGUMENTS, DatasetSummary, write_dataset
from megatron_flexsp.prepare.sources import JsonLines, Source, StandardLibrary


@click.command()
@click.option("--stdlib", "kind", flag_value="stdlib", help="Take the source files of Python's standard library.")
@click.option("--jsonl", "kind", flag_value="jsonl", help="Take FILES, which hold a JSON object on each line.")
@click.option("--json-key", default="text", show_default=True, help="The key that holds a document's text.")
@click.option(
    "--output-prefix",
    required=True,
    type=click.Path(path_type=Path),
    help="Write PREFIX.bin and PREFIX.idx.",
    metavar="PREFIX",
)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def prepare(kind: str | None, json_key: str, output_prefix: Path, files: tuple[Path, ...]) -> None:
    """Make a Megatron data set from text, each document's tokens being its bytes.

    \b
    flexsp prepare --stdlib --output-prefix data/stdlib
    flexsp prepare --jsonl part-1.jsonl part-2.jsonl --output-prefix data/web
    """
    source = _source(kind, json_key, files)
    with _progress_bar() as progress:
        task = progress.add_task("preparing", total=source.total_bytes)
        summary = write_dataset(source, output_prefix, lambda bytes_read: progress.advance(task, bytes_read))
    _print_summary(summary, output_prefix)


def _source(kind: str | None, json_key: str, files: tuple[Path, ...]) -> Source:
    if kind is None:
        raise click.UsageError("Say where the text comes from: --stdlib or --jsonl FILES.")
    if kind == "stdlib":
        if files:
            raise click.UsageError(f"--stdlib takes no files, got {shlex.join(map(str, files))}.")
        return StandardLibrary()
    if not files:
        raise click.UsageError("--jsonl needs at least one file.")
    return JsonLines(files, json_key)


def _progress_bar() -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _print_summary(summary: DatasetSummary, output_prefix: Path) -> None:
    lengths = summary.document_tokens
    percentiles = np.percentile(lengths, [50, 90, 99, 100]).round().astype(int)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{summary.documents:,} documents, {summary.tokens:,} tokens, ", end="")
    console.print(f"{summary.skipped_documents:,} empty documents left out")
    median, ninetieth, ninety_ninth, longest = (f"{length:,}" for length in percentiles)
    console.print(f"tokens a document: median {median}, 90 % {ninetieth}, 99 % {ninety_ninth}, longest {longest}")
    console.print(_length_table(summary))
    console.print("for Megatron: ", end="")
    console.print(shlex.join(["--data-path", str(output_prefix), *MEGATRON_TOKENIZER_ARGUMENTS]), markup=False)


def _length_table(summary: DatasetSummary) -> Table:
    """How many documents, and what part of all tokens, lie within each power of two."""
    lengths = summary.document_tokens
    table = Table("tokens up to", "documents", "share of documents", "share of tokens")
    for column in table.columns:
        column.justify = "right"
    bound = 1 << max(int(np.percentile(lengths, 10)) - 1, 0).bit_length()
    while True:
        within = lengths[lengths <= bound]
        tokens_share = within.sum(dtype=np.int64) / summary.tokens
        table.add_row(f"{bound:,}", f"{len(within):,}", f"{len(within) / summary.documents:.1%}", f"{tokens_share:.1%}")
        if len(within) == summary.documents:
            return table
        bound *= 2
