"""The pool of groups in real processes: which exist, which are made anew, and that they connect the right ranks."""

from typing import Any


def test_a_rank_is_in_one_group_of_each_degree(four_processes: list[dict[str, Any]]) -> None:
    whole = [0, 1, 2, 3]
    assert [seen["one domain"]["blocks"] for seen in four_processes] == [
        {"0+1": [0, None], "0+2": [0, [0, 1]], "0+4": [0, whole]},
        {"1+1": [0, None], "0+2": [1, [0, 1]], "0+4": [1, whole]},
        {"2+1": [0, None], "2+2": [0, [2, 3]], "0+4": [2, whole]},
        {"3+1": [0, None], "2+2": [1, [2, 3]], "0+4": [3, whole]},
    ]


def test_every_rank_makes_all_groups_in_one_order_and_none_twice(four_processes: list[dict[str, Any]]) -> None:
    for seen in four_processes:
        # The whole domain's group was there already, and a group of one needs none.
        assert seen["one domain"]["created"] == [[0, 1], [2, 3]]
        assert seen["one domain"]["communicators"] == 2
        assert seen["two domains"]["created"] == []
        assert seen["two domains"]["communicators"] == 1


def test_domains_may_be_strided(four_processes: list[dict[str, Any]]) -> None:
    assert [seen["two domains"]["domain"] for seen in four_processes] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [seen["two domains"]["blocks"] for seen in four_processes] == [
        {"0+1": [0, None], "0+2": [0, [0, 2]]},
        {"0+1": [0, None], "0+2": [0, [1, 3]]},
        {"1+1": [0, None], "0+2": [1, [0, 2]]},
        {"1+1": [0, None], "0+2": [1, [1, 3]]},
    ]


def test_groups_connect_their_ranks(four_processes: list[dict[str, Any]]) -> None:
    """Rank r gave 10^r: the digits of a sum are the ranks that it came from."""
    assert [seen["sums"] for seen in four_processes] == [[1111, 101], [1111, 1010], [1111, 101], [1111, 1010]]
