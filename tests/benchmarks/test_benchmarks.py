"""The benchmarks run, and their sums are right."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cpu_throughput import RANKS_PER_HOST, Setting, slow_links
from benchmarks.harness.corpora import wikipedia_lengths
from benchmarks.harness.summary import Summary
from benchmarks.plugin_share import TRACER, calls_of_step, own_seconds, seconds_within
from megatron_flexsp.planner import CostModel

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = CostModel(
    memory_budget_bytes=1e9,
    model_state_bytes=0,
    activation_bytes_per_token=1e6,
    attention_seconds_per_token_squared=0,
    linear_seconds_per_token=0,
    micro_batch_overhead_seconds=0,
    exchange_bytes_per_token=16_384,
    exchange_bandwidth_bytes_per_second={2: 1e15, 4: 1e15, 8: 1e15},
)


def benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    environment = {**os.environ, "COLUMNS": "400"}  # or a heading is broken over two lines
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def step(**figures: object) -> dict[str, object]:
    usual = {"cpu_seconds": [1.0] * 8, "exchange_cpu_seconds": [0.25] * 8, "seconds": 4.0, "tokens": 100}
    return usual | figures


def test_a_pack_of_all_ranks_takes_as_long_as_the_link():
    # Half of each rank's bytes leave its host, and the link carries those of four ranks, both ways at once.
    tokens, bits_per_second = 4096, 40e6
    seconds = Setting("hosts", "", bits_per_second).cost_model(LOOPBACK).micro_batch_seconds([tokens], 8)
    sent_bytes = tokens * 16_384 / 8 / 2 * RANKS_PER_HOST
    assert seconds == pytest.approx(sent_bytes * 8 / (0.94 * bits_per_second))
    assert Setting("hosts", "", bits_per_second).cost_model(LOOPBACK).micro_batch_seconds([tokens], 4) < 1e-3


def test_links_are_slower_than_compute_by_the_ratio(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    static = Summary([step(exchange_link_bytes=[1e6] * 4 + [2e6] * 4)])
    # 6 s of computing on 2 cores; 8 MB the busier way.
    rates = [setting.bits_per_second for setting in slow_links(static, (1.0, 2.0))]
    assert rates == pytest.approx([64e6 / 3, 64e6 / 6])


def test_own_time_is_without_what_is_called():
    def event(name: str, start: float, duration: float, thread: int = 1) -> dict[str, object]:
        return {"ph": "X", "cat": "python_function", "tid": thread, "ts": start, "dur": duration, "name": name}

    events = [
        event("waits since before", -50, 500, thread=3),
        event("training.py(1): train_step", 0, 100),
        event("outer", 0, 100),
        event("first", 10, 20),
        event("inner", 15, 5),
        event("second", 40, 30),
        event("first", 90, 10),
        event("elsewhere", 20, 60, thread=2),
    ]
    own = {name: round(seconds * 1e6) for name, seconds in own_seconds(calls_of_step(events)).items()}
    assert own.pop("training.py(1): train_step") == 0
    assert own == {"outer": 40, "first": 25, "inner": 5, "second": 30, "elsewhere": 60}


def test_tracing_counts_with_what_it_calls_and_each_call_once():
    def event(name: str, start: float, duration: float, thread: int = 1) -> dict[str, object]:
        return {"tid": thread, "ts": start, "dur": duration, "name": name}

    events = [
        event("training.py(1): train_step", 0, 100),
        event(f"{TRACER}7): begin", 10, 20),
        event(f"{TRACER}9): mark", 12, 5),
        event(f"{TRACER}8): end", 50, 10),
        event(f"{TRACER}20): _write_plan", 15, 40, thread=2),
    ]
    assert seconds_within(events, TRACER) == pytest.approx(70e-6)


def test_wikipedia_lengths_come_from_the_table_or_from_a_file(tmp_path):
    drawn = [len(record.text) for record in wikipedia_lengths(128).records()]
    assert min(drawn) >= 2 and 3500 < max(drawn) <= 4096
    assert np.median(drawn) == pytest.approx(347 / 4, rel=0.1)
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("400\n800\n99999\n")
    assert sorted(len(record.text) for record in wikipedia_lengths(128, lengths).records()) == [100, 200]


def test_throughput_of_four_schedules(tmp_path):
    printed = benchmark(
        "cpu_throughput.py", "--quick", "--mixes", "wikipedia", "--link-to-compute", "--output", str(tmp_path)
    )
    for schedule in ("static", "batch-adaptive", "lockstep", "nested"):
        assert schedule in printed
    assert "ratio to static, measured" in printed


def test_plugin_share(tmp_path):
    printed = benchmark("plugin_share.py", "--flexsp-trace", "--documents-per-step", "8", "--output", str(tmp_path))
    assert "the plugin" in printed
    assert "--flexsp-trace, and what it calls" in printed
