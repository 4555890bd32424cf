"""``flexsp convert``: reads a launch script, a YAML file or an argument list, and writes its FlexSP version."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import click
import numpy as np

from megatron_flexsp.convert.convert import convert_file
from megatron_flexsp.convert.result import Unconvertible
from megatron_flexsp.convert.rules import Wishes
from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.batches import with_longest
from megatron_flexsp.simulator.document_lengths import read_document_lengths


@click.command()
@click.argument("path", metavar="INPUT", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write here instead of printing.")
@click.option("--diff", is_flag=True, help="Print a unified diff instead of the whole file.")
@click.option("--check", is_flag=True, help="Only say whether it would work.")
@click.option(
    "--mean-length",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Tokens of a document on average: scales the global batch so that a step keeps its tokens.",
)
@click.option(
    "--data-path",
    metavar="PREFIX",
    help="Take the average from this Megatron data set's index, as --seq-length splits its documents.",
)
def convert(
    path: Path, output: Path | None, diff: bool, check: bool, mean_length: int | None, data_path: str | None
) -> None:
    """Make INPUT, a Megatron launch of static groups, one of FlexSP.

    INPUT is a bash script (.sh, sbatch), a YAML file with a map or list of Megatron's arguments or with such a script
    in it, a plain list of arguments, or a file for --yaml-cfg, which becomes such a list. It is read, never run, and
    keeps its order, comments and quoting. The converted text goes to --output or is printed; why each change was made
    goes to stderr. What FlexSP can't be combined with is named, and then nothing is written and the exit code is 2.

    \b
    flexsp convert train.sh --diff
    flexsp convert train.sh --output train_flexsp.sh --data-path data/my_text_document
    flexsp convert recipe.yaml --check
    """
    if mean_length is not None and data_path is not None:
        raise click.UsageError("--mean-length and --data-path say the same thing: give one.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FlexSPError(f"{path}: cannot read ({error.strerror})") from None
    try:
        result = convert_file(data, path, Wishes(mean_length, _mean_of(data_path)))
    except Unconvertible as refusal:
        click.echo(f"flexsp: {path} can't be converted; nothing is written", err=True)
        for problem in refusal.problems:
            click.echo(f"  - {problem}", err=True)
        sys.exit(2)
    if result.as_list and output is not None and output.suffix in (".yaml", ".yml"):
        raise FlexSPError(f"--output {output}: a list of arguments is no YAML; call it {output.with_suffix('.txt')}")
    _explain(path, result.reasons, result.notes)
    if check:
        return
    if output is not None:
        _write(output, result.data, path)
    if diff:
        click.echo(_diff(data, result.data, path, output), nl=False)
    elif output is None:
        sys.stdout.buffer.write(result.data)
        sys.stdout.buffer.flush()


def _mean_of(prefix: str | None) -> _Mean | None:
    return None if prefix is None else _Mean(prefix)


class _Mean:
    """The mean length of a data set's sequences, once it is known how long they may be."""

    def __init__(self, prefix: str) -> None:
        self._lengths = read_document_lengths(prefix)
        if not len(self._lengths):
            raise FlexSPError(f"--data-path {prefix}: it has no documents of more than one token")

    def __call__(self, longest: int | None) -> int:
        return max(1, round(float(np.mean(with_longest(self._lengths, longest, "split")))))


def _explain(path: Path, reasons: list[str], notes: list[str]) -> None:
    if not reasons:
        click.echo(f"flexsp: {path}: nothing to change, it is a FlexSP job already", err=True)
    for reason in reasons:
        click.echo(f"  {reason}", err=True)
    for note in notes:
        click.echo(f"  note: {note}", err=True)


def _write(output: Path, data: bytes, path: Path) -> None:
    try:
        output.write_bytes(data)
        output.chmod(path.stat().st_mode)
    except OSError as error:
        raise FlexSPError(f"--output {output}: cannot write ({error.strerror})") from None


def _diff(before: bytes, after: bytes, path: Path, output: Path | None) -> str:
    lines = difflib.unified_diff(
        before.decode("utf-8", "replace").splitlines(keepends=True),
        after.decode("utf-8", "replace").splitlines(keepends=True),
        str(path),
        str(output or path),
    )
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
