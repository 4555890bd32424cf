"""Whether a condition of a shell script holds, as far as the script's text says."""

from __future__ import annotations

import fnmatch
from typing import Any

from megatron_flexsp.convert.shell_expand import Scope, arithmetic, expand
from megatron_flexsp.convert.shell_source import Source
from megatron_flexsp.convert.shell_values import Break, Piece, likely


def truth(source: Source, node: Any, scope: Scope) -> bool | None:
    """True or false as the script stands, called without arguments and with nothing set outside; None if unknown."""
    match node.type:
        case "test_command":
            if node.children[0].type == "((":
                value = arithmetic(source, node, scope)[0]
                return None if value is None else bool(value)
            inner = [child for child in node.children if child.is_named]
            return _test(source, inner[0], scope) if len(inner) == 1 else None
        case "list" | "binary_expression" if _operator(node) in ("&&", "||"):
            return _junction(source, node, scope)
        case "negated_command":
            inside = truth(source, node.named_children[-1], scope)
            return None if inside is None else not inside
        case "command":
            return _command(source, node, scope)
        case "compound_statement" if node.children[0].type == "((":
            value = arithmetic(source, node, scope)[0]
            return None if value is None else bool(value)
        case _:
            return None


def word_text(source: Source, node: Any, scope: Scope) -> str | None:
    """A word's text; a variable that is never set is empty."""
    texts = []
    for part in expand(source, node, scope):
        if isinstance(part, Break):
            continue
        for piece in likely([part]):
            texts.append("" if piece.text is None and (piece.environment or piece.caller) else piece.text)
    return None if None in texts else "".join(text or "" for text in texts)


def matches(source: Source, text: str | None, pattern: Any, scope: Scope) -> bool | None:
    """Whether a text matches a pattern of ``case`` or of ``[[ x == pattern ]]``."""
    wanted = word_text(source, pattern, scope)
    if text is None or wanted is None:
        return None
    if pattern.type in ("string", "raw_string"):
        return text == wanted
    return fnmatch.fnmatchcase(text, wanted)


def _operator(node: Any) -> str:
    return next((child.type for child in node.children if not child.is_named and child.type not in "()"), "")


def _junction(source: Source, node: Any, scope: Scope) -> bool | None:
    both = [child for child in node.children if child.is_named]
    if len(both) != 2:
        return None
    left, right = (_test(source, child, scope) for child in both)
    if _operator(node) == "&&":
        return False if False in (left, right) else (None if None in (left, right) else True)
    return True if True in (left, right) else (None if None in (left, right) else False)


def _test(source: Source, node: Any, scope: Scope) -> bool | None:
    """What stands in ``[ ]``."""
    match node.type:
        case "binary_expression":
            if _operator(node) in ("&&", "||"):
                return _junction(source, node, scope)
            left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
            operator = next((source.text(c.start_byte, c.end_byte) for c in node.children[1:-1]), "")
            if left is None or right is None:
                return None
            return _compare(source, left, operator, right, scope)
        case "unary_expression":
            operator = source.text(node.children[0].start_byte, node.children[0].end_byte)
            if operator == "!":
                inside = _test(source, node.children[-1], scope)
                return None if inside is None else not inside
            text = word_text(source, node.children[-1], scope)
            if operator not in ("-z", "-n") or text is None:
                return None
            return (text == "") == (operator == "-z")
        case "parenthesized_expression" | "negation_expression":
            inside = _test(source, node.named_children[-1], scope)
            negated = node.type == "negation_expression"
            return None if inside is None else inside != negated
        case "word" | "string" | "simple_expansion" | "expansion" | "raw_string" | "concatenation" | "number":
            text = word_text(source, node, scope)
            return None if text is None else text != ""
        case _:
            return truth(source, node, scope)


def _compare(source: Source, left: Any, operator: str, right: Any, scope: Scope) -> bool | None:
    text = word_text(source, left, scope)
    if operator in ("=", "==", "!="):
        same = matches(source, text, right, scope)
        return None if same is None else same == (operator != "!=")
    comparison = {
        "-eq": lambda a, b: a == b,
        "-ne": lambda a, b: a != b,
        "-gt": lambda a, b: a > b,
        "-ge": lambda a, b: a >= b,
        "-lt": lambda a, b: a < b,
        "-le": lambda a, b: a <= b,
    }.get(operator)
    other = word_text(source, right, scope)
    try:
        return None if comparison is None else bool(comparison(int(text or "?"), int(other or "?")))
    except ValueError:
        return None


def _command(source: Source, node: Any, scope: Scope) -> bool | None:
    """``test`` with up to three words, ``true``, ``false`` and a variable that holds one of these."""
    nodes = [child for child in node.children if child.is_named]
    texts = [word_text(source, child, scope) for child in nodes]
    match texts:
        case ["true" | ":"]:
            return True
        case ["false"]:
            return False
        case ["test", "-z" | "-n" as operator, str(text)]:
            return (text == "") == (operator == "-z")
        case ["test", str(), str(operator), str()]:
            return _compare(source, nodes[1], operator, nodes[3], scope)
        case _:
            return None


def asks_for_arguments(source: Source, node: Any, scope: Scope) -> bool:
    """Whether a loop's condition is about the arguments that the script was called with."""
    if "$#" in source.text(node.start_byte, node.end_byte):
        return True
    return any(isinstance(part, Piece) and part.caller for part in expand(source, node, scope))
