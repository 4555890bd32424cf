"""Goes through a shell script without running it, and finds the commands that start training.

Every way through is gone: of an ``if`` that the text decides, the other branch counts as unlikely; of one that it
doesn't decide, both as likely. Loops are gone through once, functions where they are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_flexsp.convert.shell_conditions import asks_for_arguments, matches, truth, word_text
from megatron_flexsp.convert.shell_expand import (
    Scope,
    expand_array,
    expand_value,
    expand_words,
    heredoc,
)
from megatron_flexsp.convert.shell_source import NestedSource, Source
from megatron_flexsp.convert.shell_values import (
    Array,
    Choice,
    Condition,
    Element,
    Option,
    Part,
    Piece,
    Value,
    Variable,
    Word,
    merge,
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


def read_script(source: Source, path: Path | None = None) -> Script:
    """Go through a script; files that it sources are looked for beside ``path`` and read as well."""
    reader = _Reader(path)
    reader.run_source(source)
    reader.run_uncalled()
    return reader.script


class _Reader:
    def __init__(self, path: Path | None) -> None:
        self.script = Script()
        self._path = path
        self._scope = Scope()
        self._conditions: tuple[Condition, ...] = ()
        self._functions: dict[str, tuple[Source, Any]] = {}
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

    # Statements. Each returns whether the script ends there.

    def _sequence(self, source: Source, node: Any) -> bool:
        if node.type == "pipeline":
            return any([self._run(source, child) for child in node.named_children][-1:])
        return self._until_end(source, node.named_children)

    def _until_end(self, source: Source, nodes: Sequence[Any]) -> bool:
        return any(self._run(source, node) for node in nodes)

    def _run(self, source: Source, node: Any) -> bool:
        match node.type:
            case "variable_assignment":
                self._assign(source, node)
            case "variable_assignments" | "declaration_command":
                for child in node.named_children:
                    if child.type == "variable_assignment":
                        self._assign(source, child)
            case "command":
                return self._command(source, node)
            case "redirected_statement":
                return self._redirected(source, node)
            case "pipeline" | "program" | "do_group" | "compound_statement" | "else_clause" | "ERROR":
                return self._sequence(source, node)
            case "subshell":
                before = dict(self._scope.variables)
                self._sequence(source, node)
                self._scope.variables = before
            case "negated_command":
                self._sequence(source, node)
            case "list":
                return self._list(source, node)
            case "if_statement":
                return self._if(source, node)
            case "case_statement":
                return self._case(source, node)
            case "while_statement":
                self._while(source, node)
            case "for_statement" | "c_style_for_statement":
                self._for(source, node)
            case "function_definition":
                name = node.child_by_field_name("name")
                self._functions[source.text(name.start_byte, name.end_byte)] = (
                    source,
                    node.child_by_field_name("body"),
                )
            case "unset_command":
                for child in node.named_children:
                    self._scope.variables[source.text(child.start_byte, child.end_byte)] = ()
        return False

    def _assign(self, source: Source, node: Any) -> None:
        name_node, value_node = node.child_by_field_name("name"), node.child_by_field_name("value")
        name = source.text(name_node.start_byte, name_node.end_byte)
        appends = any(child.type == "+=" for child in node.children)
        variables = self._scope.variables
        if name_node.type == "subscript":
            name = name.split("[")[0]
            variables[name] = (Piece(None, ()),)
            return
        new: Variable
        if value_node is None:
            new = ()
        elif value_node.type == "array":
            new = expand_array(source, value_node, self._scope)
        else:
            new = expand_value(source, value_node, self._scope)
        old = variables.get(name, ())
        if appends and isinstance(new, Array):
            elements = old.elements if isinstance(old, Array) else ((Element(old),) if old else ())
            new = Array((*elements, *new.elements))
        elif appends and not isinstance(new, Array) and not isinstance(old, Array):
            new = (*old, *new)
        variables[name] = new

    def _redirected(self, source: Source, node: Any) -> bool:
        body = node.child_by_field_name("body")
        ends = self._run(source, body) if body is not None else False
        for redirect in node.children:
            if redirect.type != "heredoc_redirect":
                continue
            mark = next((child for child in redirect.children if child.type == "heredoc_start"), None)
            text = next((child for child in redirect.children if child.type == "heredoc_body"), None)
            if mark is not None and text is not None:
                quoted = any(letter in source.text(mark.start_byte, mark.end_byte) for letter in "'\"\\")
                self._run_text(heredoc(source, text, self._scope, quoted), source.line(text.start_byte))
            for child in redirect.named_children:
                if child.type in ("command", "pipeline", "list"):
                    self._run(source, child)
        return ends

    def _list(self, source: Source, node: Any) -> bool:
        left, right = node.named_children[0], node.named_children[-1]
        succeeds = truth(source, left, self._scope)
        if self._run(source, left):
            return True
        wanted = not any(child.type == "||" for child in node.children)
        if succeeds is None and left.type not in ("test_command", "list", "negated_command"):
            succeeds = True  # commands are expected to work
        if succeeds is wanted:
            return self._run(source, right)
        condition = self._condition(source, left, succeeds is None, negated=not wanted)
        return self._branches([(condition, lambda: self._run(source, right)), (self._otherwise(condition), _nothing)])

    def _if(self, source: Source, node: Any) -> bool:
        ways: list[tuple[Condition, Callable[[], bool]]] = []
        decided = False

        def add(condition_node: Any, body: Sequence[Any]) -> None:
            nonlocal decided
            holds = truth(source, condition_node, self._scope)
            condition = self._condition(source, condition_node, not decided and holds is not False)
            ways.append((condition, lambda: self._until_end(source, body)))
            decided = decided or holds is True

        add(*_condition_and_body(node))
        for child in node.named_children:
            if child.type == "elif_clause":
                add(*_condition_and_body(child))
        last = next((child for child in node.named_children if child.type == "else_clause"), None)
        line = source.line((last or node).start_byte)
        first = ways[0][0]
        text = "else of " + first.text if last is not None else f"not ({first.text})"
        ways.append(
            (
                Condition(text, line, not decided),
                _nothing if last is None else lambda: self._until_end(source, last.named_children),
            )
        )
        return self._branches(ways)

    def _case(self, source: Source, node: Any) -> bool:
        subject = node.child_by_field_name("value")
        text = word_text(source, subject, self._scope)
        name = source.text(subject.start_byte, subject.end_byte)
        ways: list[tuple[Condition, Callable[[], bool]]] = []
        decided = everything = False
        for item in node.named_children:
            if item.type != "case_item":
                continue
            border = next(place for place, child in enumerate(item.children) if child.type == ")")
            patterns = [child for child in item.children[:border] if child.is_named]
            fits = [matches(source, text, pattern, self._scope) for pattern in patterns]
            holds = True if True in fits else (None if None in fits else False)
            label = source.text(patterns[0].start_byte, patterns[-1].end_byte) if patterns else "*"
            everything = everything or label == "*"
            condition = Condition(
                f"case {name} is {label}", source.line(item.start_byte), not decided and holds is not False
            )
            body = [child for child in item.children[border + 1 :] if child.is_named]
            ways.append((condition, lambda body=body: self._until_end(source, body)))  # type: ignore[misc]
            decided = decided or holds is True
        if not everything:
            ways.append((Condition(f"case {name} is another", source.line(node.start_byte), not decided), _nothing))
        return self._branches(ways) if ways else False

    def _while(self, source: Source, node: Any) -> None:
        condition = node.child_by_field_name("condition")
        body = node.child_by_field_name("body")
        if condition is not None and (
            asks_for_arguments(source, condition, self._scope) or truth(source, condition, self._scope) is False
        ):
            when = self._condition(source, condition, likely=False)
            self._branches([(when, lambda: self._run(source, body)), (self._otherwise(when), _nothing)])
        else:
            self._run(source, body)

    def _for(self, source: Source, node: Any) -> None:
        body = node.child_by_field_name("body")
        variable = node.child_by_field_name("variable")
        if variable is not None:
            name = source.text(variable.start_byte, variable.end_byte)
            listed = expand_words(source, node.children_by_field_name("value"), self._scope)
            line = source.line(node.start_byte)
            known = listed and all(word.text is not None for word in listed)
            self._scope.variables[name] = (
                (Piece(None, ()),)
                if not known
                else listed[0].parts
                if len(listed) == 1
                else (Choice(tuple(Option(w.parts, Condition(f"{name} is {w.text}", line, True)) for w in listed)),)
            )
        elif node.type == "c_style_for_statement":
            match = re.match(r"for\s*\(\(\s*(\w+)", source.text(node.start_byte, node.end_byte))
            if match:
                self._scope.variables[match[1]] = (Piece(None, ()),)
        if body is not None:
            self._run(source, body)

    # Ways through.

    def _condition(self, source: Source, node: Any, likely: bool, negated: bool = False) -> Condition:
        text = " ".join(source.text(node.start_byte, node.end_byte).split())
        return Condition(f"not {text}" if negated else text, source.line(node.start_byte), likely)

    def _otherwise(self, condition: Condition) -> Condition:
        return Condition(f"not ({condition.text})", condition.line, True)

    def _branches(self, ways: Sequence[tuple[Condition, Callable[[], bool]]]) -> bool:
        """Go each way from here, and merge what the variables hold after those that come back."""
        before, outer = dict(self._scope.variables), self._conditions
        came_back: list[tuple[Condition, dict[str, Variable]]] = []
        for condition, way in ways:
            self._scope.variables = dict(before)
            self._conditions = (*outer, condition)
            if not way():
                came_back.append((condition, self._scope.variables))
        self._conditions = outer
        if not came_back:
            self._scope.variables = before
            return all(condition.likely for condition, _ in ways)
        names = dict.fromkeys(name for _, variables in came_back for name in variables)
        unset: Value = ()
        self._scope.variables = {
            name: merge(
                [(variables.get(name, before.get(name, unset)), condition) for condition, variables in came_back]
            )
            for name in names
        }
        return False

    # Commands.

    def _command(self, source: Source, node: Any) -> bool:
        nodes = []
        for child in node.named_children:
            if child.type == "variable_assignment":
                continue  # for this command alone
            if child.type in ("heredoc_redirect", "file_redirect", "herestring_redirect"):
                continue
            nodes.append(child)
        words = expand_words(source, nodes, self._scope)
        if not words:
            return False
        name = words[0].text or ""
        line = source.line(node.start_byte)
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
            self._run_text(word.parts, line)
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
        self.run_source(NestedSource(parts, line))
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


def _nothing() -> bool:
    return False


def _joined(words: Sequence[Word]) -> Value:
    parts: list[Part] = []
    for word in words:
        parts += [*([Piece(" ", (), exact=False)] if parts else []), *word.parts]
    return tuple(parts)


def _condition_and_body(node: Any) -> tuple[Any, list[Any]]:
    """An ``if`` or ``elif``: what it asks, and what it does."""
    then = next(place for place, child in enumerate(node.children) if child.type == "then")
    asked = [child for child in node.children[:then] if child.is_named]
    body = [
        child
        for child in node.children[then + 1 :]
        if child.is_named and child.type not in ("elif_clause", "else_clause")
    ]
    return asked[-1], body


def _errors(node: Any) -> list[Any]:
    if not node.has_error:
        return []
    if node.type == "ERROR" or node.is_missing:
        return [node]
    return [error for child in node.children for error in _errors(child)]
