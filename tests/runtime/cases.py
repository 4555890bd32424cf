"""The cases of Ulysses attention that the processes run and the tests look up."""

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

    @property
    def name(self) -> str:
        words = [f"degree {self.degree}", f"{self.heads} heads", f"{self.key_value_heads} key/value heads"]
        words += ["lengths " + "+".join(map(str, self.lengths)), self.dtype]
        return ", ".join([*words, *(["transposed"] if self.transposed else [])])


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
