"""YAML files that hold Megatron's arguments: as a map of flags, as a list of words, or as shell text.

Read with ruamel.yaml for what stands where; changed as text, so that everything else keeps its form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_flexsp.convert.result import Result, Unconvertible
from megatron_flexsp.convert.rules import Wishes, decide
from megatron_flexsp.convert.shell_script import convert_source
from megatron_flexsp.convert.shell_source import NestedSource
from megatron_flexsp.convert.shell_values import Piece
from megatron_flexsp.convert.text import Edit, Span, apply, line_of
from megatron_flexsp.convert.yaml_arguments import ArgumentGroup, ArgumentList, ArgumentMap, NamedArgumentMap, span_of
from megatron_flexsp.convert.yaml_cfg import convert_yaml_cfg, is_yaml_cfg
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


def convert_yaml(data: bytes, path: Path, wishes: Wishes) -> Result:
    """A YAML file's FlexSP version; the same contract as that of the other front ends."""
    root = _composed(data, path)
    if is_yaml_cfg(root):
        # Its values are written down anew, so here a letter may be several bytes.
        return convert_yaml_cfg(_parsed(data.decode("utf-8", "replace"), path), data, path, wishes)
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
    """The file's nodes, with marks that count bytes."""
    # As Latin-1 a letter is a byte; its control letters, which YAML has no use for, become question marks.
    return _parsed(re.sub(r"[\x80-\x9f]", "?", data.decode("latin-1")), path)


def _parsed(text: str, path: Path) -> Any:
    try:
        import ruamel.yaml
    except ImportError:
        raise FlexSPError(
            "reading YAML needs ruamel.yaml, which is not installed: pip install 'megatron-flexsp[convert]'"
        ) from None
    try:
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


def _group(node: Any, root: Any, data: bytes) -> ArgumentGroup | None:
    """A map or list of Megatron arguments; None for anything else."""
    items = [key for key, _ in node.value] if node.id == "mapping" else node.value
    if not all(item.id == "scalar" for item in items):
        return None
    flags = {re.split(r"[=\s]", str(item.value))[0] for item in items if re.match(r"--[A-Za-z]", str(item.value))}
    if flags & _GENERATING and not flags & {"--train-iters", "--train-samples"}:
        return None
    if len(flags) >= _FEWEST_FLAGS:
        return (ArgumentMap if node.id == "mapping" else ArgumentList)(node, data, _script_near(root))
    names = {str(item.value).replace("-", "_") for item in items} if node.id == "mapping" else set()
    if "seq_length" in names and len(names & _NAMES) > _FEWEST_FLAGS:
        return NamedArgumentMap(node, data, _script_near(root))
    return None


def _script_near(root: Any) -> str | None:
    """A training script that the file names, if it is not GPT's."""
    for node in _nodes(root):
        for value in [value for _, value in node.value] if node.id == "mapping" else node.value:
            match = re.fullmatch(r"\S*?([\w.-]+\.py)", str(value.value)) if value.id == "scalar" else None
            if match and match[1].startswith(("pretrain_", "train_", "finetune_")):
                return match[1]
    return None


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
    span = span_of(node)
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
