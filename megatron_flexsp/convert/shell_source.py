"""Shell text to be parsed: a file, or what a script hands to another shell (``eval``, ``bash -c``, a here-document)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from megatron_flexsp.convert.shell_values import Choice, Part, Piece, Value, possible_texts, within
from megatron_flexsp.convert.text import MAIN_FILE, Span, line_of
from megatron_flexsp.errors import FlexSPError


@cache
def _parser() -> Any:
    try:
        import tree_sitter
        import tree_sitter_bash
    except ImportError as error:
        raise FlexSPError(
            f"reading shell scripts needs a package that is not installed ({error.name}): "
            "pip install 'megatron-flexsp[convert]'"
        ) from None
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


class Source:
    """A file. Bytes are read as Latin-1 throughout, so that a letter is a byte."""

    def __init__(self, data: bytes, file: int = MAIN_FILE) -> None:
        self.data = data
        self.file = file
        self.tree = _parser().parse(data)

    def text(self, start: int, end: int) -> str:
        return self.data[start:end].decode("latin-1")

    def cut(self, start: int, end: int) -> Value:
        """The letters of a stretch as they stand there."""
        return (Piece(self.text(start, end), (Span(start, end, self.file),)),)

    def span(self, start: int, end: int) -> Span | None:
        """Where a stretch stands in its file; None if it has been put together from several places."""
        return Span(start, end, self.file)

    def line(self, position: int) -> int:
        return line_of(self.data, position)


class NestedSource(Source):
    """Text that expansions made. What can't be known stands in it as one word."""

    def __init__(self, parts: Sequence[Part], line: int) -> None:
        self._line = line
        self._stretches: list[tuple[int, int, Part]] = []
        text = ""
        for number, part in enumerate(parts):
            known = isinstance(part, Piece) and part.text is not None
            letters = part.text if known else f"__UNKNOWN{number}__"  # type: ignore[union-attr]
            self._stretches.append((len(text), len(text) + len(letters or ""), part))
            text += letters or ""
        super().__init__(text.encode("latin-1"))

    def cut(self, start: int, end: int) -> Value:
        cut: list[Part] = []
        for first, last, part in self._stretches:
            low, high = max(first, start), min(last, end)
            if low >= high:
                continue
            if isinstance(part, Choice):
                # Its options are text of this shell's; one with quotes of its own can't be read, and stays one word.
                texts = [text for option in part.options for text in possible_texts(option.value)]
                parts_words = not any(text is not None and re.search(r"[\"'\\]", text) for text in texts)
                cut += within((part,), (), quoted=False) if parts_words else (replace(part, quoted=False),)
            elif part.text is None:
                cut.append(part)
            else:
                cut.append(replace(part.cut(low - first, high - first), raw=False, quoted=True))
        return tuple(cut)

    def span(self, start: int, end: int) -> Span | None:
        pieces = self.cut(start, end)
        leaves = [piece.chain[-1] for piece in pieces if isinstance(piece, Piece) and piece.exact and piece.chain]
        if not leaves or len(leaves) != len(pieces):
            return None
        for one, other in itertools.pairwise(leaves):
            if one.file != other.file or one.end != other.start:
                return None
        return Span(leaves[0].start, leaves[-1].end, leaves[0].file)

    def line(self, position: int) -> int:
        return self._line
