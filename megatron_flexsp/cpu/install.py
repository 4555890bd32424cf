"""Puts the stand-in for CUDA in place."""

import sys

from megatron_flexsp.cpu import compilation, devices, process_groups, rng, streams  # noqa: F401 (they register)
from megatron_flexsp.cpu.placement import CudaMeansCpu
from megatron_flexsp.cpu.replace import replace_all
from megatron_flexsp.errors import FlexSPError

_mode = CudaMeansCpu()
_installed = False


def install() -> None:
    """Make CUDA mean the CPU, for this process and for good, so that Megatron runs unchanged without a GPU.

    Call it in the main thread, before anything imports Megatron, which takes names from PyTorch as it is imported.
    A second call does nothing.

    Raises
    ------
    FlexSPError
        If Megatron has been imported already.
    """
    global _installed
    if _installed:
        return
    if any(name in sys.modules for name in ("megatron.core", "megatron.training")):
        raise FlexSPError("--cpu comes too late: Megatron is imported already. Call install() before that import.")
    _mode.__enter__()
    replace_all()

    from megatron_flexsp.cpu import megatron_patches  # it imports Megatron

    replace_all()
    megatron_patches.expect_one_generator()
    _installed = True
