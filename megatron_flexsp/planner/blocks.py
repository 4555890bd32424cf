"""Which groups exist: the legal degrees of a domain and the aligned blocks of each degree.

Aligned blocks nest or are disjoint, so a domain needs only about log2(domain size) groups per rank,
and a list of micro-batches whose degrees never increase leaves nobody waiting.
"""


def is_power_of_two(number: int) -> bool:
    """Whether ``number`` is 1, 2, 4, 8, ..."""
    return number >= 1 and number & (number - 1) == 0


def is_legal_degree(degree: int, domain_size: int) -> bool:
    """Whether a domain has blocks of this degree: a power of two that fits, or the whole domain."""
    return degree == domain_size or (is_power_of_two(degree) and degree < domain_size)


def legal_degrees(domain_size: int) -> tuple[int, ...]:
    """The degrees that a domain of this size offers, narrowest first.

    >>> legal_degrees(12)
    (1, 2, 4, 8, 12)
    """
    powers = [1 << exponent for exponent in range(domain_size.bit_length()) if 1 << exponent <= domain_size]
    return tuple(powers if powers[-1] == domain_size else [*powers, domain_size])


def first_ranks(degree: int, domain_size: int) -> range:
    """The first ranks of the aligned blocks of one degree; ranks left over at the end belong to none.

    >>> list(first_ranks(4, 10))
    [0, 4]
    """
    return range(0, domain_size - degree + 1, degree)


def is_aligned_block(first_rank: int, degree: int, domain_size: int) -> bool:
    """Whether the ranks from ``first_rank`` on, ``degree`` of them, form a legal block of the domain."""
    return is_legal_degree(degree, domain_size) and first_rank in first_ranks(degree, domain_size)
