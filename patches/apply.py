"""Puts FlexSP's lines into the training script of a Megatron-LM clone or fork, and takes them out again.

    python patches/apply.py MEGATRON_LM              apply; applied already is fine
    python patches/apply.py MEGATRON_LM --check      say what is there and change nothing
    python patches/apply.py MEGATRON_LM --revert     the file is then, byte for byte, what it was

Exit codes: 0 done, or with --check applied; 1 with --check not applied; 2 refused. Needs Python alone.

The patches hold our lines and no context, so their line numbers are right for one release only. In a fork the place is
looked up: the lines go before the script's first import of Megatron, wherever it stands.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARK = b"# megatron-flexsp:"
"""How the first and the last of our lines begin, in every version of them."""
OLDEST, NEWEST = (0, 17), (0, 20)
ONLY_ON_DEV = "megatron/core/context_parallel_layout"
"""The dev branch has 0.19's number; this folder tells them apart."""


class Refused(Exception):
    """Nothing was changed, and why."""

    def __init__(self, message: str, *, place_unknown: bool = False) -> None:
        super().__init__(message)
        self.place_unknown = place_unknown


@dataclass(frozen=True)
class Patch:
    """One file of this folder."""

    name: str
    before_line: int
    """Line number, from 1, of what stands after the lines in the stated release."""
    lines: tuple[bytes, ...]
    """Without line ends."""

    @classmethod
    def read(cls, name: str) -> Patch:
        text = (HERE / name).read_bytes().splitlines()
        header = next(number for number, line in enumerate(text) if line.startswith(b"@@"))
        found = re.match(rb"@@ -(\d+),0 \+\d+,(\d+) @@$", text[header])
        body = text[header + 1 :]
        if found is None or int(found[2]) != len(body) or not all(line.startswith(b"+") for line in body):
            raise Refused(f"{HERE / name} is damaged: get it again")
        return cls(name, int(found[1]) + 1, tuple(line[1:] for line in body))

    def text(self, newline: bytes) -> bytes:
        """The lines as a file with these line ends has them."""
        return b"".join(line + newline for line in self.lines)


def choose_patch(root: Path) -> tuple[str, Patch, list[str]]:
    """The clone's version, its patch, and what to say of it."""
    info = root / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        raise Refused(
            f"{root} is no Megatron-LM clone: it has no megatron/core/package_info.py. Give the folder that holds "
            "pretrain_gpt.py. With the wheel alone nothing needs a patch: use scripts/pretrain_gpt.py"
        )
    # Read, not run: Megatron's own code asks git there.
    text = info.read_text(encoding="utf-8")
    numbers = [re.search(rf"^{part} *= *(\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR", "PATCH")]
    if None in numbers:
        raise Refused(f"{info} names no version that can be read (MAJOR, MINOR and PATCH)")
    major, minor, patch = (int(number[1]) for number in numbers if number is not None)
    version, release = f"{major}.{minor}.{patch}", (major, minor)
    if release < OLDEST:
        raise Refused(f"Megatron {version} is too old: 0.17 is the oldest release that megatron-flexsp works with")
    if release >= NEWEST:
        name = "main.patch"
    elif (root / ONLY_ON_DEV).is_dir():
        name, version = "dev.patch", f"{version} (dev)"
    else:
        name = f"{major}.{minor}.patch"
    notes = []
    if release > NEWEST:
        notes.append(f"Megatron {version} has not been tried; the place is looked up as in any fork")
    return version, Patch.read(name), notes


def anchor(source: bytes, path: Path) -> int:
    """Line number, from 1, of the statement that first imports Megatron, or a module that lies beside the script."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise Refused(f"{path.name} can't be read as Python: {error}", place_unknown=True) from None
    for statement in statements:
        if not any(_is_megatrons(name, path.parent) for name in _imports(statement)):
            continue
        line = statement.lineno
        before = source.splitlines()[: line - 1]
        if statement.col_offset or (before and before[-1].endswith(b"\\")):
            raise Refused(f"{path.name}: other code shares line {line} with its first import", place_unknown=True)
        return line
    raise Refused(f"{path.name} imports nothing of Megatron as it starts", place_unknown=True)


def _imports(node: ast.AST) -> Iterator[str]:
    """Names of the modules that a statement imports when it runs; what stands in a function runs later."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""
    elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        for child in ast.iter_child_nodes(node):
            yield from _imports(child)


def _is_megatrons(name: str, folder: Path) -> bool:
    top = name.partition(".")[0]
    beside = folder / top
    return top == "megatron" or (top != "" and (beside.is_dir() or beside.with_suffix(".py").is_file()))


def is_applied(source: bytes, block: bytes, script: str) -> bool:
    """Whether the lines are there, whole and once; something in between is refused."""
    marks = [(number, line) for number, line in enumerate(source.splitlines(), 1) if line.strip().startswith(MARK)]
    if not marks:
        return False
    if len(marks) == 2 and source.count(block) == 1:
        return True
    where = ", ".join(str(number) for number, _ in marks)
    raise Refused(
        f"{script} is partly patched, or by another version of megatron-flexsp (marks in line {where}). Restore the "
        "file, for example with git checkout, or take out by hand what stands between the marks, and them"
    )


def with_lines(source: bytes, block: bytes, line: int) -> bytes:
    """The script with the lines before line ``line``."""
    lines = source.splitlines(keepends=True)
    return b"".join([*lines[: line - 1], block, *lines[line - 1 :]])


def write(path: Path, content: bytes) -> None:
    """In one step, with the file's own permissions; a link is followed."""
    path = path.resolve()
    new = path.with_name(f".{path.name}.flexsp")
    try:
        new.write_bytes(content)
        shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def has_other_changes(path: Path, block: bytes) -> bool:
    """Whether the script differs from what the last commit has, apart from our lines."""
    command = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    try:
        shown = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        return False  # no git
    return shown.returncode == 0 and shown.stdout.replace(block, b"") != path.read_bytes().replace(block, b"")


def run(root: Path, script: str, *, check: bool, revert: bool) -> int:
    """Do what was asked, print it, and return the exit code."""
    version, patch, notes = choose_patch(root)
    path = root / script
    if not path.is_file():
        raise Refused(f"{path}: no such script; name another with --script")
    source = path.read_bytes()
    block = patch.text(b"\r\n" if b"\r\n" in source else b"\n")
    applied = is_applied(source, block, script)
    original = source.replace(block, b"") if applied else source
    line = 0 if revert else anchor(original, path)
    if applied and not revert and with_lines(original, block, line) != source:
        raise Refused(f"{script}: the lines don't stand before the first import of Megatron. Revert, and apply again")
    if not revert and line != patch.before_line:
        notes.append(f"the place is line {line}; in the release of {patch.name} it is line {patch.before_line}")
    if has_other_changes(path, block):
        notes.append(f"{script} has other changes that are not committed; they stay")

    if check:
        done = "applied" if applied else f"not applied; the lines would go before line {line}"
    elif applied == (not revert):
        done = "nothing to do: " + ("applied already" if applied else "not applied")
    elif revert:
        write(path, original)
        done = "reverted"
    else:
        write(path, with_lines(source, block, line))
        done = f"applied: {len(patch.lines)} lines before line {line}"
    print(f"Megatron {version}, {path}: {done}")
    for note in notes:
        print(f"  note: {note}")
    return 1 if check and not applied else 0


def main(command_line: Sequence[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Makes `torchrun pretrain_gpt.py ... --flexsp` work in a Megatron-LM clone or fork.",
    )
    parser.add_argument("root", type=Path, metavar="MEGATRON_LM", help="the clone's folder")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say what is there and change nothing")
    action.add_argument("--revert", action="store_true", help="take the lines out again")
    parser.add_argument("--script", default="pretrain_gpt.py", help="a fork's training script, relative to the clone")
    options = parser.parse_args(command_line)
    try:
        return run(options.root, options.script, check=options.check, revert=options.revert)
    except Refused as error:
        print(f"apply.py: error: {error}", file=sys.stderr)
        if error.place_unknown and not options.revert:
            lines = Patch.read("main.patch").text(b"\n").decode()
            print(f"By hand: put this before whatever first imports Megatron:\n\n{lines}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"apply.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
