"""A run says once that its cost model no longer fits, and which command to run."""

import pytest

from megatron_flexsp.megatron.drift import DriftWatch, profile_command


class Steps:
    """Steps of a run whose clock we set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch = DriftWatch("costs.json", 0.5, "measure --again", clock=lambda: self.now)

    def take(self, count: int, seconds: float, predicted: float = 1.5) -> list[str]:
        """So many steps; what was said. Every step is predicted to take half a second more than its plan."""
        said = []
        for _ in range(count):
            said.append(self.watch.begin_step(predicted))
            self.now += seconds
        return [warning for warning in said if warning]


def test_steps_as_predicted_and_now_and_then_a_slow_one_say_nothing() -> None:
    steps = Steps()
    steps.take(2, seconds=100.0)  # compilation, first use of libraries
    for _ in range(20):
        assert steps.take(9, seconds=2.2) + steps.take(1, seconds=60.0) == []


@pytest.mark.parametrize(("seconds", "times"), [(2.6, "1.30"), (1.4, "0.70")])
def test_drift_is_told_once_with_the_command(seconds: float, times: str) -> None:
    steps = Steps()
    (warning,) = steps.take(200, seconds)
    assert f"{times} times what costs.json predicts" in warning
    assert "measure --again" in warning
    assert len(steps.take(2000, seconds)) == 1, "and again rarely"


def test_evaluation_is_no_step() -> None:
    steps = Steps()
    for _ in range(100):
        steps.take(1, seconds=2.0)
        steps.watch.begin_step(1.5)
        steps.watch.pause()
        steps.now += 50.0
    assert steps.take(30, seconds=2.0) == []


def test_the_command_is_the_jobs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("FLEXSP_DEVICE", raising=False)
    arguments = ["pretrain_gpt.py", "--num-layers", "4", "--flexsp-cost-model", "my costs.json", "--flexsp"]
    assert profile_command(arguments, "my costs.json") == (
        "torchrun --nproc-per-node=8 -m megatron_flexsp.run pretrain_gpt.py --num-layers 4 --flexsp "
        "--flexsp-profile 'my costs.json'"
    )
