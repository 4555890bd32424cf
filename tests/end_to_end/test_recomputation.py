"""Plans that recompute the activations of some micro-batches and keep those of others."""

import re
from collections.abc import Callable
from pathlib import Path

from megatron_flexsp.planner import CostModel

from .conftest import TRANSFORMER_ENGINE
from .test_equality import GQA, INTERLEAVED, OVERLAPS, PIPELINE, assert_equal

RECOMPUTE = ("--flexsp-recompute", "--flexsp-max-recomputed-tokens-per-rank", "8192")
KEPT = re.compile(r"kept (\d+) bytes of (\d+) tokens, (plain|recomputed)")


def test_some_recomputed_with_both_overlaps(train: Callable, reference: Callable) -> None:
    """Around attention that is recomputed by itself in all micro-batches, in a group whose heads go in two parts."""
    plan = "[0123]* [01] [23]* [0]* [1] [2] [3]* [2] [2]* [3]"
    more = (*OVERLAPS, *RECOMPUTE, "--recompute-granularity", "selective", "--flexsp-exchange-parts", "2")
    run = train(4, *GQA, *more, plan=plan, gradients=True, kept=True)
    assert "; 4,096 tokens a rank and micro-batch, 8,192 where activations are recomputed; " in run.output
    assert " 1 x 4, 2 x 2, 7 x 1 | recomputed: 1 x 4, 1 x 2, 3 x 1 | " in run.output
    assert_equal(run, reference(1, *GQA))

    # A layer's input and the head of the model, in place of all that the layers make on their way.
    bytes_per_token: dict[str, list[float]] = {"plain": [], "recomputed": []}
    for kept, tokens, kind in KEPT.findall(run.output):
        bytes_per_token[kind].append(int(kept) / int(tokens))
    assert 3 * max(bytes_per_token["recomputed"]) < min(bytes_per_token["plain"])


def test_the_planners_own_choice_in_an_interleaved_pipeline(
    train: Callable, reference: Callable, tmp_path: Path
) -> None:
    """Transformer Engine's layers. Forward passes of other micro-batches come between a forward and its backward."""
    model = (*GQA, *INTERLEAVED, *TRANSFORMER_ENGINE)
    # Without overheads, and recomputing is dear: nothing is saved by recomputing everything.
    costs = CostModel(
        memory_budget_bytes=1e9,
        model_state_bytes=0,
        activation_bytes_per_token=1e7,
        attention_seconds_per_token_squared=1e-8,
        linear_seconds_per_token=1e-5,
        micro_batch_overhead_seconds=0,
        exchange_bytes_per_token=1e5,
        exchange_bandwidth_bytes_per_second={2: 1e9},
        recompute_share=1,
    )
    (tmp_path / "costs.json").write_text(costs.to_json())
    capacities = ("--flexsp-max-tokens-per-rank", "20", "--flexsp-max-recomputed-tokens-per-rank", "50")
    planned = ("--flexsp-recompute", *capacities, "--flexsp-cost-model", str(tmp_path / "costs.json"))
    run = train(4, *model, *planned, gradients=True)
    counts = re.findall(r"micro-batches of each degree: (.+?) \| recomputed: (.+?) \|", run.output)
    assert len(counts) == 5
    assert all(of_all != recomputed for of_all, recomputed in counts), counts
    assert_equal(run, reference(2, *model))


def test_what_is_dropped_is_dropped_again(train: Callable) -> None:
    """The same run with nothing recomputed: any other mask in the backward pass would change its gradients."""
    dropping = ("--attention-dropout", "0.2", "--hidden-dropout", "0.2")
    plan = "[01] [01]* [0] [1]* [0]* [1] [1]"
    run = train(4, *GQA, *PIPELINE, *dropping, *RECOMPUTE, plan=plan, gradients=True)
    assert_equal(run, train(4, *GQA, *PIPELINE, *dropping, plan=plan.replace("*", ""), gradients=True))
