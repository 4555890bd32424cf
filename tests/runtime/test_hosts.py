"""What travels over the tree of hosts, however wide it is."""

from typing import Any

import pytest
import torch.distributed as dist

from megatron_flexsp.runtime import Hosts

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


@pytest.mark.parametrize(("rank", "sizes"), [(0, [8, 8, 8, 8, 2]), (8, [8, 8]), (8191, [8])])
def test_no_rank_of_thousands_has_many_neighbours(rank: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8192)
    groups: list[list[int]] = []
    Hosts(groups.append)  # type: ignore[arg-type]  # the groups' ranks are all that is looked at
    assert [len(group) for group in groups if rank in group] == sizes
    assert sorted(member for group in groups[: 8192 // 8] for member in group) == list(range(8192))
