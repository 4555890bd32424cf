"""A plain list of arguments, on one line or on many, with or without backslashes at their ends, with comments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_flexsp.convert.arguments import Job
from megatron_flexsp.convert.result import Result, Unconvertible
from megatron_flexsp.convert.rules import Wishes, decide
from megatron_flexsp.convert.shell import Command
from megatron_flexsp.convert.shell_edits import ScriptEdits
from megatron_flexsp.convert.shell_expand import Scope, expand_array
from megatron_flexsp.convert.shell_launch import CommandText, Launch, read_arguments
from megatron_flexsp.convert.shell_source import Source
from megatron_flexsp.convert.shell_values import words
from megatron_flexsp.convert.text import Edit, apply
from megatron_flexsp.errors import FlexSPError

_BEFORE = b"A=(\n"
"""Makes the list a shell array, whose elements it is written like."""


def convert_plain(data: bytes, path: Path, wishes: Wishes) -> Result:
    """An argument list's FlexSP version; the same contract as that of the other front ends."""
    return convert_list(data, wishes)


def convert_list(
    data: bytes, wishes: Wishes, lines: Mapping[int, int] | None = None, begin: int | None = None
) -> Result:
    """The same, of a list whose lines came from those of another file; new flags go to ``begin``, a line's start."""
    launch = read_list(data, lines)
    decision = decide(launch.job, wishes)
    if decision.problems:
        raise Unconvertible(decision.problems)
    try:
        place = None if begin is None else len(_BEFORE) + begin
        edits = ListEdits(launch, _BEFORE + data, place).edits(decision.changes)
    except FlexSPError as error:
        raise Unconvertible([str(error)]) from None
    converted = apply(_BEFORE + data, edits)
    return Result(converted[len(_BEFORE) :], [change.why for change in decision.changes], decision.notes)


def read_list(data: bytes, lines: Mapping[int, int] | None = None) -> Launch:
    """The arguments as a job that something else starts."""
    origins = lines or {}
    whole = _BEFORE + data
    source = Source(whole + b"\n)\n")
    arrays = [node for node in _nodes(source.tree.root_node) if node.type == "array"]
    if source.tree.root_node.has_error or not arrays:
        raise FlexSPError("the file is no list of arguments: it can't be read as words with white space between")
    elements = expand_array(source, arrays[0], Scope()).elements
    listed = tuple(word for element in elements for word in words(element.value))
    text = CommandText(listed, whole)
    arguments, unseen = read_arguments(text, 0, 1)
    shifted = tuple(replace(argument, line=origins.get(argument.line - 1, argument.line - 1)) for argument in arguments)
    job = Job(shifted, line=1, script=None, launched=True, unseen=tuple(unseen))
    return Launch(job, Command(listed, (), 1, {}), 0, text)


class ListEdits(ScriptEdits):
    """The edits of a list, whose new flags stand before its first, or on a line of their own at ``begin``."""

    def __init__(self, launch: Launch, data: bytes, begin: int | None = None) -> None:
        super().__init__(launch, data)
        self._begin = begin

    def _put_flags(self, flags: str) -> None:
        if self._begin is not None:
            self._edits.append(Edit(self._begin, self._begin, flags.encode() + b"\n"))
            return
        first = self._own(0, "the first argument")
        before = self._data[self._data.rfind(b"\n", 0, first.start) + 1 : first.start]
        rest = self._data[first.start : self._data.find(b"\n", first.start)]
        several = b"\n" in self._data[first.start :].rstrip()
        if not several or before.strip():
            new = f"{flags} ".encode()
        else:
            mark = b" \\" if rest.rstrip().endswith(b"\\") else b""
            new = flags.encode() + mark + b"\n" + before
        self._edits.append(Edit(first.start, first.start, new))


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in node.children:
        yield from _nodes(child)
