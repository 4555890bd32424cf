"""A user's file as bytes with places in it, and small changes to it that leave everything else alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAIN_FILE = 0
"""The file that is converted; others are only read."""


@dataclass(frozen=True, order=True)
class Span:
    """Bytes ``start`` up to ``end`` of a file."""

    start: int
    end: int
    file: int = MAIN_FILE


@dataclass(frozen=True, order=True)
class Edit:
    """Replaces bytes ``start`` up to ``end``; inserts where they are equal."""

    start: int
    end: int
    new: bytes


def line_of(data: bytes, position: int) -> int:
    """The line, counted from 1, that a byte stands on."""
    return data.count(b"\n", 0, position) + 1


def apply(data: bytes, edits: Iterable[Edit]) -> bytes:
    """The text with all edits made; the same edit twice is made once.

    Raises
    ------
    ValueError
        If two edits overlap.
    """
    parts = []
    position = 0
    for edit in sorted(set(edits)):
        if edit.start < position:
            raise ValueError(f"two changes overlap on line {line_of(data, edit.start)}")
        parts += [data[position : edit.start], edit.new]
        position = edit.end
    return b"".join([*parts, data[position:]])


def removal(data: bytes, spans: Iterable[Span]) -> list[Edit]:
    """Edits that take words out, with the white space and the line that only they needed.

    A line of which nothing but a continuation mark would be left goes as a whole. Where that was the last line of a
    continued command, the mark of the line before goes too. Comments stay.
    """
    edits: list[Edit] = []
    for start, end in _joined(data, spans):
        line_start = data.rfind(b"\n", 0, start) + 1
        newline = data.find(b"\n", end)
        line_end = len(data) if newline < 0 else newline
        before, after = data[line_start:start], data[end:line_end]
        continued = re.fullmatch(rb"[ \t]*\\\r?", after) is not None
        alone = not before.strip(b" \t")
        if alone and continued:
            edits.append(Edit(line_start, min(line_end + 1, len(data)), b""))
        elif alone and not after.strip():
            last = re.search(rb"\\\r?\n\Z", data[:line_start]) is not None  # of a continued command
            edits.append(Edit(line_start, end if last else min(line_end + 1, len(data)), b""))
        elif alone:
            edits.append(Edit(start, end + len(after) - len(after.lstrip(b" \t")), b""))
        elif after[:1].strip() and before[-1:].strip():
            edits.append(Edit(start, end, b""))  # between quotes
        elif before[-1:].strip():
            # The word opens a string: what follows moves up, a continuation mark stays.
            edits.append(Edit(start, end + len(after) - len(after.lstrip(b" \t")), b""))
        else:
            edits.append(Edit(line_start + len(before.rstrip(b" \t")), end, b""))
    return _merged(data, edits)


def _joined(data: bytes, spans: Iterable[Span]) -> list[tuple[int, int]]:
    """Neighbours that only white space separates, as one."""
    joined: list[tuple[int, int]] = []
    for span in sorted(set(spans)):
        if joined and not data[joined[-1][1] : span.start].strip(b" \t"):
            joined[-1] = (joined[-1][0], max(span.end, joined[-1][1]))
        else:
            joined.append((span.start, span.end))
    return joined


def _merged(data: bytes, edits: list[Edit]) -> list[Edit]:
    """Removals that touch or overlap, as one."""
    merged: list[Edit] = []
    for edit in sorted(edits):
        if merged and edit.start <= merged[-1].end:
            merged[-1] = Edit(merged[-1].start, max(merged[-1].end, edit.end), b"")
        else:
            merged.append(edit)
    return [_without_mark(data, edit) for edit in merged]


def _without_mark(data: bytes, edit: Edit) -> Edit:
    """A removal of a continued command's last lines takes along the mark of the line that is last then."""
    at_line_start = data[: edit.start].endswith(b"\n")
    at_line_end = data[edit.end : edit.end + 1] in (b"", b"\n", b"\r")
    mark = re.search(rb"[ \t]*\\\r?\n\Z", data[: edit.start]) if at_line_start and at_line_end else None
    return edit if mark is None else Edit(mark.start(), edit.end, b"")
