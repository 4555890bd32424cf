"""``flexsp report``: a trace or a file of plans becomes a page, pictures, or a Chrome trace."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.report.chrome_trace import write_chrome_trace
from megatron_flexsp.report.trace import from_plans
from megatron_flexsp.report.trace_files import read_trace


@click.command(name="report")
@click.argument("source", metavar="TRACE", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--output",
    default=Path("flexsp_report.html"),
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The page to write.",
)
@click.option("--step", type=int, help="The step whose timeline shows first; default: the one of median time.")
@click.option("--strategy", help="Of a file that compares several: the one to show; default: the fastest.")
@click.option("--chrome-trace", type=click.Path(dir_okay=False, path_type=Path), help="Also write this for Perfetto.")
@click.option("--png", type=click.Path(file_okay=False, path_type=Path), help="Also write PNGs into this folder.")
def report_command(
    source: Path, output: Path, step: int | None, strategy: str | None, chrome_trace: Path | None, png: Path | None
) -> None:
    """Show what happened in a run: TRACE is the folder that was its --flexsp-trace, or a file that flexsp plan or
    flexsp simulate wrote with --output.

    \b
    flexsp report runs/trace --output report.html
    """
    if source.is_dir() and strategy is not None:
        raise FlexSPError(f"--strategy chooses among the plans of a file; {source} is the trace of a run")
    trace = read_trace(source) if source.is_dir() else from_plans(source, strategy)
    for note in trace.notes:
        click.echo(f"note: {note}", err=True)
    try:
        from megatron_flexsp.report.page import write_page

        if png is not None:
            from megatron_flexsp.report.images import write_images
    except ModuleNotFoundError as error:
        raise FlexSPError(f"flexsp report draws with {error.name}: pip install 'megatron-flexsp[report]'") from None
    written = [output]
    try:
        write_page(trace, output, step)
        if chrome_trace is not None:
            write_chrome_trace(trace, chrome_trace)
            written.append(chrome_trace)
        if png is not None:
            written += write_images(trace, png, step)
    except OSError as error:
        raise FlexSPError(f"{error.filename}: cannot write ({error.strerror})") from None
    for path in written:
        click.echo(f"wrote {path}")
