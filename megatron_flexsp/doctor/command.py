"""``flexsp doctor``: what would go wrong, in seconds and before a job is queued."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_flexsp.doctor.command_line import JobCommand, parse_command
from megatron_flexsp.doctor.devices import Gpu, examine_devices, find_gpus
from megatron_flexsp.doctor.environment import examine_environment
from megatron_flexsp.doctor.findings import Finding, as_json, error, exit_code, without_secrets
from megatron_flexsp.doctor.inside import Request
from megatron_flexsp.doctor.process import Inside
from megatron_flexsp.errors import FlexSPError

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_ASSUMED_GIB = 80.0


@click.command(name="doctor", context_settings={"allow_interspersed_args": False})
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes of the job.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), help="Ranks on each node; default: the GPUs here.")
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks of the job, instead of the two.")
@click.option("--gpu-memory-gib", type=click.FloatRange(min=0, min_open=True), help="Of a GPU, where none is here.")
@click.option("--cpu", is_flag=True, help="The job runs without a GPU, over gloo.")
@click.option("--json", "prints_json", is_flag=True, help="Print one JSON object.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- JOB'S ARGUMENTS]")
def doctor_command(
    nodes: int | None,
    gpus_per_node: int | None,
    ranks: int | None,
    gpu_memory_gib: float | None,
    cpu: bool,
    prints_json: bool,
    command: tuple[str, ...],
) -> None:
    """Examine this installation, and with a job's arguments what FlexSP would do with them. Starts nothing.

    The arguments are those of pretrain_gpt.py; the script and the launcher may stand in front of them. Works on a
    login node: say how many ranks the job has. Exit code 1 if anything is an error.

    \b
    flexsp doctor
    flexsp doctor --nodes 8 --gpus-per-node 8 -- pretrain_gpt.py <the job's arguments> --flexsp
    """
    job = parse_command(command)
    cpu = cpu or job.cpu
    gpus = [] if cpu else find_gpus()
    if ranks is not None and (nodes is not None or gpus_per_node is not None):
        raise FlexSPError("--ranks takes the place of --nodes and --gpus-per-node", "give one or the other")
    request = _request(job, bool(command), cpu, gpus, nodes, gpus_per_node, ranks, gpu_memory_gib)
    is_login_node = not gpus and request.world_size is not None
    with Inside(request) as inside:
        findings = [*examine_environment(cpu=cpu), *examine_devices(gpus, cpu=cpu, is_login_node=is_login_node)]
        findings += _examine_ranks(request, gpus)
        findings += inside.findings()
    if any(item.check == "torch" and item.status == "error" for item in findings):
        findings = [item for item in findings if item.check != "import-torch"]  # once is enough
    findings = without_secrets(findings, command)
    if prints_json:
        click.echo(json.dumps(as_json(findings), indent=2))
    else:
        _show(findings)
    click.get_current_context().exit(exit_code(findings))


def _request(
    job: JobCommand,
    has_job: bool,
    cpu: bool,
    gpus: Sequence[Gpu],
    nodes: int | None,
    gpus_per_node: int | None,
    ranks: int | None,
    gpu_memory_gib: float | None,
) -> Request:
    """What the options, the job's own launcher and this machine say, in this order."""
    per_node = gpus_per_node or job.ranks_per_node or len(gpus) or None
    if ranks is None:
        if (nodes or job.nodes or job.ranks) is None:
            ranks = per_node
        elif nodes is None and job.ranks is not None:
            ranks = job.ranks
        elif per_node is not None:
            ranks = (nodes or job.nodes or 1) * per_node
    memory = _ASSUMED_GIB * 2**30
    if gpu_memory_gib is not None:
        memory = gpu_memory_gib * 2**30
    elif gpus:
        memory = min(gpu.memory_bytes for gpu in gpus)
    return Request(
        words=job.arguments if has_job else None,
        script=job.script,
        cpu=cpu,
        world_size=ranks,
        ranks_per_node=per_node or 8,
        gpu_capability=gpus[0].capability if gpus else (9, 0),
        gpu_memory_bytes=int(memory),
        gpu_is_assumed=not gpus and gpu_memory_gib is None,
        gpu_name=gpus[0].name if gpus else None,
        variables=dict(job.variables),
    )


def _examine_ranks(request: Request, gpus: Sequence[Gpu]) -> list[Finding]:
    """More ranks on a node than it has GPUs."""
    if request.words is None or not gpus or request.cpu or request.ranks_per_node <= len(gpus):
        return []
    found = f"{request.ranks_per_node} ranks on a node, {len(gpus)} GPUs on this one"
    return [error("ranks", found, "start one rank for each GPU, or run the doctor on a node like the job's")]


def _show(findings: Sequence[Finding]) -> None:
    """A table on a terminal, a line for each finding elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for item in findings:
            click.echo(
                f"{item.status:<8} {item.check:<18} {item.found}" + (f" -> {item.remedy}" if item.remedy else "")
            )
        click.echo(_total(findings))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in findings:
        text = Text(item.found)
        if item.remedy:
            text.append(f"\n→ {item.remedy}", style="bold")
        table.add_row(Text(item.status, style=_COLOURS[item.status]), item.check, text)
    console.print(table)
    console.print(_total(findings))


def _total(findings: Sequence[Finding]) -> str:
    counts = {status: sum(item.status == status for item in findings) for status in ("error", "warning", "ok")}
    plural = {status: "" if count == 1 else "s" for status, count in counts.items()}
    return (
        f"{counts['error']} error{plural['error']}, {counts['warning']} warning{plural['warning']}, {counts['ok']} ok"
    )
