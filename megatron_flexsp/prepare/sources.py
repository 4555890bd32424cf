"""Where documents come from: JSON lines, or the source files of Python's standard library.

A source yields one ``Record`` for each document, in a fixed order, and holds one of them in memory at a time.
"""

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from megatron_flexsp.errors import FlexSPError


class Record(NamedTuple):
    """One document of a source."""

    text: bytes
    """Its UTF-8 bytes; empty if the source holds an empty document here."""
    bytes_read: int
    """How many bytes of the source it took, for progress."""


class Source(Protocol):
    """Anything that yields documents."""

    @property
    def total_bytes(self) -> int:
        """The sum of ``bytes_read`` over all records."""

    def __iter__(self) -> Iterator[Record]: ...


@dataclass(frozen=True)
class JsonLines:
    """Files with a JSON object on each line; blank lines are passed over.

    Raises ``FlexSPError``, with file and line, where a line is not such an object or has no text.
    """

    paths: tuple[Path, ...]
    key: str = "text"
    """The key of an object that holds the document."""

    @property
    def total_bytes(self) -> int:
        return sum(_size_bytes(path) for path in self.paths)

    def __iter__(self) -> Iterator[Record]:
        for path in self.paths:
            yield from self._records(path)

    def _records(self, path: Path) -> Iterator[Record]:
        try:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield Record(self._text(line, f"{path}, line {number}"), len(line))
        except OSError as error:
            raise FlexSPError(f"cannot read {path}: {error.strerror}") from error

    def _text(self, line: bytes, place: str) -> bytes:
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise FlexSPError(f"{place}: not UTF-8 (byte {error.start + 1})") from error
        except (ValueError, RecursionError) as error:
            raise FlexSPError(f"{place}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise FlexSPError(f"{place}: expected a JSON object, found {_json_type(value)}")
        if self.key not in value:
            found = ", ".join(map(repr, value)) or "no keys"
            raise FlexSPError(f"{place}: no key {self.key!r} (found {found}); --json-key names the text's key")
        text = value[self.key]
        if not isinstance(text, str):
            raise FlexSPError(f"{place}: {self.key!r} must be a string, found {_json_type(text)}")
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise FlexSPError(f"{place}: {self.key!r} holds half a surrogate pair") from error


@dataclass(frozen=True)
class StandardLibrary:
    """The ``.py`` files of the running Python's standard library, in the order of their paths.

    A corpus with a long tail that every machine already has. Third-party packages are left out.
    """

    root: Path = Path(sysconfig.get_path("stdlib"))

    @property
    def total_bytes(self) -> int:
        return sum(_size_bytes(path) for path in self._paths())

    def __iter__(self) -> Iterator[Record]:
        for path in self._paths():
            try:
                text = path.read_bytes()
            except OSError as error:
                raise FlexSPError(f"cannot read {path}: {error.strerror}") from error
            yield Record(text, len(text))

    def _paths(self) -> list[Path]:
        found: list[Path] = []
        for directory, subdirectories, names in os.walk(self.root):
            subdirectories[:] = [name for name in subdirectories if name not in _NOT_STANDARD_LIBRARY]
            found.extend(Path(directory, name) for name in names if name.endswith(".py"))
        return sorted(found)


_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FlexSPError(f"cannot read {path}: {error.strerror}") from error


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
