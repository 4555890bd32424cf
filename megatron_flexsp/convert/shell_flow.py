"""The ways through a shell script: what its variables hold after each, and under which conditions.

Every way is gone: of an ``if`` that the text decides, the other branch counts as unlikely; of one that it doesn't
decide, both as likely. Loops are gone through once, functions where they are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_flexsp.convert.shell_conditions import asks_for_arguments, matches, truth, word_text
from megatron_flexsp.convert.shell_expand import Scope, expand_array, expand_value, expand_words, heredoc
from megatron_flexsp.convert.shell_source import Source
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
    merge,
)


class Flow:
    """Goes through statements; what a command does is for who inherits from it."""

    def __init__(self) -> None:
        self._scope = Scope()
        self._conditions: tuple[Condition, ...] = ()
        self._functions: dict[str, tuple[Source, Any]] = {}

    def _command(self, source: Source, node: Any) -> bool:
        """Run a simple command; whether the script ends there."""
        raise NotImplementedError

    def _run_text(self, parts: Sequence[Part], line: int) -> None:
        """Run text that the script hands on to another shell."""
        raise NotImplementedError

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
            self._run(source, condition_node)
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
        if condition is not None:
            self._run(source, condition)
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


def _nothing() -> bool:
    return False


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
