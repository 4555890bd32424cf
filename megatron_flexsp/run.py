"""Runs a Megatron training script with FlexSP.

torchrun --nproc-per-node 8 -m megatron_flexsp.run [--cpu] PRETRAIN_SCRIPT <its Megatron arguments> --flexsp
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import time
from collections.abc import Sequence

from megatron_flexsp.errors import FlexSPError

_SECONDS_FOR_RANK_0_TO_SPEAK = 5.0


def main(command_line: Sequence[str] | None = None) -> None:
    """Put the seams in place, then run the script as if it had been started itself."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_flexsp.run",
        description="Runs a Megatron-LM training script; with --flexsp among its arguments, each document gets a "
        "context-parallel group of its own size.",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        default=os.environ.get("FLEXSP_DEVICE") == "cpu",
        help="run all of Megatron without a GPU, over gloo (also by FLEXSP_DEVICE=cpu)",
    )
    parser.add_argument(
        "script", metavar="PRETRAIN_SCRIPT", help="Megatron-LM's pretrain_gpt.py, or scripts/pretrain_gpt.py"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    options = parser.parse_args(command_line)
    try:
        _run(options.cpu, options.script, options.arguments)
    except FlexSPError as error:
        _stop(error)
    except Exception:
        if any(word.startswith("--flexsp") for word in options.arguments):
            # Most likely this rank only lost its connection to one that has something to say.
            _let_rank_0_speak()
        raise


def _run(cpu: bool, script: str, arguments: list[str]) -> None:
    if "--cpu" in arguments:
        raise FlexSPError(f"--cpu belongs before the script: -m megatron_flexsp.run --cpu {script} ...")
    if not os.path.isfile(script):
        raise FlexSPError(f"{script}: no such script; give the path of Megatron-LM's pretrain_gpt.py")
    # What `python SCRIPT ARGUMENTS` would set: a checkout's own megatron package is found first.
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    from megatron_flexsp.megatron import plugin, seams

    seams.check_version()
    if cpu:
        os.environ["FLEXSP_DEVICE"] = "cpu"
        from megatron_flexsp import cpu as cpu_stand_in

        cpu_stand_in.install()
    plugin.install(arguments)
    runpy.run_path(script, run_name="__main__")


def _stop(error: FlexSPError) -> None:
    """End this rank with one message for all ranks of a node.

    Mistakes in flags and files show on every rank at once. The others give the first a moment to speak;
    the launcher then ends them. Where only they have something to say, they still say it.
    """
    _let_rank_0_speak()
    print(f"\nmegatron-flexsp: error: {error}\n", file=sys.stderr, flush=True)
    # Not sys.exit(): a process group's shutdown would wait for ranks that still wait for this one.
    os._exit(2)


def _let_rank_0_speak() -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(_SECONDS_FOR_RANK_0_TO_SPEAK)


if __name__ == "__main__":
    main()
