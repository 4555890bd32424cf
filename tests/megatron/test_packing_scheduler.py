"""Our planner as a scheduler of Megatron's dynamic context parallelism.

The installed release has no such schedulers, so that here the flags, the groups and the lookahead are tried; the
whole runs by hand on a checkout that has them, named by FLEXSP_TEST_MEGATRON_DEV (docs/comparison.md).
"""

import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import plugin
from megatron_flexsp.megatron.lookahead import Lookahead, lengths_of
from megatron_flexsp.megatron.packing_scheduler import PackingJob, group_sizes, scheduler_class

ASKED = ["--dynamic-context-parallel", "--sequence-packing-scheduler", "flexsp"]


@pytest.mark.parametrize(
    ("command_line", "asks"),
    [
        (ASKED, True),
        (["--sequence-packing-scheduler=flexsp"], True),
        (["--sequence-packing-scheduler", "dp_balanced"], False),
        (["--sequence-packing-scheduler", "flexsp", "--sequence-packing-scheduler", "dp_balanced"], False),
        (["--save", "flexsp"], False),
    ],
)
def test_only_the_schedulers_name_asks_for_it(command_line: list[str], asks: bool) -> None:
    assert plugin.asks_for_scheduler(command_line) is asks


@pytest.fixture
def flags_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "flags_seams", list)


@pytest.mark.usefixtures("flags_as_they_are")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--flexsp"], r"--flexsp and --sequence-packing-scheduler flexsp are two ways: .* Take one of them out"),
        (["--flexsp-profile=f.json"], r"are two ways"),
        (["--flexsp-trace", "t"], r"^--flexsp-trace: .* takes only --flexsp-cost-model, --flexsp-degrees"),
        ([], r"Megatron \S+ of \S+ has no dynamic context parallelism .* dev branch .* use --flexsp"),
    ],
)
def test_what_cannot_be_had_is_refused(more: list[str], message: str) -> None:
    """The last one: by the installed release, which has the module but no schedulers in it."""
    with pytest.raises(FlexSPError, match=message):
        plugin.install([*ASKED, *more])


@pytest.mark.parametrize(
    ("domain_size", "narrowest", "sizes"),
    [(8, 1, (1, 2, 4, 8)), (8, 4, (4, 8)), (12, 1, (1, 2, 4, 12)), (6, 1, (1, 2, 6)), (1, 1, (1,)), (2, 2, (2,))],
)
def test_group_sizes_are_those_that_megatron_makes(domain_size: int, narrowest: int, sizes: tuple[int, ...]) -> None:
    """By its rule: 2**i for i below the whole part of log2(ranks), and all ranks."""
    assert group_sizes(domain_size, narrowest) == sizes


class Base:
    """What ours takes from Megatron's own scheduler."""

    microbatch_group_size_per_vp_stage: int | None = None


def job_of(parse: Callable[..., Namespace], more: str = "", **values: Any) -> PackingJob:
    """Eight data-parallel ranks with 64 tokens each."""
    args = parse(f"--bf16 {more}")
    vars(args).update(
        rank=1,
        data_parallel_size=4,
        context_parallel_size=2,
        min_dynamic_context_parallel_size=1,
        max_seqlen_per_dp_cp_rank=64,
        seq_length=512,
        params_dtype=torch.bfloat16,
        ffn_hidden_size=128,
        kv_channels=4,
        padded_vocab_size=256,
    )
    vars(args).update(values)
    job = PackingJob()
    job.configure(args)
    return job


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXSP_DEVICE", "cpu")


@pytest.mark.usefixtures("on_cpu")
def test_groups_are_what_megatrons_executor_takes(parse: Callable[..., Namespace]) -> None:
    """Each rank in one group of each round, by sample ids; as many rounds as an interleaved pipeline takes."""
    scheduler = scheduler_class(Base, job_of(parse))()
    scheduler.microbatch_group_size_per_vp_stage = 2
    lengths = dict(enumerate([512, 16, 32, 48, 64, 128, 16, 256, 16, 16, 16, 64], start=100))
    groups = scheduler.get_groups_and_subsamples(list(lengths.items()))
    assert len(groups) % 2 == 0
    seen: list[int] = []
    for ranks in groups:
        assert len(ranks) == 8 and all(ranks)
        first = 0
        while first < 8:
            # Megatron finds a group's size by counting the ranks that hold its first sample.
            degree = sum(ranks[first][0] in held for held in ranks)
            assert degree in group_sizes(8) and first % degree == 0
            assert ranks[first : first + degree] == [ranks[first]] * degree
            assert sum(lengths[identity] for identity in ranks[first]) <= 64 * degree
            seen += ranks[first]
            first += degree
    assert sorted(seen) == sorted(lengths)


@pytest.mark.usefixtures("on_cpu")
def test_lengths_that_a_group_cannot_cut(parse: Callable[..., Namespace]) -> None:
    scheduler = scheduler_class(Base, job_of(parse))()
    with pytest.raises(FlexSPError, match=r"don't divide by 2 x 8 ranks .* Pad them to a multiple of 2 x 8"):
        scheduler.get_groups_and_subsamples([(0, 500)])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--flexsp-degrees 1,3", r"--flexsp-degrees: Megatron makes no groups of 3 ranks here; it has 1, 2, 4, 8"),
        ("--flexsp-degrees 1,4", r"--seq-length 512 doesn't fit: the widest group that may be used has 4 ranks"),
        ("--cp-comm-type a2a --group-query-attention --num-query-groups 4", r"the widest group .* has 4 ranks"),
        ("--flexsp-solver-time-limit -1", r"--flexsp-solver-time-limit -1\.0: must be at least 0"),
    ],
)
def test_flags_that_do_not_fit_the_job(more: str, message: str, parse: Callable[..., Namespace]) -> None:
    with pytest.raises(FlexSPError, match=message):
        job_of(parse, more)


class Kept:
    """As Megatron's RerunDataIterator: keeps what it hands out."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.iterable, self.kept = source, list[Any]()

    def __next__(self) -> Any:
        self.kept.append(next(self.iterable))
        return self.kept[-1]


def test_what_is_only_looked_at_still_comes() -> None:
    kept = Kept(iter(range(5)))
    ahead = Lookahead.beneath([None, kept])
    assert ahead is not None
    assert ahead.peek(3) == [0, 1, 2]
    assert kept.kept == []
    assert Lookahead.beneath(kept) is ahead
    assert [next(kept) for _ in range(4)] == [0, 1, 2, 3]
    assert ahead.peek(3) == [4]
    assert [next(kept)] == [4]
    with pytest.raises(StopIteration):
        next(kept)
    assert Lookahead.beneath(iter(range(5))) is None
    assert Lookahead.beneath([None, None]) is None


def test_lengths_of_packs_and_of_single_sequences() -> None:
    pack = {"cu_seqlens": torch.tensor([[0, 16, 48, 48]])}
    single = {"padded_seq_len": torch.tensor([32])}
    assert lengths_of([[single, single], pack]) == [32, 32, 16, 32]


@pytest.mark.usefixtures("on_cpu")
def test_a_step_that_was_seen_ahead_is_not_planned_again(parse: Callable[..., Namespace]) -> None:
    job, ahead, lengths = job_of(parse), Lookahead(iter(())), np.full(16, 32)
    job.submit(ahead, lengths, 1)
    assert ahead.pending is not None
    assert job.plan(ahead, lengths, 1) == ahead.pending.answer.result()
    other = np.full(8, 64)
    job.plan(ahead, other, 1).validate(other, 64)


MEGATRON_DEV = os.environ.get("FLEXSP_TEST_MEGATRON_DEV")


@pytest.mark.skipif(MEGATRON_DEV is None, reason="FLEXSP_TEST_MEGATRON_DEV names no checkout of Megatron's dev branch")
def test_on_a_checkout(torchrun: Callable, tmp_path: Path) -> None:
    """Four ranks: Megatron's own fetching, rerouting and packing around our plans, three steps."""
    script = Path(__file__).parent / "four_ranks_of_dev.py"
    stand_ins = Path(__file__).parents[1] / "stand_ins"
    path = os.pathsep.join([str(stand_ins), str(MEGATRON_DEV)])
    torchrun(4, str(script), str(tmp_path), env={"PYTHONPATH": path}, fresh=True)
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    for step in range(3):
        counts = {rank["steps"][step]["micro_batches"] for rank in seen}
        assert len(counts) == 1
        parts = {tuple(part) for rank in seen for part in rank["steps"][step]["sequences"]}
        assert len(parts) == seen[0]["steps"][step]["sequences_of_batch"]
    assert re.fullmatch("2 plans ahead", seen[0]["ahead"])
