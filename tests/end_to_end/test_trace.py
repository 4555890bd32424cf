"""``--flexsp-trace`` in a real run: every pass of every micro-batch on every rank, once and in order."""

from collections.abc import Callable
from pathlib import Path

from megatron_flexsp.report.trace_files import read_trace
from megatron_flexsp.trace_format import Kind

from .conftest import LLAMA


def test_a_run_leaves_a_trace_of_all_that_it_did(train: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    # Megatron's straggler report divides by the time that it has seen forward passes take.
    more = ("--flexsp-trace", str(folder), "--log-straggler")
    run = train(4, *LLAMA, "--pipeline-model-parallel-size", "2", *more)
    trace = read_trace(folder)
    assert [step.number for step in trace.steps] == [1, 2, 3, 4, 5] == sorted(run.losses)
    assert (trace.domain_size, trace.pipeline_stages) == (2, 2)
    for step in trace.steps:
        expected = {
            (place, rank, stage, kind)
            for place, item in enumerate(step.plan.micro_batches)
            for rank in item.ranks
            for stage in range(2)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
        }
        found = {(span.micro_batch, span.rank, span.stage, span.kind): span for span in step.spans}
        assert set(found) == expected
        assert len(step.spans) == len(expected)
        for (place, rank, stage, kind), span in found.items():
            assert 0 <= span.start_seconds < span.end_seconds
            if kind is Kind.FORWARD and stage == 0:
                assert span.end_seconds <= found[place, rank, 1, Kind.FORWARD].start_seconds + 1e-3
            if kind is Kind.BACKWARD and stage == 1:
                assert span.end_seconds <= found[place, rank, 0, Kind.BACKWARD].start_seconds + 1e-3
