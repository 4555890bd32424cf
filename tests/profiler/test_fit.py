"""The fit finds the constants that made the seconds, disturbed runs or not."""

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.profiler.fit import Constants, Sample, fit, quality
from megatron_flexsp.profiler.points import choose_points

CONSTANTS = Constants(
    step=0.2,
    micro_batch=0.03,
    token=1e-4,
    token_squared=1e-7,
    latency={2: 0.01, 4: 0.02, 8: 0.05},
    exchanged_token={2: 1e-5, 4: 2e-5, 8: 3e-5},
)
LENGTHS = np.random.default_rng(3).lognormal(5, 1.2, 2000).astype(np.int64).clip(1, 4096)


def samples(repeats: int, spread: float, disturbed: float) -> list[Sample]:
    """Steps of the constants above, each off by a few per cent; some took three times as long."""
    generator = np.random.default_rng(5)
    found = []
    for point in choose_points((1, 2, 4, 8), 512, LENGTHS, longest=4096):
        for _ in range(repeats):
            sample = Sample(point.degree, point.tokens, point.tokens_squared, point.rounds, math.nan)
            seconds = CONSTANTS.seconds(sample) * math.exp(generator.normal(0, spread))
            found.append(replace(sample, seconds=seconds * (3 if generator.random() < disturbed else 1)))
    return found


def everything(constants: Constants) -> list[float]:
    tables = [*constants.latency.values(), *constants.exchanged_token.values()]
    return [constants.step, constants.micro_batch, constants.token, constants.token_squared, *tables]


def test_exact_seconds_give_the_constants_back_though_some_runs_were_disturbed() -> None:
    found = fit(samples(repeats=5, spread=0.0, disturbed=0.15))
    assert everything(found) == pytest.approx(everything(CONSTANTS), rel=1e-4)


def test_noisy_seconds_are_predicted_within_a_few_per_cent() -> None:
    measured = samples(repeats=5, spread=0.05, disturbed=0.05)
    found = fit(measured)
    judged = quality(found, measured)
    assert judged.r_squared > 0.98
    assert judged.median_error < 0.03
    exact = [CONSTANTS.seconds(sample) for sample in measured]
    assert [found.seconds(sample) for sample in measured] == pytest.approx(exact, rel=0.1)
    assert min(everything(found)) >= 0


def test_what_recomputing_adds_is_found_and_changes_nothing_else() -> None:
    true, generator = replace(CONSTANTS, recompute_share=0.28), np.random.default_rng(6)
    measured = []
    for point in choose_points((1, 2, 4, 8), 512, LENGTHS, longest=4096, recomputes=True):
        for _ in range(5):
            kind = (point.degree, point.tokens, point.tokens_squared, point.rounds)
            sample = Sample(*kind, math.nan, recomputed=point.recomputed)
            seconds = true.seconds(sample) * (2 if generator.random() < 0.1 else 1)
            measured.append(replace(sample, seconds=seconds))
    found = fit(measured)
    assert {sample.degree for sample in measured if sample.recomputed} == {1, 8}
    assert found.recompute_share == pytest.approx(0.28, rel=1e-3)
    assert everything(found) == pytest.approx(everything(CONSTANTS), rel=1e-4)


def test_an_exchange_costs_no_less_than_it_is_known_to() -> None:
    found = fit(samples(repeats=1, spread=0.0, disturbed=0.0), least_exchange={8: 5e-5})
    assert found.exchanged_token[8] >= 5e-5
    assert found.exchanged_token[2] == pytest.approx(1e-5, rel=0.5)


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
def test_what_a_pipelines_fill_and_drain_cost_is_found(share: float) -> None:
    true = replace(CONSTANTS, fill_share=share)
    measured = []
    for point in choose_points((1, 2, 4, 8), 512, LENGTHS, longest=4096, pipeline_stages=4):
        sample = Sample(point.degree, point.tokens, point.tokens_squared, point.rounds, math.nan, further_stages=3)
        measured.append(replace(sample, seconds=true.seconds(sample)))
    found = fit(measured)
    assert found.fill_share == share
    assert everything(found) == pytest.approx(everything(CONSTANTS), rel=1e-3)


def test_too_few_kinds_of_steps_are_refused() -> None:
    with pytest.raises(FlexSPError, match="can't tell"):
        fit([Sample(1, 100, 10_000, 1, 0.5)] * 50)


def test_seconds_that_no_clock_gives_are_refused() -> None:
    broken = samples(repeats=1, spread=0.0, disturbed=0.0)
    broken[3] = replace(broken[3], seconds=0.0)
    with pytest.raises(FlexSPError, match="clock"):
        fit(broken)


def test_bandwidths_stay_finite_where_tokens_seem_to_cost_nothing() -> None:
    """A tiny job's steps take as long however many tokens they have."""
    found = fit([replace(sample, seconds=0.4) for sample in samples(repeats=1, spread=0.0, disturbed=0.0)])
    assert found.token == 0
    assert min(found.exchanged_token.values()) > 0


def test_a_job_whose_steps_all_take_the_same_has_the_usual_share() -> None:
    points = choose_points((1, 2), 512, LENGTHS, longest=4096, recomputes=True)
    same = [Sample(p.degree, p.tokens, p.tokens_squared, p.rounds, 1.0, recomputed=p.recomputed) for p in points]
    assert fit(same).recompute_share == CONSTANTS.recompute_share
