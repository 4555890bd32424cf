"""What a token capacity comes to: the tokens that slices really hold, and the ranks that a sequence needs."""

from collections.abc import Iterable


def usable_capacity(token_capacity: int, slice_multiple: int = 1) -> int:
    """Tokens that a rank's slice can hold where each is padded to a multiple of ``slice_multiple``."""
    return token_capacity // slice_multiple * slice_multiple


def narrowest_degree(
    degrees: Iterable[int],
    longest: int,
    token_capacity: int,
    *,
    slice_multiple: int = 1,
    static_domain_size: int | None = None,
) -> int | None:
    """The fewest ranks that hold a sequence.

    Parameters
    ----------
    degrees
        The degrees that may be used.
    longest
        Tokens of the sequence.
    token_capacity
        Tokens that a rank can hold in one micro-batch.
    slice_multiple
        Each rank's slice is padded up to a multiple of so many tokens.
    static_domain_size
        Ranks of the domain for plans with a single degree, which must divide it; None: any degree will do.

    Returns
    -------
    One of the degrees, or None where none holds the sequence.
    """
    per_slice = usable_capacity(token_capacity, slice_multiple)
    return min(
        (
            degree
            for degree in degrees
            if longest <= degree * per_slice and (static_domain_size is None or static_domain_size % degree == 0)
        ),
        default=None,
    )
