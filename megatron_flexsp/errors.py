"""The one exception that this package raises for what a user can put right."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_PARAMETER = re.compile(r"`(\w+)`")


class FlexSPError(Exception):
    """A mistake in a flag, a file or a cluster's shape.

    The message stands alone: it names the flag or file, says what was found and what to do.
    The launcher prints it once, without a stack; ``flexsp doctor`` shows its two parts.

    Parameters
    ----------
    found
        What is wrong, in words that need no remedy beside them.
    remedy
        What to do: a command that begins in lower case, such as ``raise --seq-length``, or with a flag. Empty where
        what was found says it.
    """

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(found, remedy)  # both, so that both go where it is pickled to
        self.found = found
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.found}. {self.remedy[0].upper()}{self.remedy[1:]}" if self.remedy else self.found


@contextmanager
def named_by_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """A block or function whose errors name a front end's flags in the place of a library's parameters.

    Parameters
    ----------
    flags
        What to put in the place of each parameter's name, which stands in backquotes: raise `token_capacity`.
    """
    try:
        yield
    except FlexSPError as error:
        named = (_PARAMETER.sub(lambda name: flags.get(name[1], name[0]), part) for part in error.args)
        raise FlexSPError(*named) from None
