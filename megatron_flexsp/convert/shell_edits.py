"""Writes a decision's changes into a shell script: where each belongs, and in the script's own variables."""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_flexsp.convert.arguments import Value
from megatron_flexsp.convert.changes import Add, Change, Formula, Launch, Remove, SetValue
from megatron_flexsp.convert.shell_launch import RUN_MODULE
from megatron_flexsp.convert.shell_launch import Launch as Found
from megatron_flexsp.convert.shell_values import Array, Piece, possible_texts
from megatron_flexsp.convert.text import MAIN_FILE, Edit, Span, removal
from megatron_flexsp.errors import FlexSPError

_CONTINUED = re.compile(rb"[\"']?[ \t]*\\\r?\n([ \t]*)")
_NAME = re.compile(r"(\\?)\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


class ScriptEdits:
    """The edits for one training command."""

    def __init__(self, found: Found, data: bytes) -> None:
        self._found = found
        self._text = found.text
        self._data = data
        self._removed: list[int] = []
        self._edits: list[Edit] = []

    def edits(self, changes: Iterable[Change]) -> list[Edit]:
        """Edits that make all changes.

        Raises
        ------
        FlexSPError
            If one belongs into a place that can't be written to.
        """
        added: list[str] = []
        for change in changes:
            match change:
                case Launch():
                    self._put_launcher()
                case Add(flag=flag, value=None):
                    added.append(flag)
                case Add(flag=flag, value=Formula() as value):
                    added.append(f"{flag} {self._written(value)}")
                case Remove(argument=argument):
                    numbers = {argument.place, *(value.place for value in argument.values)}
                    self._removed += [number for number in numbers if isinstance(number, int)]
                case SetValue():
                    self._set(change)
        if added:
            self._put_flags(" ".join(added))
        return [*self._edits, *removal(self._data, self._removed_spans())]

    def _own(self, number: int, what: str) -> Span:
        span = self._text.own(number)
        if span is None:
            raise FlexSPError(
                f"line {self._found.job.line}: {what} is put together from several places of the script: write it as "
                "one word, then convert again"
            )
        if span.file != MAIN_FILE:
            raise FlexSPError(
                f"line {self._found.job.line}: {what} stands in a file that this script reads (source): change it "
                "there by hand, or convert that file, and put the launcher in here"
            )
        return span

    def _put_launcher(self) -> None:
        span = self._own(self._found.script, "the training script's name")
        self._edits.append(Edit(span.start, span.start, f"-m {RUN_MODULE} ".encode()))
        words = self._found.command.words[: self._found.script]
        options = {word.pattern for word in words}
        for number, word in enumerate(words):
            # The old launcher hands --local-rank to the module that it starts, in place of setting LOCAL_RANK.
            if word.text == "torch.distributed.launch" and not options & {"--use_env", "--use-env"}:
                place = self._own(number, "torch.distributed.launch")
                self._edits.append(Edit(place.start, place.end, b"torch.distributed.run"))

    def _put_flags(self, flags: str) -> None:
        """After the training script's name; on a line of their own where the command goes on on the next."""
        span = self._own(self._found.script, "the training script's name")
        continued = _CONTINUED.match(self._data, span.end)
        if continued is None or "'" in flags:
            self._edits.append(Edit(span.end, span.end, f" {flags}".encode()))
        else:
            newline = b"\r\n" if b"\r\n" in continued[0] else b"\n"
            line = continued[1] + flags.encode() + b" \\" + newline
            self._edits.append(Edit(continued.end() - len(continued[1]), continued.end() - len(continued[1]), line))

    def _set(self, change: SetValue) -> None:
        argument = change.argument
        texts = [self._written(value) for value in change.values]
        first = argument.values[0].place
        if first == argument.place:  # --flag=value
            assert isinstance(first, int)
            span = self._own(first, argument.flag)
            quote = self._data[span.start : span.start + 1].decode("latin-1")
            quote = quote if quote in "\"'" and self._data[span.end - 1 : span.end].decode("latin-1") == quote else ""
            self._edits.append(Edit(span.start, span.end, f"{quote}{argument.flag}={texts[0]}{quote}".encode()))
            return
        for value, text in zip(argument.values, texts, strict=False):
            assert isinstance(value.place, int)
            span = self._own(value.place, argument.written)
            self._edits.append(Edit(span.start, span.end, text.encode()))

    def _removed_spans(self) -> list[Span]:
        """The places of removed words; a quoted word of which nothing would be left goes with its quotes."""
        removed = set(self._removed)
        spans = []
        for number in sorted(removed):
            span = self._own(number, "an argument that is taken out")
            for outer in reversed(self._text.enclosing(number)):
                before, quoted = self._data[outer.start - 1 : outer.start], self._data[outer.start : outer.end]
                if (
                    outer.file == MAIN_FILE
                    and before != b"="
                    and quoted[:1] in (b'"', b"'")
                    and outer.start <= span.start
                    and span.end <= outer.end
                    and all(
                        other in removed
                        for other in range(len(self._text.words))
                        if outer in self._text.enclosing(other)
                    )
                ):
                    span = outer
                    break
            spans.append(span)
        return spans

    # Values in the script's own words.

    def _written(self, formula: Formula) -> str:
        if not formula.operands or formula.constant:
            if formula.text is None:
                raise FlexSPError(f"{formula.meaning or formula.template} can't be worked out")
            return formula.text
        raw = any(isinstance(part, Piece) and part.raw for part in self._found.command.words[self._found.script].parts)
        operands = [None if raw else self._operand(value) for value in formula.operands]
        known = [operand for operand in operands if operand is not None]
        escaped = {operand.startswith("\\") for operand in known if not operand.isdigit()}
        if len(known) < len(operands) or len(escaped) > 1:
            if formula.text is not None and all(value.fixed for value in formula.operands):
                return formula.text
            unclear = next(
                (value for value, operand in zip(formula.operands, operands, strict=True) if operand is None),
                formula.operands[0],
            )
            raise FlexSPError(
                f"line {self._found.job.line}: the script doesn't decide {unclear.source}, or not in all cases"
                + (f", so that {formula.meaning} can't be written down" if formula.meaning else "")
                + ". Give it a variable that is set before this command, or a number, then convert again"
            )
        if formula.template == "{}" and not known[0].startswith("("):
            return known[0]
        mark = "\\" if True in escaped else ""
        names = [_NAME.sub(lambda match: match[2] or match[3], operand) for operand in known]
        return f"{mark}$(({formula.template.format(*names)}))"

    def _operand(self, value: Value) -> str | None:
        """A value as shell arithmetic takes it; None if it can't be had where the command stands."""
        if value.literal:
            return value.source
        source = value.source.strip("\"'")
        name = _NAME.fullmatch(source)
        if name is not None:
            return source if self._same_here(name[2] or name[3], value) else None
        inner = re.fullmatch(r"\$\(\((.*)\)\)", source, re.DOTALL)
        if inner is not None and not re.search(r"[\\`\"'(]", inner[1]):
            return f"({inner[1]})"
        if re.fullmatch(r"\$\{[A-Za-z_]\w*(?::?-\d+|\[\w+\])\}|\$\d|\$\{\d\}|\$\{\d:?-\d+\}", source):
            return source
        return None

    def _same_here(self, name: str, value: Value) -> bool:
        """Whether a variable holds, where the command runs, what it held where the argument was written."""
        variable = self._found.command.variables.get(name)
        assert isinstance(value.place, int)
        there = possible_texts(self._text.words[value.place].parts)
        if variable is None:
            return None in there
        return not isinstance(variable, Array) and there <= possible_texts(variable)
