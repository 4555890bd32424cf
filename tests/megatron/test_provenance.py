"""A cost model that was measured on another job is refused, with what differs."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.provenance import check_same_job, describe_job
from megatron_flexsp.planner import load_cost_model


def validated(args: Namespace) -> Namespace:
    """With what Megatron's own validation adds."""
    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float32
    return args


def test_another_job_is_refused_and_the_same_one_taken(parse: Callable) -> None:
    job = validated(parse("--flexsp-cost-model costs.json"))
    measured = replace(
        load_cost_model("gpt-7b-192k"),
        measurement={"job": {**describe_job(job), "padded_vocab_size": 512}, "domain_size": 8},
    )
    check_same_job(job, measured, domain_size=8)
    check_same_job(job, load_cost_model("gpt-7b-192k"), domain_size=8)  # says nothing of a job

    more = "--num-layers 8 --bf16 --recompute-granularity full"
    more += " --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    other = validated(parse(f"--flexsp-cost-model costs.json {more}"))
    with pytest.raises(FlexSPError) as refusal:
        check_same_job(other, measured, domain_size=4)
    for difference in (
        "num-layers 4, here 8",
        "params-dtype float32, here bfloat16",
        "recompute-granularity None, here full",
        "tensor-model-parallel-size 1, here 2",
        "pipeline-model-parallel-size 1, here 2",
        "data-parallel ranks 8, here 4",
        "--flexsp-cost-model costs.json",
    ):
        assert difference in str(refusal.value)
    assert "hidden-size" not in str(refusal.value)
