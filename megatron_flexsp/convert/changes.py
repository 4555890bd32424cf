"""What is to be done to an argument list, whatever file it stands in, each with its line of why."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_flexsp.convert.arguments import Argument, Value
from megatron_flexsp.convert.shell_number import calculate


@dataclass(frozen=True)
class Formula:
    """A value to be written: a constant, or worked out from values that the file gives."""

    template: str
    """Shell arithmetic with ``{}`` for each operand."""
    operands: tuple[Value, ...] = ()
    meaning: str = ""
    """In words."""

    @staticmethod
    def of(constant: object) -> Formula:
        return Formula(str(constant))

    @property
    def text(self) -> str | None:
        """What it comes to as the file stands; None if that can't be known."""
        if not self.operands:
            return self.template
        numbers = [value.number for value in self.operands]
        if None in numbers:
            return None
        result = calculate(self.template.format(*numbers))
        return None if result is None else str(result)

    @property
    def number(self) -> int | None:
        text = self.text
        return int(text) if text is not None and text.isdigit() else None

    @property
    def constant(self) -> bool:
        """Whether all operands are numbers that stand in the file as such."""
        return all(value.literal for value in self.operands)


@dataclass(frozen=True)
class Launch:
    """FlexSP's launcher goes before the training script."""

    why: str


@dataclass(frozen=True)
class Add:
    flag: str
    value: Formula | None
    why: str


@dataclass(frozen=True)
class Remove:
    argument: Argument
    why: str


@dataclass(frozen=True)
class SetValue:
    """Another value, or others, for a flag that is there."""

    argument: Argument
    values: tuple[Formula, ...]
    why: str


Change = Launch | Add | Remove | SetValue
