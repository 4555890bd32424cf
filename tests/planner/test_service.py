"""The planning process: plans come from it while it lives, and from elsewhere whatever becomes of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import psutil
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner import CostModel
from megatron_flexsp.planner.service import PlanningService, PlanRequest

COST_MODEL = CostModel(
    memory_budget_bytes=1e6,
    model_state_bytes=0,
    activation_bytes_per_token=1,
    attention_seconds_per_token_squared=1e-9,
    linear_seconds_per_token=1e-5,
    micro_batch_overhead_seconds=0.01,
    exchange_bytes_per_token=100,
    exchange_bandwidth_bytes_per_second={2: 1e9, 4: 1e9},
)
# A limit that a busy machine keeps too: a plan that is cut short is another plan.
REQUEST = PlanRequest(COST_MODEL, domain_size=4, token_capacity=1000, time_limit_seconds=60)
BATCHES = [np.array([900, 3000, 20, 7, 7]), np.array([4000]), np.array([5] * 40)]


def all_planning_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "megatron_flexsp.planner.service" in child.cmdline()]


@pytest.fixture(autouse=True)
def processes_before() -> Iterator[None]:
    """Other tests of this pytest process may have left theirs, which end when their owners are collected."""
    _before.update(child.pid for child in all_planning_processes())
    yield
    _before.clear()


_before: set[int] = set()


def planning_processes() -> list[psutil.Process]:
    """Those that the running test has started."""
    return [child for child in all_planning_processes() if child.pid not in _before]


@pytest.fixture
def service(processes_before: None) -> Iterator[PlanningService]:
    running = PlanningService(REQUEST)
    yield running
    running.close()
    assert not planning_processes()


def test_plans_arrive_in_order_and_are_those_of_plan(service: PlanningService) -> None:
    pending = [service.submit(lengths) for lengths in BATCHES]
    digests = [service.result(item).digest() for item in pending]
    assert digests == [REQUEST.make(lengths).digest() for lengths in BATCHES]
    assert service.quick_plans == 0


def test_a_batch_without_a_legal_plan_is_an_error_and_the_next_one_is_planned(service: PlanningService) -> None:
    pending = [service.submit(np.array([4001])), service.submit(BATCHES[0])]
    with pytest.raises(FlexSPError, match=r"4,?001") as refusal:
        service.result(pending[0])
    assert refusal.value.remedy.startswith("allow a wider degree")
    assert service.result(pending[1]).digest() == REQUEST.make(BATCHES[0]).digest()


def test_a_dead_process_is_replaced(service: PlanningService, caplog: pytest.LogCaptureFixture) -> None:
    service.result(service.submit(BATCHES[0]))
    (process,) = planning_processes()
    process.kill()
    for lengths in BATCHES:
        service.result(service.submit(lengths)).validate(lengths, REQUEST.token_capacity)
    assert 1 <= service.quick_plans <= 2
    assert len(caplog.messages) == 1 and "planning process" in caplog.messages[0]
    (successor,) = planning_processes()
    assert successor.pid != process.pid


def test_a_process_that_hangs_delays_no_more_than_the_patience() -> None:
    service = PlanningService(REQUEST, patience_seconds=0.3)
    service.result(service.submit(BATCHES[0]))
    (process,) = planning_processes()
    process.suspend()
    started = time.monotonic()
    plan = service.result(service.submit(BATCHES[0]))
    assert time.monotonic() - started < 5
    plan.validate(BATCHES[0], REQUEST.token_capacity)
    assert service.quick_plans == 1
    service.close()
    assert not planning_processes()


def test_no_process_is_left_when_the_owner_is_killed() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert owner.stdout is not None
    process = psutil.Process(int(owner.stdout.readline()))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


OWNER = """
import time, numpy, psutil
from megatron_flexsp.planner import CostModel
from megatron_flexsp.planner.service import PlanningService, PlanRequest
request = PlanRequest(CostModel(memory_budget_bytes=1e6, model_state_bytes=0, activation_bytes_per_token=1,
    attention_seconds_per_token_squared=0, linear_seconds_per_token=1, micro_batch_overhead_seconds=0,
    exchange_bytes_per_token=0, exchange_bandwidth_bytes_per_second={}), 1, 100)
service = PlanningService(request)
service.result(service.submit(numpy.array([5])))
print(psutil.Process().children()[0].pid, flush=True)
time.sleep(60)
"""


def test_another_cost_model_for_the_batches_to_come(service: PlanningService) -> None:
    lengths = BATCHES[0]
    slow = replace(COST_MODEL, linear_seconds_per_token=3e-5)
    before = service.submit(lengths)
    service.use(slow)
    after = service.submit(lengths)
    assert service.result(before).predicted_seconds == REQUEST.make(lengths).predicted_seconds
    expected = replace(REQUEST, cost_model=slow).make(lengths).predicted_seconds
    assert service.result(after).predicted_seconds == expected > REQUEST.make(lengths).predicted_seconds
    assert service.quick_plans == 0
