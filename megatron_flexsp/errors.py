"""The one exception that this package raises for what a user can put right."""


class FlexSPError(Exception):
    """A mistake in a flag, a file or a cluster's shape.

    The message stands alone: it names the flag or file, says what was found and what to do.
    The launcher prints it once, without a stack.
    """
