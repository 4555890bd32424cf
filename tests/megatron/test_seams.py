"""Seams: a Megatron that moved something is refused before anything of it is changed."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import seams
from megatron_flexsp.megatron.seams import Seam


def doubled(original: Callable[[int], int]) -> Callable[[int], int]:
    return lambda value: 2 * original(value)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module with a function and a method to replace."""
    module = ModuleType("a_place")
    exec("def number(value): return value\nclass Layer:\n    def forward(self, query, key): return query", vars(module))
    monkeypatch.setitem(sys.modules, "a_place", module)
    return module


def test_a_replacement_gets_the_original(place: ModuleType) -> None:
    seams.install([Seam("a_place:number", ("value",), doubled, "doubles")])
    assert place.number(4) == 8


@pytest.mark.parametrize(
    ("target", "parameters", "message"),
    [
        ("a_place:gone", (), r"a_place:gone is not there"),
        ("a_place:Layer.gone", (), r"a_place:Layer\.gone is not there"),
        ("no_such_place:number", (), r"no_such_place:number is not there"),
        ("a_place:Layer.forward", ("query", "mask"), r"forward takes \(self, query, key\), expected \(query, mask\)"),
    ],
)
def test_nothing_is_changed_where_one_place_does_not_match(
    target: str, parameters: tuple[str, ...], message: str, place: ModuleType
) -> None:
    good, bad = (Seam("a_place:number", ("value",), doubled, ""), Seam(target, parameters, doubled, ""))
    with pytest.raises(FlexSPError, match=rf"Megatron {re.escape(seams.version())}: .*{message}"):
        seams.install([good, bad])
    assert place.number(4) == 4


@pytest.mark.parametrize("version", ["0.16.0", "0.2"])
def test_older_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "version", lambda: version)
    with pytest.raises(FlexSPError, match=rf"Megatron {version} is too old\. .*0\.17 to 0\.20"):
        seams.check_version()


@pytest.mark.parametrize("version", ["0.17.0", "0.18.9", "0.19.0rc4", "0.19.2+local", "0.20.0rc1"])
def test_versions_that_were_tried_are_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "version", lambda: version)
    seams.check_version()
    assert seams.warning() is None


@pytest.mark.parametrize("version", ["0.21.0", "1.0.0rc2", "a-fork-of-ours"])
def test_others_are_taken_with_a_warning(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "version", lambda: version)
    seams.check_version()
    assert f"Megatron {version} has not been tried" in (seams.warning() or "")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes a git checkout with the installed Megatron's package_info.py at a path in it; returns the commit.

    Only that Megatron is found then. What lies under ``.venv`` is ignored by git.
    """

    def make(root: str) -> str:
        core = tmp_path / root / "megatron/core"
        core.mkdir(parents=True)
        shutil.copy(seams.location() / "package_info.py", core)
        (core / "__init__.py").touch()
        (tmp_path / ".gitignore").write_text(".venv\n")
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
        spec = ModuleSpec("megatron.core", None, is_package=True)
        spec.submodule_search_locations = [str(core)]
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
        found = subprocess.run(
            ["git", "-C", str(tmp_path), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        )
        return found.stdout.strip()

    return make


def test_a_checkout_of_megatron_has_its_commit_in_its_version(checkout: Callable[[str], str]) -> None:
    commit = checkout("")
    assert seams.version().partition("+")[2] == commit


def test_a_checkout_that_only_holds_the_environment_has_none(checkout: Callable[[str], str]) -> None:
    checkout(".venv/lib/python3.12/site-packages")
    assert re.fullmatch(r"[\d.]+", seams.version())


def test_a_module_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_flexsp.megatron import plugin

    monkeypatch.delitem(sys.modules, "megatron_flexsp.megatron.training_seams", raising=False)
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", None)
    with pytest.raises(FlexSPError, match=r"core\.extensions\.transformer_engine.* works with: Megatron 0\.17"):
        plugin.training_seams()
