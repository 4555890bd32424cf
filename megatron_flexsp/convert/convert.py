"""From a file to its FlexSP version: finds out what kind of file it is, converts it, and checks the outcome."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_flexsp.convert import plain, shell_script, yaml_file
from megatron_flexsp.convert.result import Result, Unconvertible
from megatron_flexsp.convert.rules import Wishes
from megatron_flexsp.errors import FlexSPError

FrontEnd = Callable[[bytes, Path, Wishes], Result]


def convert_file(data: bytes, path: Path, wishes: Wishes) -> Result:
    """A file's FlexSP version; a second conversion of it changes nothing.

    Raises
    ------
    Unconvertible
        With every reason why it can't be converted.
    FlexSPError
        If it can't be read as what it is.
    """
    if b"\0" in data:
        raise FlexSPError(f"{path}: it is no text file")
    front_end = _front_end(data, path)
    result = front_end(data, path, wishes)
    if result.data != data:
        _check(plain.convert_plain if result.as_list else front_end, result, path, wishes)
    return result


def _front_end(data: bytes, path: Path) -> FrontEnd:
    if path.suffix in (".yaml", ".yml"):
        return yaml_file.convert_yaml
    lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines()]
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if re.match(r"[\"']?--?[A-Za-z]", first):
        return plain.convert_plain
    return shell_script.convert_script


def _check(front_end: FrontEnd, result: Result, path: Path, wishes: Wishes) -> None:
    """Convert the outcome again: if that would change or refuse something, the first conversion went wrong."""
    try:
        again = front_end(result.data, path, wishes)
    except Unconvertible as refusal:
        raise Unconvertible(
            [f"converted, it would still be refused: {problem}" for problem in refusal.problems]
        ) from None
    if again.data != result.data:
        raise Unconvertible(
            [f"converted, it would still have to change, which is a mistake here: {reason}" for reason in again.reasons]
        )
