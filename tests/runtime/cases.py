"""The cases of attention over a group that the processes run and the tests look up."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    degree: int
    heads: int
    key_value_heads: int
    lengths: tuple[int, ...] = (5, 17, 3)
    dtype: str = "float32"
    transposed: bool = False
    """Inputs and the result's gradient are views with strides that are not those of a dense tensor."""
    slice_multiple: int = 1
    value_width: int = 8
    """Queries and keys are 8 wide."""
    parts: int = 1

    @property
    def name(self) -> str:
        words = [f"degree {self.degree}", f"{self.heads} heads", f"{self.key_value_heads} key/value heads"]
        words += ["lengths " + "+".join(map(str, self.lengths)), self.dtype]
        words += ["transposed"] * self.transposed + [f"slices of {self.slice_multiple}s"] * (self.slice_multiple > 1)
        words += [f"values {self.value_width} wide"] * (self.value_width != 8)
        words += [f"{self.parts} parts"] * (self.parts > 1)
        return ", ".join(words)


CASES = [
    *[Case(degree, 4, few) for degree in (1, 2, 4) for few in (1, 2, 4)],
    *[Case(degree, 8, few) for degree in (2, 4) for few in (1, 2, 4, 8)],
    # Heads of which the degree is no multiple, nor they of it: both must be repeated to their common multiple.
    Case(2, 6, 3),
    Case(4, 12, 6),
    # One token; a slice that is all padding; a pack without padding.
    Case(4, 4, 2, lengths=(1,)),
    Case(4, 4, 4, lengths=(2, 1, 2)),
    Case(2, 4, 2, lengths=(8, 4, 20)),
    *[Case(degree, 8, few, transposed=True) for degree in (2, 4) for few in (2, 8)],
    *[Case(degree, 8, few, dtype="bfloat16") for degree in (2, 4) for few in (2, 8)],
    Case(4, 8, 2, dtype="bfloat16", transposed=True),
]

# More ranks than query heads: blocks of 2 ranks, or of one, in a ring of 2, 3 or 4.
CASES += [
    *[Case(4, 2, few, lengths) for few in (1, 2) for lengths in [(41,), (5, 17, 3), (1, 1, 2, 30, 1, 7)]],
    *[Case(degree, 1, 1, lengths) for degree in (2, 3, 4) for lengths in [(64,), (5, 17, 3), (1,), (2, 1)]],
    *[Case(4, 6, few) for few in (1, 2, 3, 6)],
    *[Case(degree, heads, 1, (50, 9), "bfloat16") for degree, heads in ((4, 2), (3, 2), (4, 1))],
    Case(4, 2, 1, transposed=True),
    Case(3, 4, 2, (2, 1, 1, 33, 6), transposed=True),
    # A slice's multiple leaves a block with padding alone.
    Case(4, 2, 2, (3,), slice_multiple=4),
    Case(4, 2, 1, (19, 6), slice_multiple=4),
]

CASES += [
    *[Case(degree, 4, few, value_width=4) for degree in (1, 2, 4) for few in (1, 4)],
    Case(2, 4, 4, value_width=16, transposed=True),
    Case(4, 8, 8, value_width=16, dtype="bfloat16", transposed=True),
    # In rings.
    *[Case(4, 2, 2, value_width=width) for width in (4, 16)],
]

# Exchanged in parts: key/value heads of each part's own, shared by parts, sent to several ranks, or one part after all.
CASES += [
    *[Case(2, 8, few, parts=parts) for few in (8, 4, 2, 1) for parts in (2, 4)],
    *[Case(4, 8, few, parts=2, value_width=6) for few in (8, 4, 1)],
    Case(2, 12, 6, parts=3, transposed=True),
    Case(2, 12, 4, parts=4),
    Case(4, 8, 8, parts=3),
    Case(4, 4, 4, parts=2),
    Case(4, 8, 2, parts=2, dtype="bfloat16", transposed=True),
    Case(4, 2, 1, parts=2),
]
