"""The flags against Megatron's own: what a job's shape gives, and every refusal by the flag that it names."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.flag_checks import check_compatibility, check_flags
from megatron_flexsp.megatron.settings import Settings, settings_from_args

Parse = Callable[..., Namespace]

COST_MODEL: dict[str, Any] = {
    "schema": "flexsp.cost_model/1",
    "memory_budget_bytes": 1e9,
    "model_state_bytes": 1e8,
    "activation_bytes_per_token": 1e5,
    "attention_seconds_per_token_squared": 1e-9,
    "linear_seconds_per_token": 1e-5,
    "micro_batch_overhead_seconds": 0.01,
    "exchange_bytes_per_token": 1e4,
    "exchange_bandwidth_bytes_per_second": {"2": 1e10, "4": 1e10},
}


class TestCompatibility:
    def test_an_ordinary_job_is_taken(self, parse: Parse) -> None:
        check_compatibility(parse())
        check_compatibility(
            parse(
                "--micro-batch-size 1 --tensor-model-parallel-size 2 --sequence-parallel --bf16 --swiglu "
                "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "
                "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --group-query-attention "
                "--num-query-groups 2 --position-embedding-type rope --normalization RMSNorm "
                "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
            )
        )

    @pytest.mark.parametrize(
        ("more", "named"),
        [
            ("--context-parallel-size 2", r"--context-parallel-size > 1: .*Take the flag out"),
            ("--hybrid-context-parallel", "--hybrid-context-parallel"),
            ("--micro-batch-size 2", "--micro-batch-size other than 1"),
            (
                "--multi-latent-attention",
                "--multi-latent-attention with --transformer-impl local: .*transformer_engine",
            ),
            ("--hybrid-override-pattern M*M*", "Mamba and hybrid layers"),
            ("--use-torch-fsdp2", "--use-torch-fsdp2"),
            ("--transformer-impl inference_optimized", "--transformer-impl inference_optimized"),
            ("--cuda-graph-impl local", "CUDA graphs"),
            ("--window-size 4,0", "--window-size with --transformer-impl local"),
            ("--fp4-format e2m1", "--fp4-format"),
            ("--te-precision-config-file layers.yaml", "--te-precision-config-file"),
            ("--softmax-type learnable", "--softmax-type other than vanilla with --transformer-impl local"),
            ("--position-embedding-type relative", "--position-embedding-type"),
            ("--dataloader-type cyclic", "--dataloader-type"),
            ("--eod-mask-loss", "--eod-mask-loss"),
            ("--tp-comm-overlap", "--tp-comm-overlap"),
            ("--multiple-validation-sets", "--multiple-validation-sets without --full-validation"),
            ("--full-validation", "--full-validation without --multiple-validation-sets"),
            ("--fine-grained-activation-offloading", "--fine-grained-activation-offloading"),
            ("--cpu-offloading-retain-pinned-cpu-buffers", "--cpu-offloading-retain-pinned-cpu-buffers"),
            ("--defer-embedding-wgrad-compute", "--defer-embedding-wgrad-compute"),
            ("--logits-save-dir logits", "--logits-load-dir and --logits-save-dir"),
            ("--iterations-to-skip 3", "--iterations-to-skip"),
        ],
    )
    def test_a_flag_that_does_not_go_with_it_is_named(self, more: str, named: str, parse: Parse) -> None:
        with pytest.raises(FlexSPError, match=rf"--flexsp can't be combined with\n  - .*{named}"):
            check_compatibility(parse(more))

    def test_transformer_engine_must_be_there_and_new_enough(
        self, parse: Parse, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The last of two: the job has one already.
        args = parse(
            "--transformer-impl transformer_engine --window-size 4,0 --softmax-type learnable --multi-latent-attention"
        )
        for version, reason in (
            ("0.0.0", "can't be imported. Install it"),
            ("2.7.1", "2.8 or newer is needed"),
            ("2.11.0", r"--softmax-type learnable: Transformer Engine 2\.11\.0 has no kernel of it for packs"),
        ):
            monkeypatch.setattr("megatron.core.utils.get_te_version", lambda version=version: Version(version))
            with pytest.raises(FlexSPError, match=reason) as refusal:
                check_compatibility(args)
            assert str(refusal.value).count("\n  - ") == 1
        monkeypatch.setattr("megatron.core.utils.get_te_version", lambda: Version("2.8.0"))
        check_compatibility(parse("--transformer-impl transformer_engine --window-size 4,0"))
        monkeypatch.setattr("megatron.core.utils.get_te_version", lambda: Version("2.12.0"))
        monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91701)
        with pytest.raises(FlexSPError, match=r"--softmax-type learnable: cuDNN 9\.17 has no kernel"):
            check_compatibility(args)
        monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91800)
        check_compatibility(args)

    def test_the_loss_of_each_token_must_weigh_the_same(self, parse: Parse) -> None:
        with pytest.raises(FlexSPError, match="--calculate-per-token-loss is missing"):
            check_compatibility(parse(without="--calculate-per-token-loss"))

    def test_all_reasons_come_at_once(self, parse: Parse) -> None:
        with pytest.raises(FlexSPError) as refusal:
            check_compatibility(parse("--context-parallel-size 2 --fim-data --window-size 4,0"))
        assert str(refusal.value).count("\n  - ") == 3


class TestSettings:
    def test_follow_from_the_shape_of_the_job(self, parse: Parse) -> None:
        plain = settings_from_args(parse())
        assert (plain.domain_size, plain.degrees, plain.schedule) == (8, (1, 2, 4, 8), "nested")
        assert (plain.slice_multiple, plain.count_multiple, plain.micro_batches_in_flight) == (1, 1, 1)

        tensor = settings_from_args(parse("--tensor-model-parallel-size 2 --sequence-parallel"))
        assert (tensor.domain_size, tensor.degrees, tensor.slice_multiple) == (4, (1, 2, 4), 2)
        assert settings_from_args(parse("--tensor-model-parallel-size 2")).slice_multiple == 1

        for recipe, alone, gathered in (("delayed", 16, 32), ("mxfp8", 32, 64), ("blockwise", 16, 256)):
            in_eight_bits = f"--tensor-model-parallel-size 2 --fp8-format e4m3 --fp8-recipe {recipe}"
            assert settings_from_args(parse(in_eight_bits)).slice_multiple == alone
            assert settings_from_args(parse(f"{in_eight_bits} --sequence-parallel")).slice_multiple == gathered

        kept = "--fp8-format hybrid --fp8-param-gather --use-distributed-optimizer"
        for recipe, schedule in (("", "lockstep"), ("--fp8-recipe tensorwise", "nested")):
            settings = settings_from_args(parse(f"{kept} {recipe}"))
            assert (settings.schedule, settings.in_rounds) == (schedule, schedule == "lockstep")

        pipeline = settings_from_args(parse("--pipeline-model-parallel-size 2"))
        assert (pipeline.domain_size, pipeline.count_multiple, pipeline.micro_batches_in_flight) == (4, 1, 2)

        args = parse("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1")
        args.virtual_pipeline_model_parallel_size = 2  # as Megatron's validation does
        interleaved = settings_from_args(args)
        assert (interleaved.count_multiple, interleaved.micro_batches_in_flight) == (2, 3)
        args.virtual_pipeline_model_parallel_size = None  # one chunk, which Megatron takes for none
        assert settings_from_args(args) == pipeline

    def test_degrees_that_heads_or_domain_do_not_allow_are_not_offered(self, parse: Parse) -> None:
        assert settings_from_args(parse("--num-attention-heads 4")).degrees == (1, 2, 4)
        assert settings_from_args(parse("--num-attention-heads 6", world_size=6)).degrees == (1, 2, 6)
        assert settings_from_args(parse("--tensor-model-parallel-size 4")).degrees == (1, 2)

    def test_more_ranks_than_heads_can_be_asked_for(self, parse: Parse) -> None:
        settings = settings_from_args(
            parse("--flexsp-degrees 1,4 --tensor-model-parallel-size 2 --num-attention-heads 4")
        )
        assert (settings.degrees, settings.query_heads) == ((1, 4), 2)

    @pytest.mark.parametrize(
        ("more", "degrees"),
        [
            ("--flexsp-max-tokens-per-rank 32", (1, 2)),
            ("--flexsp-max-tokens-per-rank 16", (1, 2, 4)),
            ("--flexsp-max-tokens-per-rank 10", (1, 2, 4, 8)),
            ("--flexsp-max-tokens-per-rank 7", (1, 2)),  # nothing holds it: the error says so later
        ],
    )
    def test_rings_are_offered_where_nothing_else_holds_the_longest_sequence(
        self, parse: Parse, more: str, degrees: tuple[int, ...]
    ) -> None:
        assert settings_from_args(parse(f"--num-attention-heads 2 --seq-length 64 {more}")).degrees == degrees

    def test_degrees_without_a_bandwidth_are_not_offered(self, parse: Parse, tmp_path: Path) -> None:
        path = cost_model_file(tmp_path)
        settings = settings_from_args(parse(f"--flexsp-cost-model {path}"))
        assert settings.degrees == (1, 2, 4)
        assert settings.cost_model is not None
        assert settings.cost_model.token_capacity == 9000

    def test_flags_are_passed_on(self, parse: Parse) -> None:
        settings = settings_from_args(
            parse(
                "--flexsp-schedule static --flexsp-static-degree 4 --flexsp-max-tokens-per-rank 77 --mock-data "
                "--flexsp-overlong drop --flexsp-plan-ahead 5 --flexsp-solver-time-limit 0.25 --flexsp-mock-lengths f"
            )
        )
        assert (settings.schedule, settings.static_degree, settings.degrees) == ("static", 4, (4,))
        assert (settings.max_tokens_per_rank, settings.overlong, settings.plan_ahead) == (77, "drop", 5)
        assert (settings.solver_time_limit_seconds, settings.mock_lengths) == (0.25, "f")
        assert settings_from_args(parse("--flexsp-degrees 4,1,4")).degrees == (1, 4)
        adaptive = settings_from_args(parse("--flexsp-schedule batch-adaptive"))
        assert (adaptive.schedule, adaptive.degrees) == ("batch-adaptive", (1, 2, 4, 8))

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ("--flexsp-degrees 1,3", r"--flexsp-degrees: 3 is not a group size here\. .* power of two .* all 8"),
            ("--attention-dropout 0.1 --flexsp-degrees 3", "--flexsp-degrees: 3 is not a group size here"),
            ("--flexsp-degrees 0,1", "--flexsp-degrees: 0 is not a group size here"),
            ("--flexsp-degrees 16", r"--flexsp-degrees: 16 is not .* at most the 8 data-parallel ranks"),
            ("--flexsp-degrees 1;2", r"--flexsp-degrees 1;2: these are no whole numbers\. Give them with commas"),
            ("--flexsp-schedule static --flexsp-static-degree 3", "--flexsp-static-degree: 3 is not a group size"),
            ("--flexsp-static-degree 2", "--flexsp-static-degree needs --flexsp-schedule static"),
            ("--flexsp-mock-lengths lengths.txt", "--flexsp-mock-lengths needs --mock-data"),
            ("--flexsp-plan-ahead 0", "--flexsp-plan-ahead 0: must be at least 1"),
            ("--flexsp-max-tokens-per-rank 0", "--flexsp-max-tokens-per-rank 0: must be at least 1"),
            (
                "--fp8-format hybrid --fp8-recipe mxfp8 --flexsp-max-tokens-per-rank 24",
                "--flexsp-max-tokens-per-rank 24: must be at least 32",
            ),
            ("--flexsp-solver-time-limit -1", "--flexsp-solver-time-limit -1.0: must be at least 0"),
            ("--flexsp-solver-time-limit nan", "--flexsp-solver-time-limit nan: must be at least 0"),
            ("--global-batch-size 12", r"--global-batch-size 12 must be a multiple of the 8 data-parallel ranks"),
        ],
    )
    def test_a_value_that_makes_no_sense_is_refused(self, more: str, message: str, parse: Parse) -> None:
        with pytest.raises(FlexSPError, match=message):
            settled(parse(more))

    def test_a_world_that_does_not_divide_is_refused(self, parse: Parse) -> None:
        with pytest.raises(FlexSPError, match=r"3 ranks don't divide by --tensor-model-parallel-size 2 x "):
            check_flags(parse("--tensor-model-parallel-size 2", world_size=3))

    def test_a_number_of_heads_that_is_missing_is_named(self, parse: Parse) -> None:
        args = parse("")
        args.num_attention_heads = None
        with pytest.raises(FlexSPError, match="--num-attention-heads is missing"):
            check_flags(args)


class TestCostModelFile:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("linear_seconds_per_token", None, "linear_seconds_per_token"),
            ("linear_seconds_per_token", -1e-5, "linear_seconds_per_token"),
            ("exchange_bandwidth_bytes_per_second", {"2": -1}, r'exchange_bandwidth_bytes_per_second\["2"\]'),
        ],
    )
    def test_a_missing_or_negative_number_is_named(
        self, key: str, value: object, message: str, parse: Parse, tmp_path: Path
    ) -> None:
        path = cost_model_file(tmp_path, **{key: value})
        with pytest.raises(FlexSPError, match=rf"{path}: .*{message}"):
            settings_from_args(parse(f"--flexsp-cost-model {path}"))

    def test_a_degree_without_a_bandwidth_can_not_be_asked_for(self, parse: Parse, tmp_path: Path) -> None:
        path = cost_model_file(tmp_path)
        with pytest.raises(FlexSPError, match=rf"--flexsp-degrees: {path} has no bandwidth for 8 ranks"):
            settings_from_args(parse(f"--flexsp-cost-model {path} --flexsp-degrees 1,8"))


def settled(args: Namespace) -> Settings:
    """Both steps, between which Megatron validates its own arguments."""
    check_flags(args)
    return settings_from_args(args)


def cost_model_file(folder: Path, **changes: object) -> Path:
    """A cost model with keys changed, or left out where the value is None."""
    values = {key: value for key, value in (COST_MODEL | changes).items() if value is not None}
    path = folder / "cost_model.json"
    path.write_text(json.dumps(values))
    return path
