"""What travels over the tree of hosts, however wide it is."""

from typing import Any

import pytest

GROUPS = {
    "2": [[0, 1], [2, 3], [0, 2]],
    "3": [[0, 1, 2], [3], [0, 3]],
    "64": [[0, 1, 2, 3]],
}


@pytest.mark.parametrize("fan_out", GROUPS)
def test_every_rank_hears_from_all(fan_out: str, four_processes: list[dict[str, Any]]) -> None:
    for seen in four_processes:
        told = seen["hosts"][fan_out]
        assert told == {"groups": GROUPS[fan_out], "news": 10, "least": [4, 0], "gathered": [0, 1, 4, 9]}
