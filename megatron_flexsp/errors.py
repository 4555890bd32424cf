"""The one exception that this package raises for what a user can put right."""


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
