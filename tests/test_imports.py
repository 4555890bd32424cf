"""Imports point one way: each room of the package takes from those below it, and Megatron is known to few.

Read from the sources, imports inside of functions too, so that nothing has to be installed and none is missed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_flexsp

PACKAGE = Path(megatron_flexsp.__file__).parent
MODULES = {"__init__", "errors", "indexed_files", "tried", "trace_format"}
"""Beside the rooms: what any of them may take, since they take nothing but each other."""

PLANNING = {"planner"}
ROOMS = {
    "planner": set[str](),
    "compatibility": set[str](),
    "prepare": set[str](),
    "cpu": set[str](),
    "runtime": PLANNING,
    "simulator": PLANNING,
    "profiler": PLANNING,
    "report": {*PLANNING, "simulator"},
    "convert": {*PLANNING, "simulator", "compatibility"},
    "megatron": {*PLANNING, "runtime", "profiler", "compatibility"},
    "doctor": {*PLANNING, "runtime", "profiler", "compatibility", "simulator", "megatron", "cpu"},
    "run": {"megatron", "cpu"},
    "cli": set[str](),  # names its subcommands, and imports the one that is run
}
"""Each room, and the rooms that it takes from."""

WITHOUT_TORCH = {*MODULES, "planner", "compatibility", "simulator", "report", "convert", "cli"}
WITH_MEGATRON = {"megatron", "cpu", "prepare", "doctor"}


def rooms() -> list[str]:
    """Packages and modules directly under ours."""
    return sorted(path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())


def imported(room: str) -> Iterator[tuple[str, str]]:
    """Each file of a room with each module that it imports."""
    path = PACKAGE / room
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield str(file.relative_to(PACKAGE)), name


def ours(room: str) -> set[tuple[str, str]]:
    """Each file of a room with each other room that it takes from."""
    names = set(rooms())
    found = ((file, name.split(".")) for file, name in imported(room))
    taken = {(file, parts[1]) for file, parts in found if parts[0] == "megatron_flexsp" and parts[1:]}
    return {(file, name if name in names else "__init__") for file, name in taken} - {(file, room) for file, _ in taken}


def test_the_table_has_every_room() -> None:
    assert set(rooms()) == {*ROOMS, *MODULES}


@pytest.mark.parametrize("room", rooms())
def test_a_room_takes_only_from_those_below(room: str) -> None:
    allowed = MODULES | ROOMS.get(room, set())
    assert {(file, other) for file, other in ours(room) if other not in allowed} == set()


@pytest.mark.parametrize("room", rooms())
def test_torch_and_megatron_are_known_to_few(room: str) -> None:
    for file, name in imported(room):
        top = name.split(".")[0]
        assert top != "torch" or room not in WITHOUT_TORCH, file
        assert top != "megatron" or room in WITH_MEGATRON, file


def test_the_table_has_one_direction() -> None:
    """Each room stands after those that it takes from, and who needs no torch takes from nobody who does."""
    before: set[str] = set()
    for room, others in ROOMS.items():
        assert others <= before
        assert room not in WITHOUT_TORCH or others <= WITHOUT_TORCH
        before.add(room)
