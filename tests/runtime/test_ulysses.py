"""Ulysses attention in real processes: each rank's slice of the result is that of the whole pack on one process."""

from typing import Any

import pytest

from megatron_flexsp.runtime.ulysses import key_value_heads_needed
from tests.runtime.cases import CASES, Case

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_result_and_gradients_are_those_of_one_process(case: Case, four_processes: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(four_processes[: 3 if case.degree == 3 else 4]):
        found = seen["differences"][case.name]
        assert found.keys() == {"out", "dq", "dk", "dv"}
        for name, difference in found.items():
            assert difference < TOLERANCE[case.dtype], f"{name} on rank {rank}"


@pytest.mark.parametrize(
    ("key_value_heads", "degree", "needed"), [(8, 2, 8), (8, 8, 8), (2, 4, 4), (1, 8, 8), (3, 2, 6), (6, 4, 12)]
)
def test_key_value_heads_are_repeated_only_as_often_as_they_must(
    key_value_heads: int, degree: int, needed: int
) -> None:
    assert key_value_heads_needed(key_value_heads, degree) == needed


def test_one_part_is_exchanged_while_another_attends(four_processes: list[dict]) -> None:
    """In two parts: between the first's way there and the last's way back, each exchange spans an attention."""
    way = "begin begin end attend begin end attend begin end end"
    for seen in four_processes:
        assert " ".join(seen["order"]) == f"{way} loss {way}"
