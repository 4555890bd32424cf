"""Plans for pipelines: how long micro-batches are decides how long the pipeline fills and drains."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_flexsp.planner import load_cost_model, plan


def lognormal(count, median, sigma, seed):
    return np.clip(np.random.default_rng(seed).lognormal(np.log(median), sigma, count).astype(int), 1, 50_000)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("ranks", "count", "stages", "count_multiple", "overhead_seconds"),
    [(8, 64, 8, 1, 0.02), (8, 96, 8, 1, 0.63), (16, 128, 8, 8, 0.63), (16, 64, 8, 4, 0.02)],
)
def test_no_schedule_loses_to_one_that_may_do_less(ranks, count, stages, count_multiple, overhead_seconds, seed):
    lengths = lognormal(count, *((700, 1.8), (1600, 1.0))[seed % 2], seed)
    cost_model = replace(load_cost_model("gpt-7b-192k"), micro_batch_overhead_seconds=overhead_seconds)
    settings = {"pipeline_stages": stages, "count_multiple": count_multiple}
    seconds = {
        schedule: plan(lengths, cost_model, ranks, schedule=schedule, **settings).predicted_seconds
        for schedule in ("nested", "lockstep", "batch-adaptive", "static")
    }
    # Rounds sorted by degree are nested too, so whoever finds them has no excuse.
    assert seconds["nested"] <= 1.02 * seconds["lockstep"]
    assert seconds["nested"] <= seconds["batch-adaptive"] <= seconds["static"]


def test_baselines_cut_the_work_as_finely_as_it_pays(published_7b):
    # One rank, equal sequences: n micro-batches take n overheads and the work, and seven more stages wait for one each.
    lengths, overhead = [100] * 240, published_7b.micro_batch_overhead_seconds
    work = 240 * float(published_7b.sequence_seconds(np.array([100]), 1)[0])
    best = min(count * overhead + work + 7 * (overhead + work / count) for count in range(1, 241))
    for schedule in ("nested", "static", "batch-adaptive"):
        found = plan(lengths, published_7b, 1, schedule=schedule, pipeline_stages=8)
        assert found.predicted_seconds <= 1.01 * best


def test_a_long_sequence_takes_time_only_from_its_own_ranks(simple_model):
    # Two ranks, three stages. Rank 0: 10 + 90 s, three times. Rank 1 has 300 s as well, for seven of 10 + 20 s and the
    # two further stages of the last: 270 s. If it had to count 100 s for each stage, 100 s would be left for it.
    found = plan([90] + [20] * 7, simple_model, 2, schedule="static", static_degree=1, pipeline_stages=3)
    assert found.predicted_seconds == pytest.approx(300)
