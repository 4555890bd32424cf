"""Whole numbers out of the shell's arithmetic."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

_OPERATORS: Mapping[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    # The shell cuts towards zero.
    ast.Div: lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    ast.Mod: lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
    ast.Pow: lambda a, b: a**b if 0 <= b < 64 else 1 // 0,
    ast.Gt: lambda a, b: int(a > b),
    ast.Lt: lambda a, b: int(a < b),
    ast.GtE: lambda a, b: int(a >= b),
    ast.LtE: lambda a, b: int(a <= b),
    ast.Eq: lambda a, b: int(a == b),
    ast.NotEq: lambda a, b: int(a != b),
}


def calculate(text: str) -> int | None:
    """A whole number from an expression of whole numbers; None for anything else."""
    try:
        return _evaluate(ast.parse(" ".join(text.split()), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, KeyError, RecursionError):
        return None


def _evaluate(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(node.value, bool):
            return value
        case ast.BinOp(left=left, op=operator, right=right):
            return int(_OPERATORS[type(operator)](_evaluate(left), _evaluate(right)))
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            return int(_OPERATORS[type(operator)](_evaluate(left), _evaluate(right)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand)
        case _:
            raise ValueError(ast.dump(node))
