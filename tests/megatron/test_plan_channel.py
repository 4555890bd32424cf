"""Plans in real processes: all ranks run the planning rank's plan, or all stop with the same error."""

from typing import Any

import pytest

from megatron_flexsp.planner import MicroBatch, Plan

Seen = list[dict[str, Any]]


def test_the_plan_of_the_planning_rank_arrives_whole(two_processes: Seen) -> None:
    micro_batches = (MicroBatch(0, 2, (0,)), MicroBatch(1, 1, (1,)), MicroBatch(0, 1, (2,)))
    sent = Plan(2, "nested", micro_batches, 1.5, 1.25, 0.5, "heuristic")
    assert [Plan.from_json(seen["plan"]) for seen in two_processes] == [sent, sent]


@pytest.mark.parametrize("case", ["other lengths", "other order"])
def test_ranks_that_see_another_batch_are_named_everywhere(case: str, two_processes: Seen) -> None:
    first, second = (seen[case] for seen in two_processes)
    assert first == second
    assert first.startswith("error: rank(s) [1] differ from rank 0 in the lengths of the sequences")
    assert "--data-path" in first


def test_ranks_that_read_another_plan_are_named_everywhere(two_processes: Seen) -> None:
    first, second = (seen["other version"] for seen in two_processes)
    assert first == second
    assert first.startswith("error: rank(s) [1] differ from rank 0 in the plan -> run the same version")


def test_why_there_is_no_plan_is_told_everywhere(two_processes: Seen) -> None:
    assert [seen["no plan"] for seen in two_processes] == ["error: sequence 2 is too long -> split it"] * 2


def test_the_channel_outlives_an_error(two_processes: Seen) -> None:
    assert all(seen["plan again"] == seen["plan"] for seen in two_processes)


def test_all_ranks_run_the_same_batches_each_its_own_part(two_processes: Seen) -> None:
    first, second = (seen["batches"] for seen in two_processes)
    assert [batch[:2] for batch in first] == [batch[:2] for batch in second]
    assert [len(lengths) for lengths, _, _ in first] == [4, 4, 4], "an incomplete batch is left out"
    assert all(mine != theirs for (_, _, mine), (_, _, theirs) in zip(first, second, strict=True))


def test_a_batch_without_a_plan_stops_all_ranks(two_processes: Seen) -> None:
    stopped = [seen["batches that stop"] for seen in two_processes]
    assert len(stopped[0]) == len(stopped[1])
    assert stopped[0][-1] == stopped[1][-1]
    assert "has 41 tokens, but the widest allowed group holds 40" in stopped[0][-1]


def test_ranks_share_the_reading_of_packs_and_know_all_of_their_sequences(two_processes: Seen) -> None:
    (lengths, handles, first_read), second = (seen["packs"] for seen in two_processes)
    assert second[:2] == [lengths, handles]
    assert (first_read, second[2]) == ([2, 4, 6], [3, 5])
    assert lengths == [length for number in range(2, 7) for length in range(1, number + 1)]
    assert handles[:5] == [[2, 0], [2, 1], [3, 0], [3, 1], [3, 3]]


def test_a_pack_that_one_rank_cannot_read_stops_all_ranks(two_processes: Seen) -> None:
    first, second = (seen["packs that stop"] for seen in two_processes)
    assert first == second
    assert first.startswith("packs: sample 4 can't be read: OSError: a disk is gone (")
