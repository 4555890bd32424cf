"""Micro-batches that recompute: by the flags, what a rank holds of them, and how Megatron is told."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.context import degree_for_longest, recomputed_token_capacity
from megatron_flexsp.megatron.flag_checks import check_compatibility, check_flags
from megatron_flexsp.megatron.recomputation import check_release, each_layer_recomputed
from megatron_flexsp.megatron.settings import settings_from_args
from megatron_flexsp.planner import CostModel
from tests.megatron.test_arguments import cost_model_file

Parse = Callable[..., Namespace]

ON = "--flexsp-recompute "
COST_MODEL = CostModel(
    memory_budget_bytes=1e9,
    model_state_bytes=1e8,
    activation_bytes_per_token=1e5,
    attention_seconds_per_token_squared=1e-9,
    linear_seconds_per_token=1e-5,
    micro_batch_overhead_seconds=0.01,
    exchange_bytes_per_token=1e4,
    exchange_bandwidth_bytes_per_second={2: 1e10},
)
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def recomputing(**given: Any) -> Namespace:
    """Arguments of a job with ``--flexsp-recompute``."""
    values = {"flexsp_recompute": True, "mtp_num_layers": None, "recompute_granularity": None, "recompute_method": None}
    return Namespace(**{**values, **given})


class TestFlags:
    def test_an_ordinary_job_is_taken(self, parse: Parse) -> None:
        args = parse(
            f"{ON} --flexsp-max-tokens-per-rank 8 --flexsp-max-recomputed-tokens-per-rank 16 --recompute-activations "
            "--tensor-model-parallel-size 2 --sequence-parallel --num-experts 8 --expert-model-parallel-size 2 "
            "--expert-tensor-parallel-size 1"
        )
        check_compatibility(args)
        check_flags(args)
        settings = settings_from_args(args)
        assert (settings.recompute, settings.max_recomputed_tokens_per_rank, settings.schedule) == (True, 16, "nested")

    @pytest.mark.parametrize(
        ("more", "named"),
        [
            (FULL, "--flexsp-recompute with --recompute-granularity full: everything is recomputed already"),
            (
                "--recompute-granularity selective --recompute-modules core_attn layernorm",
                "--flexsp-recompute with --recompute-modules other than core_attn",
            ),
            (
                "--recompute-activations --recompute-modules layernorm",
                "--flexsp-recompute with --recompute-modules other than core_attn",
            ),
            (
                "--mtp-num-layers 2 --mtp-use-repeated-layer --overlap-grad-reduce",
                "--flexsp-recompute with --mtp-use-repeated-layer and --overlap-grad-reduce",
            ),
            ("--cpu-offloading-num-layers 1", "--flexsp-recompute with --cpu-offloading-num-layers"),
            ("--distribute-saved-activations", "--flexsp-recompute with --distribute-saved-activations"),
            ("--num-experts 8 --fp8-format hybrid", "--num-experts with --fp8-format and recomputed experts"),
        ],
    )
    def test_a_job_that_does_not_go_with_it_is_refused(self, more: str, named: str, parse: Parse) -> None:
        with pytest.raises(FlexSPError, match=named):
            check_compatibility(parse(ON + more))

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ("--flexsp-max-recomputed-tokens-per-rank 8", "--flexsp-max-recomputed-tokens-per-rank needs --flexsp-rec"),
            (f"{ON} --flexsp-max-recomputed-tokens-per-rank 0", "--flexsp-max-recomputed-tokens-per-rank 0: must be"),
            (
                f"{ON} --flexsp-max-recomputed-tokens-per-rank 7 --flexsp-max-tokens-per-rank 8",
                "--flexsp-max-recomputed-tokens-per-rank 7 is less than --flexsp-max-tokens-per-rank 8: ",
            ),
        ],
    )
    def test_a_value_that_makes_no_sense_is_refused(self, more: str, message: str, parse: Parse) -> None:
        with pytest.raises(FlexSPError, match=message):
            check_flags(parse(more))

    @pytest.mark.parametrize(
        ("more", "degrees"),
        [
            ("--flexsp-max-recomputed-tokens-per-rank 16", (1, 2, 4)),
            ("--flexsp-max-recomputed-tokens-per-rank 32", (1, 2)),
            ("", (1, 2)),  # the cost model's: four times 10
        ],
    )
    def test_rings_are_offered_where_recomputing_does_not_help(
        self, more: str, degrees: tuple[int, ...], parse: Parse, tmp_path: Path
    ) -> None:
        path = cost_model_file(tmp_path, recomputed_activation_bytes_per_token=2.5e4)
        job = f"--num-attention-heads 2 --seq-length 64 --flexsp-max-tokens-per-rank 10 --flexsp-cost-model {path} "
        assert settings_from_args(parse(job)).degrees == (1, 2)  # nothing holds it
        assert settings_from_args(parse(f"{job} {ON} {more}")).degrees == degrees


class TestCapacity:
    @staticmethod
    def of(token_capacity: int, bytes_per_token: float = 0.0, **given: Any) -> int | None:
        values: Any = {"recompute": True, "max_recomputed_tokens_per_rank": None, "max_tokens_per_rank": None}
        settings: Any = SimpleNamespace(**{**values, "micro_batches_in_flight": 2, **given})
        cost_model = replace(COST_MODEL, recomputed_activation_bytes_per_token=bytes_per_token)
        return recomputed_token_capacity(settings, cost_model, token_capacity)

    def test_is_the_flag_s_the_scaled_or_the_cost_model_s(self) -> None:
        assert self.of(4500, recompute=False) is None
        assert self.of(10, max_tokens_per_rank=10, max_recomputed_tokens_per_rank=77) == 77
        # A token that recomputes keeps a quarter of the bytes.
        assert self.of(10, 2.5e4, max_tokens_per_rank=10) == 40
        assert self.of(4500, 2.5e4) == 18_000

    def test_that_nothing_says_is_refused_with_both_ways_out(self) -> None:
        with pytest.raises(FlexSPError, match=r"-recomputed-tokens-per-rank, .* measure the --flexsp-cost-model again"):
            self.of(10, max_tokens_per_rank=10)

    def test_that_gains_nothing_is_refused(self) -> None:
        with pytest.raises(FlexSPError, match="a rank holds 9 tokens where it recomputes and 10 where it doesn't"):
            self.of(10, max_recomputed_tokens_per_rank=9)

    def test_the_error_names_the_flag_that_holds_more(self) -> None:
        values: Any = {"slice_multiple": 1, "degrees": (1, 2), "schedule": "nested", "domain_size": 2}
        values |= {"recompute": False, "recomputes_everything": False}
        plain = "raise --flexsp-max-tokens-per-rank .*"
        for given, way_out in (
            ({}, rf"{plain} recompute .* \(--flexsp-recompute\)"),
            ({"recomputes_everything": True}, f"{plain}, or use more ranks$"),
            ({"recompute": True}, "raise --flexsp-max-recomputed-tokens-per-rank .*, or use more ranks$"),
        ):
            settings: Any = SimpleNamespace(**{**values, **given})
            assert degree_for_longest(settings, 10, 20, "data") == 2
            with pytest.raises(FlexSPError, match=f"2 ranks with 10 tokens each, 20 in all.* {way_out}"):
                degree_for_longest(settings, 10, 21, "data")


class TestMegatron:
    def test_configurations_are_what_they_were_whatever_happens(self) -> None:
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=1, recompute_granularity="selective"
        )
        names = ("recompute_granularity", "recompute_method", "recompute_num_layers")

        def values() -> list[object]:
            return [getattr(config, name) for name in names]

        with pytest.raises(ZeroDivisionError), each_layer_recomputed([config]):
            assert values() == ["full", "uniform", 1]
            raise ZeroDivisionError
        assert values() == ["selective", None, None]

    def test_a_block_that_decides_elsewhere_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron.core.transformer.transformer_block import TransformerBlock

        check_release(recomputing(mtp_num_layers=1))
        monkeypatch.setattr(TransformerBlock, "forward", lambda self: None)
        with pytest.raises(FlexSPError, match="TransformerBlock doesn't decide in each forward pass"):
            check_release(recomputing())
        check_release(recomputing(flexsp_recompute=False))

    def test_further_tokens_that_can_not_be_recomputed_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

        def of_0_17(self: Any, forward_func: Any, *args: Any, **kwargs: Any) -> None: ...

        def of_0_18(self: Any, hidden_states: Any, packed_seq_params: Any) -> None: ...

        everything = {"flexsp_recompute": False, "recompute_granularity": "full", "recompute_method": "uniform"}
        for checkpointed_forward in (of_0_17, of_0_18):
            monkeypatch.setattr(MultiTokenPredictionLayer, "_checkpointed_forward", checkpointed_forward)
            check_release(recomputing())
            check_release(recomputing(flexsp_recompute=False, mtp_num_layers=1))
            with pytest.raises(FlexSPError, match=r"--flexsp-recompute .* can't recompute further tokens"):
                check_release(recomputing(mtp_num_layers=1))
            with pytest.raises(FlexSPError, match=r"--recompute-granularity full .* can't recompute further tokens"):
                check_release(recomputing(mtp_num_layers=1, **everything))
        everything["recompute_method"] = "block"
        with pytest.raises(FlexSPError, match=r"--recompute-granularity full .* can't recompute further tokens"):
            check_release(recomputing(mtp_num_layers=1, **everything))
        monkeypatch.setattr(MultiTokenPredictionLayer, "_checkpointed_forward", of_0_17)
        monkeypatch.setattr(MultiTokenPredictionLayer, "forward", lambda self, hidden_states, packed_seq_params: None)
        check_release(recomputing(mtp_num_layers=1, **everything))
