"""Writes a cost model so that its file is whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel

_FLAG = "--flexsp-profile"


def check_writable(path: str) -> None:
    """Refuse, before anything is measured, a path that the cost model could not be written to."""
    target = Path(path)
    if target.is_dir():
        raise FlexSPError(f"{_FLAG} {path}: this is a folder", f"give the path of a file, such as {path}/x.json")
    folder = target.parent
    if not folder.is_dir():
        raise FlexSPError(f"{_FLAG} {path}: there is no folder {folder}", "make it first")
    try:
        # Not os.access(): it lets root write anywhere, a file system doesn't.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FlexSPError(
            f"{_FLAG} {path}: the folder {folder} can't be written to ({error.strerror})", "give another path"
        ) from None


def write_whole(path: str, cost_model: CostModel) -> None:
    """Write beside the target and rename: whoever interrupts finds the old file or the new one."""
    target = Path(path)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(cost_model.to_json())
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp's file is for its owner alone; this one is for whoever trains.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise FlexSPError(f"{_FLAG} {path}: can't write ({error.strerror})") from None
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
