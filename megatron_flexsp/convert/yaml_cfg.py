"""A file for Megatron's ``--yaml-cfg`` becomes the list of the arguments that mean the same.

No Megatron from 0.17 on starts from such a file (it asks for ``account_for_embedding_in_pipeline_split`` outside of
the sections and, in the model's configuration, inside of one, and takes no name twice), and beside one it ignores the
command line. So there is nothing to add FlexSP's settings to: the settings have to become flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_flexsp.convert import plain
from megatron_flexsp.convert.result import Result, Unconvertible
from megatron_flexsp.convert.rules import Wishes
from megatron_flexsp.convert.yaml_cfg_flags import Setting, Translation, translate

SECTIONS = ("language_model", "model_parallel")
"""What such a file is divided into, besides what stands outside of them."""


def is_yaml_cfg(root: Any) -> bool:
    """Whether a composed file is one for ``--yaml-cfg``."""
    if root is None or root.id != "mapping":
        return False
    return {str(key.value) for key, value in root.value if value.id == "mapping"} >= set(SECTIONS)


def convert_yaml_cfg(root: Any, data: bytes, path: Path, wishes: Wishes) -> Result:
    """The arguments of a FlexSP job that is what the file says, one on a line, with the file's comments.

    Raises
    ------
    Unconvertible
        With every key that no flag expresses, and everything that doesn't go with FlexSP.
    """
    text = data.decode("utf-8", "replace").splitlines()
    settings = list(_settings(root))
    translation = translate(settings)
    if translation.problems:
        raise Unconvertible(translation.problems)
    written, lines = _written(translation, settings, text, path)
    inner = plain.convert_list(written.encode(), wishes, lines, begin=len(written.partition("\n")[0]) + 1)
    reasons = [
        "a file for --yaml-cfg became a list of arguments, each key the flag that sets it: no Megatron from 0.17 on "
        "starts from such a file"
    ]
    return Result(
        inner.data, reasons + translation.reasons + inner.reasons, translation.notes + inner.notes, as_list=True
    )


def _settings(root: Any) -> Iterator[Setting]:
    for key, value in root.value:
        if value.id == "mapping" and key.value in SECTIONS:
            for inner, inner_value in value.value:
                yield Setting(str(inner.value), inner_value, inner.start_mark.line + 1)
        else:
            yield Setting(str(key.value), value, key.start_mark.line + 1)


def _written(
    translation: Translation, settings: list[Setting], text: list[str], path: Path
) -> tuple[str, dict[int, int]]:
    """The list's text, and the file's line for each of its own, both counted from 1."""
    last_lines = {setting.line: setting.value.end_mark.line + 1 for setting in settings}
    out = [f"# Megatron's arguments, from {path.name}, which was for --yaml-cfg."]
    lines: dict[int, int] = {}
    comments: list[str] = []
    closed = False  # whether keys have followed the comments that wait for one
    for number, line in enumerate(text, 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            if closed:  # the comments were about keys that need no flag
                comments, closed = [], False
            comments.append(stripped)
        elif number in last_lines or stripped.partition(":")[0] in SECTIONS:
            closed = True
        words = translation.flags.get(number)
        if words is None:
            continue
        while comments and not comments[0]:
            comments.pop(0)
        if comments:
            out += ["", *comments]
            comments = []
        closed = False
        for position, word in enumerate(words):
            end = "" if position + 1 < len(words) else _comment_of(line, number == last_lines[number])
            out.append(word + end)
            lines[len(out)] = number
    return "\n".join(out) + "\n", lines


def _comment_of(line: str, whole: bool) -> str:
    """What stands behind a value on its own line."""
    found = re.search(r"\s#.*\Z", re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: "q" * len(quoted[0]), line))
    return "" if found is None or not whole else "  " + line[found.start() :].strip()
