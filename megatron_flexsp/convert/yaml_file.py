"""YAML files that hold Megatron's arguments: as a map of flags, as a list of words, or as shell text.

Read with ruamel.yaml for what stands where; changed as text, so that everything else keeps its form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flexsp.convert.arguments import Argument, Job, Value, values_taken
from megatron_flexsp.convert.changes import Add, Change, Formula, Launch, Remove, SetValue
from megatron_flexsp.convert.result import Result, Unconvertible
from megatron_flexsp.convert.rules import OTHER_MODELS, Wishes, decide
from megatron_flexsp.convert.shell_script import convert_source
from megatron_flexsp.convert.shell_source import NestedSource
from megatron_flexsp.convert.shell_values import Piece
from megatron_flexsp.convert.text import Edit, Span, apply, line_of, removal
from megatron_flexsp.errors import FlexSPError

_FEWEST_FLAGS = 3
"""Of so many flags a map or list is one of Megatron arguments."""

_NAMES = {
    "seq_length", "num_layers", "hidden_size", "num_attention_heads", "micro_batch_size", "global_batch_size",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "train_iters",
    "train_samples", "lr", "max_position_embeddings",
}  # fmt: skip
"""Megatron's arguments under their Python names, as some recipes have them."""

_GENERATING = {"--num-tokens-to-generate", "--inference-max-requests", "--prompts", "--temperature", "--top_k"}
"""Flags of jobs that generate text."""

_SECTIONS = {"language_model", "model_parallel"}
"""What the files for Megatron's ``--yaml-cfg`` are divided into."""


def convert_yaml(data: bytes, path: Path, wishes: Wishes) -> Result:
    """A YAML file's FlexSP version; the same contract as that of the other front ends."""
    root = _composed(data, path)
    if root is not None and root.id == "mapping" and {key.value for key, _ in root.value} >= _SECTIONS:
        raise Unconvertible(
            [
                "a file for --yaml-cfg: Megatron ignores the command line beside it, where FlexSP's flags are, and "
                "starts only with a file that has every one of its release's arguments in it. Give the settings as "
                "flags, then convert the command"
            ]
        )
    reasons: list[str] = []
    notes: dict[str, None] = {}
    problems: list[str] = []
    edits: list[Edit] = []
    found = False
    for node in _nodes(root):
        group = _group(node, root, data)
        if group is None:
            continue
        found = True
        decision = decide(group.job, wishes)
        if not decision.problems:
            try:
                edits += group.edits(decision.changes)
            except FlexSPError as error:
                decision.problems.append(str(error))
        problems += decision.problems
        reasons += [change.why for change in decision.changes]
        notes |= dict.fromkeys(decision.notes)
    for source in _shell_texts(root, data):
        try:
            inner = convert_source(source, data, None, wishes)
        except Unconvertible as refusal:
            problems += [problem for problem in refusal.problems if not problem.startswith("nothing to convert")]
            continue
        found = True
        edits += inner.edits
        reasons += inner.reasons
        notes |= dict.fromkeys(inner.notes)
    if problems:
        raise Unconvertible(problems)
    if not found:
        raise Unconvertible(
            ["nothing to convert: no map or list of Megatron's arguments, and no command that starts training"]
        )
    return Result(apply(data, edits), reasons, list(notes), edits)


def _composed(data: bytes, path: Path) -> Any:
    try:
        import ruamel.yaml
    except ImportError:
        raise FlexSPError(
            "reading YAML needs ruamel.yaml, which is not installed: pip install 'megatron-flexsp[convert]'"
        ) from None
    try:
        # As Latin-1 a letter is a byte; its control letters, which YAML has no use for, become question marks.
        text = re.sub(r"[\x80-\x9f]", "?", data.decode("latin-1"))
        return ruamel.yaml.YAML(typ="rt").compose(text)
    except ruamel.yaml.error.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}:" if mark is not None else ""
        raise FlexSPError(f"{path}:{place} it is no YAML ({error.problem})") from None


def _nodes(node: Any) -> Iterator[Any]:
    """All maps and lists, outermost first; an anchor's node once."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if current.id == "mapping":
            yield current
            pending += [value for _, value in current.value]
        elif current.id == "sequence":
            yield current
            pending += current.value


@dataclass(frozen=True)
class _Entry:
    """A flag with its values, and the bytes that it takes in the file."""

    flag: Any
    values: tuple[Any, ...]


def _span(node: Any) -> Span:
    return Span(node.start_mark.index, node.end_mark.index)


def _group(node: Any, root: Any, data: bytes) -> _Arguments | None:
    """A map or list of Megatron arguments; None for anything else."""
    items = [key for key, _ in node.value] if node.id == "mapping" else node.value
    if not all(item.id == "scalar" for item in items):
        return None
    flags = {re.split(r"[=\s]", str(item.value))[0] for item in items if re.match(r"--[A-Za-z]", str(item.value))}
    if flags & _GENERATING and not flags & {"--train-iters", "--train-samples"}:
        return None
    if len(flags) >= _FEWEST_FLAGS:
        return (_Map if node.id == "mapping" else _List)(node, data, _script_near(root))
    names = {str(item.value).replace("-", "_") for item in items} if node.id == "mapping" else set()
    if "seq_length" in names and len(names & _NAMES) > _FEWEST_FLAGS:
        return _NamedMap(node, data, _script_near(root))
    return None


def _script_near(root: Any) -> str | None:
    """A training script that the file names, if it is not GPT's."""
    for node in _nodes(root):
        for value in [value for _, value in node.value] if node.id == "mapping" else node.value:
            match = re.fullmatch(r"\S*?([\w.-]+\.py)", str(value.value)) if value.id == "scalar" else None
            if match and match[1].startswith(("pretrain_", "train_", "finetune_")):
                return match[1]
    return None


class _Arguments:
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
        raise NotImplementedError

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


class _Map(_Arguments):
    """``--flag: value`` for each flag; true for one that takes none."""

    def _read(self) -> Iterator[_Entry]:
        for key, value in self._node.value:
            if str(key.value).startswith("--"):
                yield _Entry(key, (value,))

    def _flag_of(self, key: str) -> str:
        return key

    def _key_of(self, flag: str) -> str:
        return flag

    def _first(self) -> int:
        return int(self._entries[0].flag.start_mark.index)

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
        span = _span(entry.values[0])
        return [Edit(span.start, span.end, " ".join(texts).encode())]

    def _added(self, added: list[tuple[str, str | None]]) -> Edit:
        first = self._first()
        quote = self._data[first : first + 1].decode("latin-1")
        quote = quote if quote in "\"'" else ""
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


class _NamedMap(_Map):
    """``micro_batch_size: 4`` or ``micro-batch-size: 4`` for each argument."""

    def _read(self) -> Iterator[_Entry]:
        for key, value in self._node.value:
            yield _Entry(key, (value,))

    def _flag_of(self, key: str) -> str:
        return "--" + key.replace("_", "-")

    def _key_of(self, flag: str) -> str:
        underscores = any("_" in str(entry.flag.value) for entry in self._entries)
        return flag[2:].replace("-", "_") if underscores else flag[2:]


def _scalar(value: str | None) -> str:
    if value is None:
        return "true"
    return f'"{value}"' if "," in value else value


class _List(_Arguments):
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

    def _first(self) -> int:
        return int(self._entries[0].flag.start_mark.index)

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
        span = _span(node)
        quote = self._data[span.start : span.start + 1].decode("latin-1")
        quote = quote if quote in "\"'" else ""
        return Edit(span.start, span.end, f"{quote}{text}{quote}".encode())

    def _added(self, added: list[tuple[str, str | None]]) -> Edit:
        first = self._first()
        quote = self._data[first : first + 1].decode("latin-1")
        quote = quote if quote in "\"'" else ""
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


def _shell_texts(root: Any, data: bytes) -> Iterator[NestedSource]:
    """Shell text in the file that may start training."""
    for node in _nodes(root):
        for value in [value for _, value in node.value] if node.id == "mapping" else node.value:
            if value.id != "scalar" or not re.search(r"\S\.py(\s|$)|torchrun", str(value.value)):
                continue
            parts = _text_parts(value, data)
            if parts:
                yield NestedSource(parts, line_of(data, value.start_mark.index))


def _text_parts(node: Any, data: bytes) -> list[Piece]:
    """A scalar's text as pieces of the file; none where the file puts it in a way that isn't understood."""
    span = _span(node)
    text = data[span.start : span.end].decode("latin-1")
    if node.style in ("|", ">"):
        header = re.match(r"[|>][^\n]*\n", text)
        if header is None:
            return []
        lines = text[header.end() :].splitlines(keepends=True)
        indents = [len(line) - len(line.lstrip(" ")) for line in lines if line.strip()]
        depth = min(indents, default=0)
        parts: list[Piece] = []
        position = span.start + header.end()
        for line in lines:
            kept = line[depth:] if line.strip() else "\n"
            start = position + (depth if line.strip() else len(line) - 1)
            if node.style == ">" and kept.endswith("\n"):
                parts.append(Piece(kept[:-1], (Span(start, start + len(kept) - 1),)))
                parts.append(Piece(" ", (), exact=False))
            else:
                parts.append(Piece(kept, (Span(start, start + len(kept)),)))
            position += len(line)
        return parts
    inner = text[1:-1] if node.style in ('"', "'") else text
    if inner != node.value:
        return []
    start = span.start + (1 if node.style in ('"', "'") else 0)
    return [Piece(inner, (Span(start, start + len(inner)),))]
