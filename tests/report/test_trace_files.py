"""The trace of a run, as its ranks leave it, whole and damaged."""

import json
from pathlib import Path

import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel, MicroBatch, Plan
from megatron_flexsp.planner.plans_file import planned_line
from megatron_flexsp.report.trace_files import read_trace
from megatron_flexsp.trace_format import PLANS, TraceWriter, rank_file

COSTS = CostModel(
    memory_budget_bytes=1000,
    model_state_bytes=0,
    activation_bytes_per_token=1,
    attention_seconds_per_token_squared=0,
    linear_seconds_per_token=1e-3,
    micro_batch_overhead_seconds=0.1,
    exchange_bytes_per_token=1,
    exchange_bandwidth_bytes_per_second={2: 4000},
)
PLAN = Plan(
    2, "nested", (MicroBatch(0, 2, (0,)), MicroBatch(0, 1, (1,)), MicroBatch(1, 1, ())), 0.5, 0.4, 0.0, "feasible"
)
LENGTHS = [300, 50]


def write(folder: Path, steps: range, ranks: tuple[int, ...] = (0, 1)) -> None:
    plans = TraceWriter(folder, PLANS, 2, 1)
    for step in steps:
        plans.write_plan(planned_line(PLAN, LENGTHS, COSTS, step=step))
    plans.close()
    for rank in ranks:
        writer = TraceWriter(folder, rank_file(rank, 0), 2, 1)
        for step in steps:
            passes = [(0, "forward", 0.0, 0.1), (0, "backward", 0.1, 0.3), (1 + rank, "forward", 0.3, 0.4)]
            writer.write_passes(step, 100.0 * step + 0.25 * rank, 0.5, 0.01 * rank, passes)
        writer.close()


def test_ranks_are_put_on_one_clock(tmp_path):
    write(tmp_path, range(1, 4))
    trace = read_trace(tmp_path)
    assert (trace.domain_size, trace.pipeline_stages, trace.is_measured) == (2, 1, True)
    assert [step.number for step in trace.steps] == [1, 2, 3]
    step = trace.steps[1]
    found = {
        (span.rank, span.micro_batch, str(span.kind)): (span.start_seconds, span.end_seconds) for span in step.spans
    }
    assert found[0, 0, "backward"] == pytest.approx((0.1, 0.3))
    assert found[1, 0, "backward"] == pytest.approx((0.35, 0.55))
    assert found[1, 2, "forward"] == pytest.approx((0.55, 0.65))
    assert step.seconds == 0.5
    assert step.waited_seconds == 0.01
    assert step.degrees.tolist() == [2, 1]
    assert step.busy_share == pytest.approx((0.4 + 0.3) / (2 * 0.5))  # rank 1's last pass is a filler


def test_a_killed_run_loses_its_last_step_and_says_so(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / rank_file(1, 0)
    path.write_text(path.read_text()[:-5])
    trace = read_trace(tmp_path)
    assert [step.number for step in trace.steps] == [1, 2]
    assert trace.notes == ("the last 1 steps are incomplete and left out",)


def test_after_a_resume_the_later_run_of_a_step_counts(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, range(2, 6))
    assert [step.number for step in read_trace(tmp_path).steps] == [1, 2, 3, 4, 5]


def test_refuses_a_trace_that_lacks_a_rank(tmp_path):
    write(tmp_path, range(1, 3), ranks=(0,))
    with pytest.raises(FlexSPError, match=r"rank-1-stage-0.jsonl is missing; the trace is of 2 ranks"):
        read_trace(tmp_path)


def test_refuses_a_trace_that_was_cut_in_the_middle(tmp_path):
    write(tmp_path, range(1, 4))
    path = tmp_path / rank_file(1, 0)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[3:]]))
    with pytest.raises(FlexSPError, match=r"step 2 is not in rank-1-stage-0.jsonl"):
        read_trace(tmp_path)
    path.write_text("".join([*lines[:2], lines[2][:40] + "\n", lines[3]]))
    with pytest.raises(FlexSPError, match=r"rank-1-stage-0.jsonl, line 3: broken"):
        read_trace(tmp_path)


def test_refuses_files_of_runs_of_different_sizes(tmp_path):
    write(tmp_path, range(1, 3))
    with pytest.raises(FlexSPError, match=r"--flexsp-trace .*plans.jsonl is of another run .*Give another folder"):
        TraceWriter(tmp_path, PLANS, 4, 1)
    path = tmp_path / rank_file(0, 0)
    header, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps(json.loads(header) | {"domain_size": 4}) + "\n", *lines]))
    with pytest.raises(FlexSPError, match=r"rank-0-stage-0.jsonl is of another run: .*'domain_size': 4"):
        read_trace(tmp_path)


def test_refuses_a_folder_without_a_trace(tmp_path):
    with pytest.raises(FlexSPError, match=r"holds no plans.jsonl; give the folder that was --flexsp-trace"):
        read_trace(tmp_path)
