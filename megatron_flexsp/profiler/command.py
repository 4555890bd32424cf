"""``flexsp profile``: starts the job's own launcher on this machine so that it measures instead of training."""

import os
import shlex
import sys
from pathlib import Path

import click

from megatron_flexsp.profiler.record import check_writable


@click.command(
    name="profile",
    # What follows the first name belongs to the script, whatever it looks like.
    context_settings={"allow_interspersed_args": False},
    epilog="On several nodes, or under a launcher of your own, add --flexsp-profile OUT.json to the command that "
    "starts the training: torchrun ... -m megatron_flexsp.run pretrain_gpt.py ... --flexsp-profile OUT.json",
)
@click.argument("output", metavar="OUT.json", type=click.Path(dir_okay=False))
@click.option("--nproc-per-node", default=1, show_default=True, type=click.IntRange(min=1), help="Ranks to start here.")
@click.option("--cpu", is_flag=True, help="Without a GPU, over gloo.")
@click.option("--print", "only_prints", is_flag=True, help="Show the command instead of running it.")
@click.argument("script", metavar="PRETRAIN_SCRIPT", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[MEGATRON ARGUMENTS]...")
def profile(
    output: str, nproc_per_node: int, cpu: bool, only_prints: bool, script: str, arguments: tuple[str, ...]
) -> None:
    """Measure a Megatron job on this machine and write its cost model to OUT.json.

    Runs steps of the job's own model, with its own options, instead of training it. Then use the file:
    --flexsp-cost-model OUT.json in training, --cost-model OUT.json here.

    \b
    flexsp profile --nproc-per-node 8 OUT.json pretrain_gpt.py <the job's Megatron arguments>
    """
    output = str(Path(output).absolute())
    check_writable(output)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc_per_node}"),
        *("-m", "megatron_flexsp.run", *(["--cpu"] if cpu else []), script),
        *(*arguments, "--flexsp-profile", output),
    ]
    if only_prints:
        click.echo(shlex.join(command))
        return
    sys.stdout.flush()
    os.execv(command[0], command)
