"""Bash launch scripts, and plain argument lists, which are read as the shell reads an array's elements."""

from __future__ import annotations

from pathlib import Path

from megatron_flexsp.convert.plain import ListEdits
from megatron_flexsp.convert.result import Result, Unconvertible
from megatron_flexsp.convert.rules import Wishes, decide
from megatron_flexsp.convert.shell import read_script
from megatron_flexsp.convert.shell_edits import ScriptEdits
from megatron_flexsp.convert.shell_launch import Other, find_launches, find_variables
from megatron_flexsp.convert.shell_source import Source
from megatron_flexsp.convert.text import Edit, apply
from megatron_flexsp.errors import FlexSPError


def convert_script(data: bytes, path: Path | None, wishes: Wishes) -> Result:
    """A launch script's FlexSP version.

    Raises
    ------
    Unconvertible
        If something in it can't be, or it starts no training.
    """
    return convert_source(Source(data), data, path, wishes)


def convert_source(source: Source, data: bytes, path: Path | None, wishes: Wishes) -> Result:
    """The same for shell text that stands in a file of another kind, whose bytes are ``data``."""
    script = read_script(source, path)
    launches, others = find_launches(script, data)
    problems = [f"line {other.line}: {other.script}: {other.refused}" for other in others if other.refused]
    variables = None if launches or others else find_variables(script, data)
    if variables is not None:
        launches = [variables]
    if not launches:
        raise Unconvertible(problems or [_nothing_found(others)])
    edits: list[Edit] = []
    reasons: dict[str, None] = {}
    notes: dict[str, None] = dict.fromkeys(f"left alone: {problem}" for problem in problems)
    notes |= {
        f"line {line} can't be read as bash and was passed over: see that it's right": None for line in script.unread
    }
    refused: dict[str, None] = {}
    for launch in launches:
        decision = decide(launch.job, wishes)
        if not decision.problems:
            try:
                kind = ScriptEdits if variables is None else ListEdits
                edits += kind(launch, data).edits(decision.changes)
            except FlexSPError as error:
                decision.problems.append(str(error))
        refused |= dict.fromkeys(decision.problems)
        reasons |= dict.fromkeys(change.why for change in decision.changes)
        notes |= dict.fromkeys(decision.notes)
    if refused:
        raise Unconvertible(list(refused))
    try:
        converted = apply(data, edits)
    except ValueError as error:
        raise Unconvertible([f"{error}: two training commands need different values in one place"]) from None
    return Result(converted, list(reasons), list(notes), edits)


def _nothing_found(others: list[Other]) -> str:
    if others:
        named = ", ".join(f"{other.script} (line {other.line})" for other in others)
        return f"nothing to convert: no training command, only {named}"
    return (
        "nothing to convert: no command that starts a Megatron training script. Where another script starts it with "
        "what this one sets, convert that one"
    )
