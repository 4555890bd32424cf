"""Expands the words of a shell script as the shell would, as far as the text says what they become."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_flexsp.convert.shell_number import calculate
from megatron_flexsp.convert.shell_source import Source
from megatron_flexsp.convert.shell_values import (
    Array,
    Break,
    Element,
    Part,
    Piece,
    Value,
    Variable,
    Word,
    is_fixed,
    plain_text,
    within,
    words,
)
from megatron_flexsp.convert.text import Span

Expansion = list[Part | Break]

_ESCAPES = {'"': '$`"\\', "heredoc": "$`\\"}
"""What a backslash takes the meaning of, in double quotes and in here-documents."""

_PARAMETER = re.compile(r"\$\{([A-Za-z_]\w*|\d+|[@*])(?:\[([^\]]*)\])?(?:(:?[-=+?])(.*))?\}", re.DOTALL)


@dataclass
class Scope:
    """What a script's variables hold at some point."""

    variables: dict[str, Variable] = field(default_factory=dict)
    positional: tuple[Word, ...] | None = None
    """The arguments of the function that runs; None in the script itself, whose caller gives them."""


def expand(source: Source, node: Any, scope: Scope) -> Expansion:
    """A word's parts, each with the word among its places."""
    span = source.span(node.start_byte, node.end_byte)
    parts = _expand(source, node, scope, quoted=False)
    if span is None:
        return parts
    return [part if isinstance(part, Break) else _wrapped(part, span) for part in parts]


def expand_words(source: Source, nodes: Sequence[Any], scope: Scope) -> list[Word]:
    """The words that several nodes become."""
    return [word for node in nodes for word in words(expand(source, node, scope))]


def expand_value(source: Source, node: Any, scope: Scope) -> Value:
    """What is assigned: one value, with nothing parted."""
    parts: list[Part] = []
    for part in expand(source, node, scope):
        if isinstance(part, Break):
            if parts:
                parts.append(Piece(" ", (), exact=False))
        else:
            parts.append(part)
    return tuple(parts)


def expand_array(source: Source, node: Any, scope: Scope) -> Array:
    """The elements of ``(...)``."""
    return Array(
        tuple(
            Element(word.parts, word.conditions)
            for child in node.named_children
            if child.type != "comment"
            for word in words(expand(source, child, scope))
        )
    )


def heredoc(source: Source, node: Any, scope: Scope, quoted: bool) -> Value:
    """A here-document's text; ``quoted`` if its mark is, so that nothing in it is expanded."""
    if quoted:
        return source.cut(node.start_byte, node.end_byte)
    return _values(_expand_between(source, node, node.start_byte, node.end_byte, scope, "heredoc"))


def _values(parts: Expansion) -> Value:
    return tuple(part for part in parts if not isinstance(part, Break))


def _wrapped(part: Part, span: Span) -> Part:
    if isinstance(part, Piece):
        return replace(part, chain=(span, *part.chain))
    options = tuple(
        replace(option, value=tuple(_wrapped(inner, span) for inner in option.value)) for option in part.options
    )
    return replace(part, chain=(span, *part.chain), options=options)


def _expand(source: Source, node: Any, scope: Scope, quoted: bool) -> Expansion:
    start, end = node.start_byte, node.end_byte
    match node.type:
        case "string" | "translated_string":
            first = start + (2 if node.type == "translated_string" else 1)
            parts = _expand_between(source, node, first, end - 1, scope, '"')
            return parts or [_empty(source, first)]
        case "raw_string":
            inner = [replace(part, raw=True) for part in source.cut(start + 1, end - 1) if isinstance(part, Piece)]
            return list(inner) or [_empty(source, start + 1)]
        case "concatenation" | "command_name":
            return [part for child in node.children for part in _expand(source, child, scope, quoted)]
        case "simple_expansion":
            return _named(source, node, source.text(_start(source, node) + 1, end), scope, quoted)
        case "expansion":
            return _braced(source, node, scope, quoted)
        case "arithmetic_expansion":
            return [_arithmetic(source, node, scope)]
        case "command_substitution":
            return _substituted(source, node, scope, quoted)
        case "process_substitution" | "brace_expression" | "ansi_c_string":
            return [_unknown(source, node)]
        case _:
            return _literal(source, start, end, None)


def _start(source: Source, node: Any) -> int:
    """Where an expansion begins: the parser counts white space and joined lines before it to it."""
    text = source.text(node.start_byte, node.end_byte)
    match = re.match(r"(?:\s|\\\r?\n)*", text)
    return int(node.start_byte) + (match.end() if match else 0)


def _span(source: Source, node: Any) -> Span | None:
    return source.span(_start(source, node), node.end_byte)


def _empty(source: Source, position: int) -> Piece:
    span = source.span(position, position)
    return Piece("", () if span is None else (span,))


def _unknown(source: Source, node: Any, **properties: Any) -> Piece:
    span = _span(source, node)
    return Piece(None, () if span is None else (span,), exact=False, **properties)


def _expand_between(source: Source, node: Any, start: int, end: int, scope: Scope, kind: str) -> Expansion:
    """What stands between two places of a quoted text: letters, and the expansions among them."""
    parts: Expansion = []
    position = start
    for child in node.children:
        if child.end_byte <= start or child.start_byte >= end or child.type in ("string_content", "heredoc_content"):
            continue
        if not child.is_named:
            continue
        parts += _literal(source, position, _start(source, child), kind)
        parts += _expand(source, child, scope, quoted=True)
        position = child.end_byte
    return parts + _literal(source, position, end, kind)


def _literal(source: Source, start: int, end: int, kind: str | None) -> Expansion:
    """Letters, with backslashes taken out where the shell does; ``kind`` is the quotation they stand in."""
    parts: Expansion = []
    text = source.text(start, end)
    position = 0
    for match in re.finditer(r"\\(\r?\n|.)", text, re.DOTALL):
        escaped = match[1]
        if escaped[-1] != "\n" and kind is not None and escaped not in _ESCAPES[kind]:
            continue
        parts += source.cut(start + position, start + match.start())
        if escaped[-1] != "\n":
            span = source.span(start + match.start(), start + match.end())
            parts.append(Piece(escaped, () if span is None else (span,), exact=False))
        position = match.end()
    parts += source.cut(start + position, end)
    return [part for part in parts if not (isinstance(part, Piece) and part.text == "")]


def _named(source: Source, node: Any, name: str, scope: Scope, quoted: bool) -> Expansion:
    """``$name``."""
    span = _span(source, node)
    outer = [] if span is None else [span]
    if name in ("@", "*"):
        if scope.positional is None:
            return [_unknown(source, node, caller=True)]
        return _elements(tuple(Element(word.parts, word.conditions) for word in scope.positional), outer, quoted)
    if name.isdigit():
        if scope.positional is None or name == "0":
            return [_unknown(source, node)]
        place = int(name) - 1
        if place >= len(scope.positional):
            return []
        return list(within(scope.positional[place].parts, outer, quoted))
    if name == "#":
        return [Piece("0", tuple(outer), exact=False, soft=True)]
    variable = scope.variables.get(name)
    if variable is None:
        return [_unknown(source, node, environment=True, quoted=quoted)]
    if isinstance(variable, Array):
        return list(within(variable.elements[0].value, outer, quoted)) if variable.elements else []
    return list(within(variable, outer, quoted))


def _elements(elements: Sequence[Element], outer: Sequence[Span], quoted: bool) -> Expansion:
    parts: Expansion = []
    for element in elements:
        parts.append(Break(element.conditions))
        parts += within(element.value, outer, quoted)
    return [*parts, Break()] if elements else []


def _braced(source: Source, node: Any, scope: Scope, quoted: bool) -> Expansion:
    """``${...}``."""
    text = source.text(_start(source, node), node.end_byte)
    match = _PARAMETER.fullmatch(text)
    span = _span(source, node)
    if match is None:
        return [_unknown(source, node)]
    name, subscript, operator, _ = match.groups()
    outer = [] if span is None else [span]
    if subscript is not None and operator is None:
        return _subscripted(source, node, name, subscript, scope, quoted, outer)
    if operator is None:
        return _named(source, node, name, scope, quoted)
    known = name in scope.variables or (name.isdigit() and scope.positional is not None)
    value = _named(source, node, name, scope, quoted) if known else []
    empty = not known or plain_text(_values(value)) == ""
    sign = operator[-1]
    place = next((child.end_byte for child in node.children if child.type == operator), node.end_byte - 1)
    if sign == "+":
        if known and not empty:
            return _alternative(source, node, place, scope, quoted, outer)
        return []
    if sign == "?" or not empty:
        return value or [_unknown(source, node)]
    alternative = _alternative(source, node, place, scope, quoted, outer)
    if sign == "=":
        scope.variables[name] = _values(alternative)
    return alternative


def _alternative(source: Source, node: Any, start: int, scope: Scope, quoted: bool, outer: Sequence[Span]) -> Expansion:
    """The part of ``${NAME:-...}`` that counts where the environment doesn't set the name."""
    parts = _expand_between_words(source, node, start, node.end_byte - 1, scope)
    soft = [
        replace(part, soft=True) if isinstance(part, Piece) else part for part in parts if not isinstance(part, Break)
    ]
    return list(within(tuple(soft), outer, quoted))


def _expand_between_words(source: Source, node: Any, start: int, end: int, scope: Scope) -> Expansion:
    parts: Expansion = []
    position = start
    for child in node.children:
        if child.start_byte < start or not child.is_named or child.type in ("word", "variable_name", "number"):
            continue
        parts += _literal(source, position, _start(source, child), None)
        parts += _expand(source, child, scope, quoted=True)
        position = child.end_byte
    return parts + _literal(source, position, end, None)


def _subscripted(
    source: Source, node: Any, name: str, subscript: str, scope: Scope, quoted: bool, outer: Sequence[Span]
) -> Expansion:
    variable = scope.variables.get(name)
    if variable is None:
        return [_unknown(source, node, environment=True, quoted=quoted)]
    elements = variable.elements if isinstance(variable, Array) else (Element(variable),)
    if subscript in ("@", "*"):
        if subscript == "*" and quoted:
            joined: Expansion = []
            for element in elements:
                joined += [*([Piece(" ", (), exact=False)] if joined else []), *within(element.value, outer, True)]
            return joined
        return _elements(elements, outer, quoted)
    if subscript.isdigit() and int(subscript) < len(elements) and not any(one.conditions for one in elements):
        return list(within(elements[int(subscript)].value, outer, quoted))
    return [_unknown(source, node)]


def _substituted(source: Source, node: Any, scope: Scope, quoted: bool) -> Expansion:
    """``$(...)``: known for ``echo`` and for ``cat`` of a here-document."""
    inner = [child for child in node.named_children if child.type != "comment"]
    if len(inner) == 1 and inner[0].type == "command":
        names = expand_words(source, [child for child in inner[0].children if child.is_named], scope)
        if names and names[0].text == "echo" and len(names) > 1 and not (names[1].text or "").startswith("-"):
            parts: list[Part] = []
            for word in names[1:]:
                parts += [*([Piece(" ", (), exact=False)] if parts else []), *word.parts]
            return list(_requoted(parts, quoted))
        if names and names[0].text == "expr":
            number = calculate(" ".join(word.text or "?" for word in names[1:]))
            if number is not None:
                soft = not all(word.fixed for word in names)
                return [replace(_unknown(source, node), text=str(number), soft=soft)]
    if len(inner) == 1 and inner[0].type == "redirected_statement":
        bodies = [body for body in _descendants(inner[0]) if body.type == "heredoc_body"]
        marks = [mark for mark in _descendants(inner[0]) if mark.type == "heredoc_start"]
        if len(bodies) == 1 and source.text(inner[0].start_byte, inner[0].end_byte).lstrip().startswith("cat"):
            literal = any(mark in source.text(marks[0].start_byte, marks[0].end_byte) for mark in "'\"\\")
            return list(_requoted(heredoc(source, bodies[0], scope, literal), quoted))
    return [_unknown(source, node)]


def _requoted(parts: Sequence[Part], quoted: bool) -> Value:
    return within(tuple(parts), (), quoted)


def _descendants(node: Any) -> list[Any]:
    return [node, *(below for child in node.children for below in _descendants(child))]


def _arithmetic(source: Source, node: Any, scope: Scope) -> Piece:
    """``$((...))`` as a number, where all its variables are known."""
    value, soft = arithmetic(source, node, scope)
    return replace(_unknown(source, node), text=None if value is None else str(value), soft=soft)


def arithmetic(source: Source, node: Any, scope: Scope) -> tuple[int | None, bool]:
    """What an arithmetic expression comes to, and whether the script's caller may change that."""
    soft = False

    def number(inner: Any, quoted_value: Expansion) -> str:
        nonlocal soft
        value = _values(quoted_value)
        soft = soft or not is_fixed(value)
        text = plain_text(value)
        return text if text is not None and re.fullmatch(r"\s*-?\d+\s*", text) else "?"

    text, position = "", node.start_byte
    pending = list(reversed(node.children))
    while pending:
        child = pending.pop()
        if child.type in ("simple_expansion", "expansion", "command_substitution", "arithmetic_expansion", "string"):
            replacement = number(child, _expand(source, child, scope, quoted=True))
        elif child.type == "variable_name" or (child.type == "word" and child.child_count == 0):
            name = source.text(child.start_byte, child.end_byte)
            replacement = number(child, _named(source, child, name, scope, True))
        else:
            pending += reversed(child.children)
            continue
        text += source.text(position, child.start_byte) + f" {replacement} "
        position = child.end_byte
    text += source.text(position, node.end_byte)
    inner = re.fullmatch(r"\s*(?:\$\(\(|\$\[|\(\()(.*?)(?:\)\)|\])\s*", text, re.DOTALL)
    return calculate(inner[1] if inner else text), soft
