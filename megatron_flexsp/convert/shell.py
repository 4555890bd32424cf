"""Goes through a shell script without running it, and finds the commands that start training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_flexsp.convert.shell_expand import expand
from megatron_flexsp.convert.shell_flow import Flow
from megatron_flexsp.convert.shell_source import NestedSource, Source
from megatron_flexsp.convert.shell_values import (
    Break,
    Choice,
    Condition,
    Part,
    Piece,
    Value,
    Variable,
    Word,
    alternatives,
    likely,
    words,
)
from megatron_flexsp.convert.text import MAIN_FILE

_DEEPEST = 12
"""How deep functions, sourced files and nested shells may stand in each other."""

_PRINTING = ("echo", "printf", "logger", "log", "info")

_SCRIPT_IN_TEXT = re.compile(r"\S\.py(\s|$)|torchrun|torch\.distributed|deepspeed")


@dataclass(frozen=True)
class Command:
    """A simple command that a script runs."""

    words: tuple[Word, ...]
    conditions: tuple[Condition, ...]
    line: int
    variables: dict[str, Variable] = field(compare=False)
    """What the variables held when it ran."""


@dataclass
class Script:
    """What going through a script found."""

    commands: list[Command] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    """Read besides the script itself; a `Span`'s ``file`` is 1 for the first."""
    unread: list[int] = field(default_factory=list)
    """Lines that aren't shell as the parser knows it."""
    directives: str = ""
    """The ``#SBATCH`` lines of the script and of those that it writes."""
    variables: dict[str, Variable] = field(default_factory=dict)
    """What the variables hold at the end."""


def read_script(source: Source, path: Path | None = None) -> Script:
    """Go through a script; files that it sources are looked for beside ``path`` and read as well."""
    reader = _Reader(path)
    reader.run_source(source)
    reader.script.variables = dict(reader._scope.variables)
    reader.run_uncalled()
    return reader.script


class _Reader(Flow):
    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self.script = Script()
        self._path = path
        self._called: set[str] = set()
        self._depth = 0

    def run_source(self, source: Source) -> bool:
        text = source.text(0, len(source.data))
        self.script.directives += "\n".join(re.findall(r"^[ \t]*#SBATCH[^\n]*", text, re.MULTILINE)) + "\n"
        self._set_job_variables()
        for node in _errors(source.tree.root_node):
            self.script.unread.append(source.line(node.start_byte))
        return self._sequence(source, source.tree.root_node)

    def run_uncalled(self) -> None:
        """Functions that nothing calls may be called from outside, by trap or by xargs."""
        for name in [name for name in self._functions if name not in self._called]:
            source, body = self._functions[name]
            self._run(source, body)

    def _set_job_variables(self) -> None:
        """What SLURM sets by a script's own directives."""
        for names, option in (
            (("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), r"(?:--nodes[= ]|-N ?)(\d+)"),
            (("SLURM_NTASKS",), r"(?:--ntasks[= ]|-n ?)(\d+)"),
            (("SLURM_NTASKS_PER_NODE",), r"--ntasks-per-node[= ](\d+)"),
            (("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"), r"(?:--gpus-per-node[= ]|--gres[= ]gpu:)(?:\w+:)?(\d+)"),
        ):
            found = re.findall(rf"#SBATCH\s.*?{option}", self.script.directives)
            for name in names if found else ():
                self._scope.variables.setdefault(name, (Piece(found[-1], (), exact=False, soft=True),))

    # Commands.

    def _command(self, source: Source, node: Any) -> bool:
        nodes = []
        for child in node.named_children:
            if child.type == "variable_assignment":
                continue  # for this command alone
            if child.type in ("heredoc_redirect", "file_redirect", "herestring_redirect"):
                continue
            nodes.append(child)
        line = source.line(node.start_byte)
        parts: list[Part | Break] = []
        for child in nodes:
            parts += [Break(), *expand(source, child, self._scope)]
        # A variable that holds the whole command, and another one under each condition.
        ways = alternatives(parts, _starts_script)
        if len(ways) == 1:
            return self._run_words(words(parts), line)
        outer = self._conditions
        for way, conditions in ways:
            self._conditions = (*outer, *conditions)
            self._run_words(words(way), line)
        self._conditions = outer
        return False

    def _run_words(self, words: list[Word], line: int) -> bool:
        """Run a command after all expansions; whether the script ends there."""
        if not words:
            return False
        name = words[0].text or ""
        if name in ("exit", "return", "exec") and len(words) <= 2 and name != "exec":
            return True
        if name in self._functions and self._depth < _DEEPEST:
            self._call(name, words)
        elif name == "eval":
            self._run_text(_joined(words[1:]), line)
        elif name in ("source", "."):
            self._run_file(words[1:])
        elif name == "shift" and self._scope.positional is not None:
            count = words[1].text if len(words) > 1 else "1"
            self._scope.positional = self._scope.positional[int(count) if count and count.isdigit() else 1 :]
        elif name in ("read", "mapfile", "readarray"):
            for word in words[1:]:
                if word.text and word.text.isidentifier():
                    self._scope.variables[word.text] = (Piece(None, ()),)
        elif name not in _PRINTING:
            self._record(words, line)
        return False

    def _record(self, words: list[Word], line: int) -> None:
        nested = [
            word
            for place, word in enumerate(words)
            if (place and re.fullmatch(r"-[a-z]*c", words[place - 1].pattern) and "$" in word.pattern)
            or (re.search(r"\s", word.pattern.strip()) and _SCRIPT_IN_TEXT.search(word.pattern))
        ]
        for word in nested:
            self._run_text(_without_option(word.parts), line)
        if not nested:
            self.script.commands.append(
                Command(tuple(words), self._conditions, line, dict(self._scope.variables)),
            )

    def _call(self, name: str, words: Sequence[Word]) -> None:
        source, body = self._functions[name]
        self._called.add(name)
        before = self._scope.positional
        self._scope.positional = tuple(words[1:])
        self._depth += 1
        self._run(source, body)
        self._depth -= 1
        self._scope.positional = before

    def _run_text(self, parts: Sequence[Part], line: int) -> None:
        """Shell text that the script hands on: to ``eval``, to another shell, into a file."""
        pattern = "".join("\0" if isinstance(part, Choice) or part.text is None else part.text for part in parts)
        # What it puts together may name the training script by a variable that another shell expands.
        if self._depth >= _DEEPEST or not (_SCRIPT_IN_TEXT.search(pattern) or "$" in pattern):
            return
        self._depth += 1
        outer = self._conditions
        for way, conditions in alternatives(parts, _starts_script):
            self._conditions = (*outer, *conditions)
            self.run_source(NestedSource([part for part in way if not isinstance(part, Break)], line))
        self._conditions = outer
        self._depth -= 1

    def _run_file(self, words: Sequence[Word]) -> None:
        """A file that is sourced: its variables count, and its text stays as it is."""
        if not words or self._path is None or self._depth >= _DEEPEST:
            return
        name = words[0].pattern
        if "\0" in name:  # $(dirname "$0")/common.sh and the like
            name = name[name.rindex("\0") + 1 :].lstrip("/")
        path = self._path.parent / name
        if not name or not path.is_file():
            return
        self.script.files.append(path)
        self._depth += 1
        self.run_source(Source(path.read_bytes(), file=MAIN_FILE + len(self.script.files)))
        self._depth -= 1


def _without_option(parts: Value) -> Value:
    """The command in ``--wrap=command``."""
    first = parts[0]
    match = re.match(r"--[a-z-]+=", first.text or "") if isinstance(first, Piece) else None
    if match is None or not isinstance(first, Piece):
        return parts
    return (first.cut(match.end(), len(first.text or "")), *parts[1:])


def _starts_script(value: Value) -> bool:
    """Whether a value has the beginning of a training command in it."""
    inner = [option.value for part in value if isinstance(part, Choice) for option in part.options]
    pattern = "".join("\0" if piece.text is None else piece.text for piece in likely(value))
    return _SCRIPT_IN_TEXT.search(pattern) is not None or any(map(_starts_script, inner))


def _joined(words: Sequence[Word]) -> Value:
    parts: list[Part] = []
    for word in words:
        parts += [*([Piece(" ", (), exact=False)] if parts else []), *word.parts]
    return tuple(parts)


def _errors(node: Any) -> list[Any]:
    if not node.has_error:
        return []
    if node.type == "ERROR" or node.is_missing:
        return [node]
    return [error for child in node.children for error in _errors(child)]
