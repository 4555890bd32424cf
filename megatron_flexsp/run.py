"""Runs a Megatron training script with FlexSP.

torchrun --nproc-per-node 8 -m megatron_flexsp.run [--cpu] PRETRAIN_SCRIPT <its Megatron arguments> --flexsp

A fork's own script does without this launcher: the lines that ``patches/apply.py`` puts into it call
``install_in_script``.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from megatron_flexsp.errors import FlexSPError

_SECONDS_FOR_RANK_0_TO_SPEAK = 5.0

_in_place = False


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
        if any(word.startswith("--flexsp") or word.split("=")[-1] == "flexsp" for word in options.arguments):
            # Most likely this rank only lost its connection to one that has something to say.
            _let_rank_0_speak()
        raise


def _run(cpu: bool, script: str, arguments: list[str]) -> None:
    if "--cpu" in arguments:
        raise FlexSPError("--cpu stands after the script", f"put it before: -m megatron_flexsp.run --cpu {script} ...")
    if not os.path.isfile(script):
        raise FlexSPError(f"{script}: no such script", "give the path of Megatron-LM's pretrain_gpt.py")
    # What `python SCRIPT ARGUMENTS` would set: a checkout's own megatron package is found first.
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    # A patched script calls the module that it imports, which is not the one that runs as __main__.
    from megatron_flexsp.run import install

    install(arguments, cpu=cpu)
    runpy.run_path(script, run_name="__main__")


def install(arguments: Sequence[str], *, cpu: bool) -> None:
    """Put the stand-in for CUDA in place if it is wanted, and the seams. A second call does nothing.

    Raises
    ------
    FlexSPError
        If Megatron or the solver is not there, or Megatron is too old or has something else in a place that is to be
        changed.
    """
    global _in_place
    if _in_place:
        return
    try:
        from megatron_flexsp.megatron import plugin, seams
    except ModuleNotFoundError as error:
        if error.name != "highspy":
            raise
        raise FlexSPError(
            f"the planner needs highspy, and {sys.executable} has none", "install it: pip install highspy"
        ) from None

    seams.check_version()
    if cpu:
        os.environ["FLEXSP_DEVICE"] = "cpu"
        from megatron_flexsp import cpu as cpu_stand_in

        cpu_stand_in.install()
    plugin.install(arguments)
    _in_place = True


def install_in_script() -> None:
    """What a patched training script calls, before it imports Megatron, where ``--flexsp`` is on its command line."""
    if _in_place:
        return  # the launcher runs the script
    sys.excepthook = _report
    if hasattr(sys.modules["__main__"], "pretrain"):
        raise FlexSPError(
            f"{sys.argv[0]}: it imports pretrain before the lines of megatron-flexsp, and so not what they put in "
            "its place. Move them up, to where patches/apply.py puts them"
        )
    install(sys.argv[1:], cpu=os.environ.get("FLEXSP_DEVICE") == "cpu")


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """End a patched script as the launcher ends: with one message where it is a user's mistake."""
    if isinstance(error, FlexSPError):
        _stop(error)
    if isinstance(error, Exception):
        _let_rank_0_speak()
    sys.__excepthook__(kind, error, traceback)


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
