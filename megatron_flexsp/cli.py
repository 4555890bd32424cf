"""The ``flexsp`` command.

Each subcommand lives in its own room, which is imported only when that subcommand runs: ``flexsp --help``
needs neither torch nor Megatron. To add one, write a click command in its room and name it in
``SUBCOMMANDS``.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click

from megatron_flexsp import __version__
from megatron_flexsp.errors import FlexSPError


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand lives, and its line in ``flexsp --help``."""

    module: str
    attribute: str
    summary: str


SUBCOMMANDS = {
    "plan": Subcommand("megatron_flexsp.planner.command", "plan_command", "Plan batches of given lengths."),
    "simulate": Subcommand(
        "megatron_flexsp.simulator.command", "simulate_command", "Foresee what FlexSP brings on given data."
    ),
    "report": Subcommand("megatron_flexsp.report.command", "report_command", "Show what happened in a run."),
    "convert": Subcommand("megatron_flexsp.convert.command", "convert", "Make a Megatron launch script a FlexSP one."),
    "profile": Subcommand("megatron_flexsp.profiler.command", "profile", "Measure a job and write its cost model."),
    "doctor": Subcommand("megatron_flexsp.doctor.command", "doctor_command", "Examine the installation and a job."),
    "prepare": Subcommand("megatron_flexsp.prepare.command", "prepare", "Make a Megatron data set from text."),
}


class LazyGroup(click.Group):
    """A group that imports a subcommand's module only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        subcommand = SUBCOMMANDS.get(cmd_name)
        if subcommand is None:
            return None
        command: click.Command = getattr(importlib.import_module(subcommand.module), subcommand.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, subcommand.summary) for name, subcommand in SUBCOMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megatron-flexsp")
def flexsp() -> None:
    """Plan, measure and train with a context-parallel group for each sequence."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``flexsp``. A user's mistake is one line on stderr and exit code 2."""
    try:
        flexsp.main(args=None if arguments is None else list(arguments), prog_name="flexsp")
    except FlexSPError as error:
        click.echo(f"flexsp: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
