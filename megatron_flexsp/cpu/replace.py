"""The list of names that the CPU stand-in puts in place of others.

A module of this room decorates what it offers with `replaces`; nothing happens until `replace_all` runs. So importing
the room changes nothing, and the docstring beside each replacement is the reason for it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

Replacement = TypeVar("Replacement", bound=Callable[..., Any])

_replacements: list[tuple[object, str, Callable[..., Any]]] = []


def replaces(owner: object, *, name: str | None = None) -> Callable[[Replacement], Replacement]:
    """Register the decorated function or class for `owner.<name>`, by default the name that it has itself.

    One object per name: torch.compile's tables, which are keyed by identity, refuse an object that has two names.
    """

    def register(replacement: Replacement) -> Replacement:
        _replacements.append((owner, name or replacement.__name__, replacement))
        return replacement

    return register


def replace_all() -> None:
    """Put every registered replacement in place."""
    for owner, name, replacement in _replacements:
        setattr(owner, name, replacement)
