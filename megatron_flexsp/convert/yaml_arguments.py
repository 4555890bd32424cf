"""Megatron's arguments in a YAML file, as a map of flags, a map of names or a list of words, and their changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_flexsp.convert.arguments import Argument, Job, Value, values_taken
from megatron_flexsp.convert.changes import Add, Change, Formula, Launch, Remove, SetValue
from megatron_flexsp.convert.result import Unconvertible
from megatron_flexsp.convert.rules import OTHER_MODELS
from megatron_flexsp.convert.text import Edit, Span, line_of, removal
from megatron_flexsp.errors import FlexSPError


@dataclass(frozen=True)
class _Entry:
    """A flag with its values, and the bytes that it takes in the file."""

    flag: Any
    values: tuple[Any, ...]


def span_of(node: Any) -> Span:
    return Span(node.start_mark.index, node.end_mark.index)


class ArgumentGroup:
    """What maps and lists have in common."""

    def __init__(self, node: Any, data: bytes, script: str | None) -> None:
        self._node = node
        self._data = data
        self._entries = list(self._read())
        arguments = tuple(self._argument(number, entry) for number, entry in enumerate(self._entries))
        self.job = Job(
            tuple(argument for argument in arguments if argument is not None),
            line=self._line(node),
            script=None,
            launched=True,
        )
        if script is not None and set(re.split(r"[^a-z0-9]+", script)) & set(OTHER_MODELS):
            raise Unconvertible([f"{script} doesn't train a GPT: FlexSP runs GPT's forward step on documents"])

    def _read(self) -> Iterator[_Entry]:
        raise NotImplementedError

    def _argument(self, number: int, entry: _Entry) -> Argument | None:
        raise NotImplementedError

    def _line(self, node: Any) -> int:
        return line_of(self._data, node.start_mark.index)

    def _flow(self) -> bool:
        return bool(self._node.flow_style)

    def _indent(self) -> bytes:
        """What stands before the first entry on its line, as blanks."""
        first = self._first()
        return b" " * (first - self._data.rfind(b"\n", 0, first) - 1)

    def _first(self) -> int:
        """Where the first entry begins."""
        return int(self._entries[0].flag.start_mark.index)

    def _quote_at(self, place: int) -> str:
        """The quotes that a scalar which begins there is in."""
        quote = self._data[place : place + 1].decode("latin-1")
        return quote if quote in "\"'" else ""

    def _value(self, text: str, place: int) -> Value:
        known = "${" not in text and "{{" not in text and not text.startswith("$")
        return Value(text if known else None, text, known, place)

    def _number(self, formula: Formula) -> str:
        if formula.text is None:
            unknown = next((value.source for value in formula.operands if value.text is None), "a value")
            raise FlexSPError(
                f"line {self.job.line}: {formula.meaning or 'a number'} can't be worked out, since {unknown} stands "
                "for something that this file doesn't say. Put a number there, then convert again"
            )
        return formula.text

    def edits(self, changes: Iterable[Change]) -> list[Edit]:
        edits: list[Edit] = []
        added: list[tuple[str, str | None]] = []
        removed: list[_Entry] = []
        for change in changes:
            match change:
                case Add(flag=flag, value=value):
                    added.append((flag, None if value is None else self._number(value)))
                case Remove(argument=argument):
                    assert isinstance(argument.place, int)
                    removed.append(self._entries[argument.place])
                case SetValue(argument=argument, values=values):
                    assert isinstance(argument.place, int)
                    edits += self._set(self._entries[argument.place], argument, [self._number(one) for one in values])
                case Launch():
                    pass
        if added:
            edits.append(self._added(added))
        return [*edits, *self._removals(removed)]

    def _set(self, entry: _Entry, argument: Argument, texts: list[str]) -> list[Edit]:
        raise NotImplementedError

    def _added(self, added: list[tuple[str, str | None]]) -> Edit:
        raise NotImplementedError

    def _removals(self, removed: list[_Entry]) -> list[Edit]:
        edits: list[Edit] = []
        for entry in removed:
            for start, end in self._places(entry):
                if self._flow():
                    after = re.match(rb"[ \t]*,[ \t]*", self._data[end:])
                    before = re.search(rb",\s*\Z", self._data[:start])
                    if after:
                        end += after.end()
                    elif before:
                        start = before.start()
                    edits.append(Edit(start, end, b""))
                else:
                    edits += removal(self._data, [Span(start, end)])
        return edits

    def _places(self, entry: _Entry) -> list[tuple[int, int]]:
        raise NotImplementedError


class ArgumentMap(ArgumentGroup):
    """``--flag: value`` for each flag; true for one that takes none."""

    def _read(self) -> Iterator[_Entry]:
        for key, value in self._node.value:
            if str(key.value).startswith("--"):
                yield _Entry(key, (value,))

    def _flag_of(self, key: str) -> str:
        return key

    def _key_of(self, flag: str) -> str:
        return flag

    def _argument(self, number: int, entry: _Entry) -> Argument | None:
        flag, value = self._flag_of(str(entry.flag.value)), entry.values[0]
        line = self._line(entry.flag)
        if value.id == "sequence":
            return Argument(flag, tuple(self._value(str(v.value), number) for v in value.value), line, (), number)
        text = str(value.value)
        plain = value.id == "scalar" and value.style is None
        if plain and text.lower() == "false":
            return None
        if plain and text.lower() in ("true", "", "null", "~"):
            return Argument(flag, (), line, (), number)
        return Argument(flag, tuple(self._value(word, number) for word in text.split()), line, (), number)

    def _set(self, entry: _Entry, argument: Argument, texts: list[str]) -> list[Edit]:
        span = span_of(entry.values[0])
        return [Edit(span.start, span.end, " ".join(texts).encode())]

    def _added(self, added: list[tuple[str, str | None]]) -> Edit:
        first = self._first()
        quote = self._quote_at(first)
        lines = [
            f"{quote}{self._key_of(flag)}{quote}: {'true' if value is None else _scalar(value)}"
            for flag, value in added
        ]
        between = ", " if self._flow() else f"\n{self._indent().decode()}"
        return Edit(first, first, (between.join(lines) + between).encode())

    def _places(self, entry: _Entry) -> list[tuple[int, int]]:
        value = entry.values[0]
        end = int(value.end_mark.index)
        return [(int(entry.flag.start_mark.index), len(self._data[:end].rstrip()))]


class NamedArgumentMap(ArgumentMap):
    """``micro_batch_size: 4`` or ``micro-batch-size: 4`` for each argument."""

    def _read(self) -> Iterator[_Entry]:
        for key, value in self._node.value:
            yield _Entry(key, (value,))

    def _flag_of(self, key: str) -> str:
        return "--" + key.replace("_", "-")

    def _key_of(self, flag: str) -> str:
        underscores = any("_" in str(entry.flag.value) for entry in self._entries)
        return flag[2:].replace("-", "_") if underscores else flag[2:]


def _scalar(value: str) -> str:
    return f'"{value}"' if "," in value else value


class ArgumentList(ArgumentGroup):
    """A list of words, or of flags with their values."""

    def _read(self) -> Iterator[_Entry]:
        flag: Any = None
        values: list[Any] = []
        for item in self._node.value:
            if re.match(r"--[A-Za-z]", str(item.value)):
                if flag is not None:
                    yield _Entry(flag, tuple(values))
                flag, values = item, []
            elif flag is not None:
                values.append(item)
        if flag is not None:
            yield _Entry(flag, tuple(values))

    def _argument(self, number: int, entry: _Entry) -> Argument:
        text = str(entry.flag.value)
        name = re.split(r"[=\s]", text, maxsplit=1)[0]
        rest = text[len(name) :].lstrip("= \t").split()
        words = [*rest, *(str(value.value) for value in entry.values)][: values_taken(name)]
        return Argument(name, tuple(self._value(word, number) for word in words), self._line(entry.flag), (), number)

    def _set(self, entry: _Entry, argument: Argument, texts: list[str]) -> list[Edit]:
        written = str(entry.flag.value)
        if written != argument.flag:  # the flag and its value are one item
            mark = "=" if written[len(argument.flag)] == "=" else " "
            return [self._replaced(entry.flag, argument.flag + mark + " ".join(texts))]
        return [self._replaced(node, text) for node, text in zip(entry.values, texts, strict=False)]

    def _replaced(self, node: Any, text: str) -> Edit:
        span = span_of(node)
        quote = self._quote_at(span.start)
        return Edit(span.start, span.end, f"{quote}{text}{quote}".encode())

    def _added(self, added: list[tuple[str, str | None]]) -> Edit:
        first = self._first()
        quote = self._quote_at(first)
        together = not any(entry.values for entry in self._entries)
        joined = any("=" in str(entry.flag.value) for entry in self._entries)
        items: list[str] = []
        for flag, value in added:
            if value is None:
                items.append(flag)
            elif together:
                items.append(f"{flag}{'=' if joined else ' '}{value}")
            else:
                items += [flag, value]
        # A bare number would be read as a number, and the first item's quotes say how words are written here.
        written = [f"{quote}{item}{quote}" if quote or not item[0].isdigit() else f'"{item}"' for item in items]
        if self._flow():
            return Edit(first, first, (", ".join(written) + ", ").encode())
        dash = self._data.rfind(b"-", 0, first)
        line = self._data.rfind(b"\n", 0, dash) + 1
        lead = re.sub(rb"[^ \t]", b" ", self._data[line:dash]) + self._data[dash:first]
        return Edit(first, first, ("\n" + lead.decode()).join(written).encode() + b"\n" + lead)

    def _places(self, entry: _Entry) -> list[tuple[int, int]]:
        places = []
        taken = values_taken(str(entry.flag.value))
        for node in (entry.flag, *entry.values[:taken]):
            start, end = int(node.start_mark.index), int(node.end_mark.index)
            if not self._flow():
                start = self._data.rfind(b"-", 0, start)
            places.append((start, end))
        return places
