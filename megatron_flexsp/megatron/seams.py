"""Every place where Megatron is changed, declared once: what, why, and the signature that is expected.

A seam is checked against the Megatron that is installed before anything is changed, so that a release
that moved something is refused at start-up instead of training something else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import runpy
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import releases

_GIT_SECONDS = 10.0
"""What git may take: a network file system can hang, and a version without its commit will do."""


@dataclass(frozen=True)
class Seam:
    """One replaced name."""

    target: str
    """``module:name`` or ``module:Class.name``."""

    parameters: tuple[str, ...]
    """Parameters that the replacement relies on, by name."""

    replacement: Callable[[Callable[..., Any]], Callable[..., Any]] | None
    """Takes the original and returns what stands in its place. None where the original is only called."""

    reason: str

    def resolve(self) -> tuple[Any, str, Callable[..., Any]]:
        """The owner, the attribute's name and the original.

        Raises
        ------
        FlexSPError
            If it is not there or takes other parameters.
        """
        module_name, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module_name)
            for part in owners:
                owner = getattr(owner, part)
            original = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise FlexSPError(f"Megatron {version()}: {self.target} is not there ({error})", _REMEDY) from None
        # Of what is built in, nobody can say which parameters it takes.
        found = inspect.signature(original).parameters if self.parameters else {}
        missing = [parameter for parameter in self.parameters if parameter not in found]
        in_order = [parameter for parameter in found if parameter in self.parameters]
        if missing or tuple(in_order) != self.parameters:
            raise FlexSPError(
                f"Megatron {version()}: {self.target} takes ({', '.join(found)}), expected "
                f"({', '.join(self.parameters)}) among them",
                _REMEDY,
            )
        return owner, name, original


_REMEDY = f"use one that megatron-flexsp works with: Megatron {releases.RANGE}"


def location() -> Path:
    """The folder of the ``megatron.core`` that would be imported."""
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ImportError:
        spec = None
    for folder in (spec and spec.submodule_search_locations) or ():
        if Path(folder, "package_info.py").is_file():
            return Path(folder)
    raise FlexSPError(
        "Megatron is not there",
        "install it (pip install 'megatron-flexsp[train]') or give the pretrain_gpt.py of a Megatron-LM checkout",
    )


def version() -> str:
    """The version of the Megatron that would be imported; of a checkout with its commit."""
    return _version_in(location())


@functools.cache
def _version_in(folder: Path) -> str:
    # Read, not imported: the stand-in for CUDA must be there before Megatron is.
    found = str(runpy.run_path(str(folder / "package_info.py"))["__version__"])
    # The file appends the commit of whatever checkout its folder lies in. Where that only holds a virtual environment,
    # the commit says nothing about Megatron, and changes while Megatron stays.
    if "+" not in found or _git(folder, "ls-files", "package_info.py"):
        return found
    return found.removesuffix(f"+{_git(folder, 'rev-parse', '--short', 'HEAD')}")


def _git(folder: Path, *arguments: str) -> str:
    """What git says there; nothing where it fails, takes too long or isn't installed."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def check_version() -> None:
    """Refuse a Megatron that is older than what this package was written for."""
    found = version()
    release = releases.minor_release(found)
    if release is not None and release < releases.OLDEST:
        raise FlexSPError(f"Megatron {found} is too old", _REMEDY)


def warning() -> str | None:
    """What to say of a Megatron that nobody has tried, once its places are found to be as expected.

    A newer release is not refused for its number: the places say whether something has moved.
    """
    found = version()
    release = releases.minor_release(found)
    if release is not None and release <= releases.NEWEST:
        return None
    return (
        f"Megatron {found} has not been tried ({releases.RANGE} have). Every place that is changed is as expected, so "
        "training goes on. Compare its first losses with those of a release that was tried"
    )


def moved(error: ImportError) -> FlexSPError:
    """The message for a name of Megatron that can't be imported from where it was."""
    return FlexSPError(f"Megatron {version()}: {error}", _REMEDY)


_installed: list[Seam] = []
"""In this process, in their order."""


def install(seams: Sequence[Seam]) -> None:
    """Check all seams, then put them in place."""
    places = [(seam, *seam.resolve()) for seam in seams]
    for seam, owner, name, original in places:
        if seam.replacement is not None:
            setattr(owner, name, seam.replacement(original))
            _installed.append(seam)


def print_installed() -> None:
    """Say everything that is changed in this process."""
    print(f" > [flexsp] in Megatron {version()} of {location().parents[1]}:")
    for seam in _installed:
        print(f" > [flexsp] {seam.target} {seam.reason}")
    if (found := warning()) is not None:
        print(f" > [flexsp] warning: {found}")
