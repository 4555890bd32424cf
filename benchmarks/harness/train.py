"""The training script of quickstart and benchmarks: pretrain_gpt.py whose steps are measured and reported.

All ranks begin a step together and end it together, so its seconds are those of the slowest. Rank 0 writes a line of
JSON for each. What to do comes from ``jobs.py`` in FLEXSP_MEASURE:

* ``schedules``: every batch is trained under each of these schedules, one after the other. It is one job, so they
  differ in their plans and in nothing else. Plans are made between the steps.
* ``profiled_step``: rank 0 runs this one under PyTorch's profiler and writes the trace.
* ``turns``: rank 0 waits for its turn before each step, so that two jobs can be measured side by side.
"""

import contextlib
import json
import os
import runpy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.training import get_args, training
from numpy.typing import NDArray

from megatron_flexsp.megatron import context as flexsp_context
from megatron_flexsp.megatron import training as flexsp_training
from megatron_flexsp.megatron.batches import PlannedBatch
from megatron_flexsp.megatron.context import Context
from megatron_flexsp.megatron.step_log import log_step
from megatron_flexsp.planner import Plan, micro_batch_seconds, narrowest_degree, padding_share
from megatron_flexsp.planner.service import PendingPlan, PlanningService, PlanRequest

ALWAYS_RECOMPUTED = "static-recompute"
"""Static groups whose every micro-batch recomputes, as under Megatron's --recompute-granularity full."""

LONGEST_WAIT = timedelta(minutes=10)
PRETRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_gpt.py"


@dataclass
class ExchangeMeter:
    """Stands in for ``all_to_all_single`` and counts what passes."""

    exchange: Callable[..., Any]
    ranks_per_host: int
    seconds: float = 0.0
    """In calls and in waits for them: bytes on their way, and waiting for the other ranks."""
    cpu_seconds: float = 0.0
    """What this process, its communication thread included, computed meanwhile."""
    link_bytes: float = 0.0
    """Sent to ranks of other hosts, or of what would be one."""
    _link_shares: dict[Any, float] = field(default_factory=dict)

    def reset(self) -> None:
        """Begin to count anew."""
        self.seconds = self.cpu_seconds = self.link_bytes = 0.0

    def __call__(self, output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        with self._counting():
            work = self.exchange(output, input, *args, group=group, **kwargs)
        self.link_bytes += input.numel() * input.element_size() * self._link_share(group)
        return None if work is None else _MeteredWork(work, self)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        started, cpu_started = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu_started

    def _link_share(self, group: Any) -> float:
        """The share of the group's ranks that are on another host."""
        if group not in self._link_shares:
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            here = dist.get_rank() // self.ranks_per_host
            elsewhere = sum(rank // self.ranks_per_host != here for rank in ranks)
            self._link_shares[group] = elsewhere / len(ranks)
        return self._link_shares[group]


@dataclass(frozen=True)
class _MeteredWork:
    work: Any
    meter: ExchangeMeter

    def wait(self) -> None:
        with self.meter._counting():
            self.work.wait()


class AlternatingPlanner:
    """Plans batches, each time under the next schedule."""

    def __init__(self, schedules: list[str], request: PlanRequest) -> None:
        self.request = request
        self._schedules = schedules
        self._services = {schedule: PlanningService(request_for(schedule, request)) for schedule in schedules}
        self._submitted = 0
        self._outstanding: list[tuple[PlanningService, PendingPlan]] = []

    def submit(self, lengths: NDArray[np.int64]) -> tuple[PlanningService, PendingPlan]:
        """Begin to plan a batch under the schedule whose turn it is."""
        service = self._services[schedule_at(self._submitted, self._schedules)]
        self._submitted += 1
        self._outstanding.append((service, service.submit(lengths)))
        return self._outstanding[-1]

    def result(self, pending: tuple[PlanningService, PendingPlan]) -> Plan:
        """The plan."""
        service, batch = pending
        plan = service.result(batch)
        if service is not self._services.get(ALWAYS_RECOMPUTED):
            return plan
        return replace(
            plan, micro_batches=tuple(replace(item, recomputed=not item.is_filler) for item in plan.micro_batches)
        )

    def settle(self) -> None:
        """Wait for all plans that were asked for, so that planning takes nothing from the step to come."""
        for service, pending in self._outstanding:
            service.result(pending)
        self._outstanding.clear()

    @property
    def quick_plans(self) -> int:
        """Batches for which the planner was late."""
        return sum(service.quick_plans for service in self._services.values())


def request_for(schedule: str, request: PlanRequest) -> PlanRequest:
    """How batches are planned under one of the schedules. ``request`` may recompute; those without the ending don't."""
    name = schedule.removesuffix("-recompute")
    if schedule == ALWAYS_RECOMPUTED:
        request = request.always_recomputed()
    elif schedule != "nested-recompute":
        request = replace(request, recomputed_token_capacity=None)
    static_degree = None
    if name == "static":
        static_degree = narrowest_degree(
            request.options["degrees"],
            get_args().seq_length,
            request.token_capacity,
            slice_multiple=request.slice_multiple,
            static_domain_size=request.domain_size,
        )
    return replace(request, options={**request.options, "schedule": name, "static_degree": static_degree})


def schedule_at(step: int, schedules: list[str]) -> str:
    """The schedule of a step. A batch's steps follow each other; another schedule is the first of each batch."""
    batch, place = divmod(step, len(schedules))
    return schedules[(batch + place) % len(schedules)]


class MeasuredSteps:
    """Megatron's ``train_step``, measured on all ranks and reported by rank 0."""

    def __init__(self, instructions: dict[str, Any], meter: ExchangeMeter) -> None:
        self._schedules: list[str] = instructions["schedules"]
        self._report = Path(instructions["report"])
        self._meter = meter
        self._batches: list[tuple[Context, PlannedBatch]] = []
        self._planner: AlternatingPlanner | None = None
        self._profiled_step: int | None = instructions["profiled_step"]
        self._trace: str = instructions["trace"]
        self._profile: torch.profiler.profile | None = None
        self._is_ready = False
        self._turns: torch.distributed.TCPStore | None = None
        if instructions["turns"] is not None and int(os.environ["RANK"]) == 0:
            self._job = instructions["turns"]["job"]
            self._turns = torch.distributed.TCPStore("127.0.0.1", instructions["turns"]["port"], timeout=LONGEST_WAIT)

    def note_batch(self, context: Context, batch: PlannedBatch) -> None:
        """Keep the step's batch, and log it as ever."""
        self._batches.append((context, batch))
        log_step(context, batch)

    def make_planner(self, request: PlanRequest) -> AlternatingPlanner:
        """Takes the place of the plugin's planning service."""
        self._planner = AlternatingPlanner(self._schedules, request)
        return self._planner

    def repeat_batches(self, batches_from: Callable[..., Iterator[range]]) -> Callable[..., Iterator[range]]:
        """``batches_from`` that yields every batch once for each schedule."""
        return lambda *args: (batch for batch in batches_from(*args) for _ in self._schedules)

    def wrap(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """``train_step`` with all of this around it."""

        def step(*args: Any, **kwargs: Any) -> Any:
            number = get_args().curr_iteration
            if dist.get_rank() == 0:
                self._wait_for_turn(number)
            self._meter.reset()
            dist.barrier()
            sent, started, cpu_started = bytes_sent(), time.perf_counter(), time.process_time()
            with self._profiler(number):
                result = train_step(*args, **kwargs)
            busy_seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            dist.barrier()
            seconds = time.perf_counter() - started
            if self._profile is not None:
                self._profile.export_chrome_trace(self._trace)
                self._profile = None
            context, batch = self._batches.pop()
            ranks = gathered(
                busy_seconds=busy_seconds,
                cpu_seconds=cpu_seconds,
                exchange_seconds=self._meter.seconds,
                exchange_cpu_seconds=self._meter.cpu_seconds,
                exchange_link_bytes=self._meter.link_bytes,
                sent_bytes=bytes_sent() - sent,
                waited_for_plan_seconds=batch.waited_for_plan_seconds,
                waited_for_data_seconds=batch.waited_for_data_seconds,
            )
            if dist.get_rank() == 0:
                schedule = schedule_at(number, self._schedules) if self._schedules else context.settings.schedule
                figures = {"schedule": schedule, "seconds": seconds, "loss": result[0]["lm loss"].item()}
                self._write(figures | described(context, batch) | ranks)
                if self._turns is not None and number + 1 == get_args().train_iters:
                    # Processes that end would take the cores from the other job's last step.
                    self._turns.wait([f"{self._job}/end"])
            return result

        return step

    @contextlib.contextmanager
    def _profiler(self, number: int) -> Iterator[None]:
        """Around a step; does something on rank 0 and in the step that is asked for."""
        if dist.get_rank() != 0 or number != self._profiled_step:
            yield
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, with_stack=True) as profile:
            yield
        self._profile = profile

    def _wait_for_turn(self, number: int) -> None:
        """Until plans are made and the turn has come; the other ranks wait in the barrier that follows."""
        if self._planner is not None:
            self._planner.settle()
        if not self._is_ready:
            self._is_ready = True
            self._write({"cost_model": None if self._planner is None else self._planner.request.cost_model.to_json()})
        if self._turns is not None:
            self._turns.wait([f"{self._job}/turn/{number}"])

    def _write(self, said: dict[str, Any]) -> None:
        with self._report.open("a") as report:
            report.write(json.dumps(said) + "\n")


def bytes_sent() -> int:
    """What this host has sent over the interface that ranks talk over; 0 where the system does not say."""
    interface = os.environ["GLOO_SOCKET_IFNAME"] + ":"
    try:
        for line in Path("/proc/self/net/dev").read_text().splitlines():
            if line.strip().startswith(interface):
                return int(line.split()[9])
    except OSError:
        pass
    return 0


def gathered(**mine: float) -> dict[str, list[float]]:
    """Collective: every rank's figures, by name."""
    figures = torch.tensor(list(mine.values()), dtype=torch.float64)
    everyones = [torch.empty_like(figures) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, figures)
    return {name: [float(ranks[k]) for ranks in everyones] for k, name in enumerate(mine)}


def described(context: Context, batch: PlannedBatch) -> dict[str, Any]:
    """A batch and its plan, for JSON."""
    plan, lengths = batch.plan, batch.lengths
    return {
        "tokens": int(lengths.sum()),
        "lengths": lengths.tolist(),
        "padding_share": padding_share(plan, lengths, context.settings.slice_multiple),
        "predicted_seconds": plan.predicted_seconds + context.cost_model.step_overhead_seconds,
        "plan": json.loads(plan.to_json()),
        "micro_batch_seconds": micro_batch_seconds(plan, lengths, context.cost_model).tolist(),
    }


def main() -> None:
    """Put the measuring in place and run the script."""
    instructions = json.loads(os.environ["FLEXSP_MEASURE"])
    meter = ExchangeMeter(dist.all_to_all_single, instructions["ranks_per_host"])
    dist.all_to_all_single = meter  # type: ignore[assignment]
    steps = MeasuredSteps(instructions, meter)
    if instructions["schedules"]:
        flexsp_context.PlanningService = steps.make_planner  # type: ignore[assignment,misc]
        flexsp_training.batches_from = steps.repeat_batches(flexsp_training.batches_from)
    flexsp_training.log_step = steps.note_batch
    training.train_step = steps.wrap(training.train_step)
    runpy.run_path(str(PRETRAIN_SCRIPT), run_name="__main__")


if __name__ == "__main__":
    main()
