"""What a shell variable can hold, as far as a script's text says, and where in the text each letter of it stands.

A value is a row of parts. A `Piece` is text, or an expansion whose text can't be known, with the chain of places that
it came through: the word of the command that is run, the variable's expansion there, the variable's definition. A
`Choice` is a value that depends on a condition which the text doesn't decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_flexsp.convert.text import Span

_QUOTES_BETWEEN = 2
"""Bytes that may stand between two parts of a word: where one quotation ends and another begins."""

_MOST_ALTERNATIVES = 64
"""Commands that one line may become by the conditions before it."""


@dataclass(frozen=True)
class Condition:
    """What must hold for a part of a script to count."""

    text: str
    line: int
    likely: bool
    """Whether it holds as the script stands, with nothing set from outside; or nobody can say."""


@dataclass(frozen=True)
class Piece:
    text: str | None
    """None where it can't be known."""

    chain: tuple[Span, ...]
    """Places from the outermost, in the command that is run, to the innermost, where the letters stand."""

    exact: bool = True
    """Whether the innermost place has one byte for each letter of the text."""

    quoted: bool = True
    """Whether white space in it doesn't part words."""

    soft: bool = False
    """Whether the script's caller may change it: an environment variable's default."""

    raw: bool = False
    """Whether it stands in single quotes, where nothing is expanded."""

    caller: bool = False
    """Whether it is the arguments of the script: any number of words."""

    environment: bool = False
    """Whether it is a variable that the script never sets: empty, as far as the text says."""

    def cut(self, start: int, end: int) -> Piece:
        """Some of its letters."""
        assert self.text is not None
        if not self.exact or not self.chain:
            return replace(self, text=self.text[start:end])
        leaf = self.chain[-1]
        narrowed = Span(leaf.start + start, leaf.start + end, leaf.file)
        return replace(self, text=self.text[start:end], chain=(*self.chain[:-1], narrowed))


@dataclass(frozen=True)
class Option:
    value: tuple[Part, ...]
    condition: Condition


@dataclass(frozen=True)
class Choice:
    options: tuple[Option, ...]
    chain: tuple[Span, ...] = ()
    quoted: bool = True


Part = Piece | Choice
Value = tuple[Part, ...]


@dataclass(frozen=True)
class Element:
    """An array's element, and what must hold for it to be there."""

    value: Value
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Array:
    elements: tuple[Element, ...]


Variable = Value | Array


@dataclass(frozen=True)
class Word:
    """A word of a command after all expansions."""

    parts: Value
    conditions: tuple[Condition, ...] = ()

    @property
    def text(self) -> str | None:
        """What it most likely says; None where that can't be known."""
        texts = [part.text for part in likely(self.parts)]
        return None if any(text is None for text in texts) else "".join(text or "" for text in texts)

    @property
    def pattern(self) -> str:
        """Its text with a NUL for each part that can't be known."""
        return "".join("\0" if part.text is None else part.text for part in likely(self.parts))

    @property
    def fixed(self) -> bool:
        """Whether the text alone decides what it says."""
        return not self.conditions and is_fixed(self.parts)

    @property
    def likely(self) -> bool:
        return all(condition.likely for condition in self.conditions)

    def places(self) -> list[Span]:
        """Where it stands as a whole, outermost first: every level of expansion at which its parts are together."""
        chains = [part.chain for part in self.parts if part.chain]
        if not chains:
            return []
        common = 0
        while all(len(chain) > common and chain[common] == chains[0][common] for chain in chains):
            common += 1
        places = list(chains[0][:common])
        if any(len(chain) == common for chain in chains):
            return places
        following = [span for span, _ in itertools.groupby(chain[common] for chain in chains)]
        if all(
            one.file == other.file and 0 <= other.start - one.end <= _QUOTES_BETWEEN
            for one, other in itertools.pairwise(following)
        ):
            places.append(Span(following[0].start, following[-1].end, following[0].file))
        return places


def likely(parts: Sequence[Part]) -> Iterator[Piece]:
    """The parts with each choice made: its one likely option, or a piece that says that there are several."""
    for part in parts:
        if isinstance(part, Piece):
            yield part
            continue
        options = [option for option in part.options if option.condition.likely]
        texts = {plain_text(option.value) for option in options}
        if len(options) == 1 or len(texts) == 1:
            yield from likely(options[0].value)
        else:
            yield Piece(None, part.chain)


def plain_text(value: Value) -> str | None:
    """What a value most likely is."""
    texts = [piece.text for piece in likely(value)]
    return None if None in texts else "".join(text or "" for text in texts)


def possible_texts(value: Value) -> set[str | None]:
    """All that a value can be; None among them if some of it can't be known."""
    texts: set[str | None] = {""}
    for part in value:
        ways = {part.text} if isinstance(part, Piece) else set().union(*(possible_texts(o.value) for o in part.options))
        texts = {None if before is None or after is None else before + after for before in texts for after in ways}
    return texts


def is_fixed(value: Value) -> bool:
    """Whether nothing outside of the script can change a value."""
    return all(isinstance(part, Piece) and part.text is not None and not part.soft for part in value)


def within(value: Value, spans: Sequence[Span], quoted: bool) -> Value:
    """A value as it comes out of an expansion at ``spans``."""
    outer = tuple(spans)
    return tuple(
        replace(
            part,
            chain=(*outer, *part.chain),
            quoted=quoted,
            options=tuple(replace(option, value=within(option.value, outer, quoted)) for option in part.options),
        )
        if isinstance(part, Choice)
        else replace(part, chain=(*outer, *part.chain), quoted=quoted)
        for part in value
    )


def _identity(part: Part) -> object:
    """Equal for the same letters of the text, by whatever way they came."""
    if isinstance(part, Choice):
        return tuple(tuple(map(_identity, option.value)) for option in part.options)
    if part.text == " " and not part.exact:
        return " "  # between two elements of an array: no letter of the text
    return part.text, part.chain[-1:]


def merge(ways: Sequence[tuple[Variable, Condition]]) -> Variable:
    """What a variable can be after several ways through a script; what all of them share is certain."""
    first = ways[0][0]
    if all(variable == first for variable, _ in ways):
        return first
    if any(isinstance(variable, Array) for variable, _ in ways):
        rows = [_as_array(variable).elements for variable, _ in ways]
        head, tail = _shared([[_identities(element.value) for element in row] for row in rows])
        middle = [
            replace(element, conditions=(*element.conditions, condition))
            for row, (_, condition) in zip(rows, ways, strict=True)
            for element in row[head : len(row) - tail]
        ]
        return Array((*rows[0][:head], *middle, *rows[0][len(rows[0]) - tail :]))
    values: list[Value] = [variable for variable, _ in ways if not isinstance(variable, Array)]
    head, tail = _shared([_identities(value) for value in values])
    options: dict[object, Option] = {}
    for value, (_, condition) in zip(values, ways, strict=True):
        middle_part = value[head : len(value) - tail]
        key = tuple(_identities(middle_part))
        if key not in options or (condition.likely and not options[key].condition.likely):
            options[key] = Option(middle_part, condition)
    if len(options) == 1:
        return values[0]
    return (*values[0][:head], Choice(tuple(options.values())), *values[0][len(values[0]) - tail :])


def _identities(value: Value) -> list[object]:
    return [_identity(part) for part in value]


def _as_array(variable: Variable) -> Array:
    if isinstance(variable, Array):
        return variable
    return Array((Element(variable),) if variable else ())


def _shared(rows: Sequence[Sequence[object]]) -> tuple[int, int]:
    """How many items at the beginning, and of the others at the end, are the same in all rows."""
    shortest = min(map(len, rows))
    head = 0
    while head < shortest and all(row[head] == rows[0][head] for row in rows):
        head += 1
    tail = 0
    while tail < shortest - head and all(row[-1 - tail] == rows[0][-1 - tail] for row in rows):
        tail += 1
    return head, tail


@dataclass(frozen=True)
class Break:
    """The border between two elements of an array that is expanded into words."""

    conditions: tuple[Condition, ...] = ()
    """Of the element that follows."""


def words(parts: Iterable[Part | Break]) -> list[Word]:
    """Part what an expansion gave into words, as the shell does, but at blanks, tabs and newlines alone."""
    splitter = _Splitter()
    for part in parts:
        splitter.take(part)
    splitter.end_word()
    return splitter.words


class _Splitter:
    def __init__(self) -> None:
        self.words: list[Word] = []
        self._parts: list[Part] = []
        self._open = False
        self._conditions: tuple[Condition, ...] = ()

    def end_word(self) -> None:
        if self._open:
            self.words.append(Word(tuple(self._parts), self._conditions))
        self._parts, self._open = [], False

    def take(self, part: Part | Break) -> None:
        if isinstance(part, Break):
            self.end_word()
            self._conditions = part.conditions
        elif isinstance(part, Choice):
            self._take_choice(part)
        elif part.quoted or part.text is None:
            self._parts.append(part)
            self._open = True
        else:
            self._split(part)

    def _split(self, piece: Piece) -> None:
        assert piece.text is not None
        for blank, letters in itertools.groupby(enumerate(piece.text), key=lambda item: item[1] in " \t\n"):
            places = [place for place, _ in letters]
            if blank:
                self.end_word()
            else:
                self._parts.append(piece.cut(places[0], places[-1] + 1))
                self._open = True

    def _take_choice(self, choice: Choice) -> None:
        if choice.quoted or not _parts_words(choice):
            self._parts.append(choice)
            self._open = True
            return
        self.end_word()
        outer = self._conditions
        for option in choice.options:
            self._conditions = (*outer, option.condition)
            for part in option.value:
                self.take(part)
            self.end_word()
        self._conditions = outer


def alternatives(
    parts: Sequence[Part | Break], matters: Callable[[Value], bool]
) -> list[tuple[list[Part | Break], tuple[Condition, ...]]]:
    """A row of parts for each option of those choices that matter, with what must hold for it."""
    for place, part in enumerate(parts):
        if not isinstance(part, Choice) or not any(matters(option.value) for option in part.options):
            continue
        # An option's own parts are quoted as the choice is.
        ways = [
            (way, (option.condition, *conditions))
            for option in part.options
            for way, conditions in alternatives([*parts[:place], *option.value, *parts[place + 1 :]], matters)
        ]
        if len(ways) <= _MOST_ALTERNATIVES:
            return ways
    return [(list(parts), ())]


def _parts_words(choice: Choice) -> bool:
    """Whether an option is several words, or a flag: something that stands by itself where a variable is expanded."""
    texts = [
        "".join("\0" if piece.text is None else piece.text for piece in likely(option.value))
        for option in choice.options
    ]
    return any(len(text.split()) > 1 or text.strip() != text or text.startswith("-") for text in texts)
