"""Mixtures of experts by their flags: which schedule, which dispatcher, and what can't be right over packs."""

from argparse import Namespace
from collections.abc import Callable

import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.experts import let_ranks_differ_in_tokens
from megatron_flexsp.megatron.flag_checks import check_compatibility
from megatron_flexsp.megatron.settings import settings_from_args

Parse = Callable[..., Namespace]

EXPERTS = "--num-experts 8 --disable-bias-linear "
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel "


class TestSchedule:
    @pytest.mark.parametrize(
        ("more", "schedule"),
        [
            ("", "nested"),
            ("--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 1 1", "nested"),
            (f"{TENSOR}", "nested"),
            (f"{TENSOR} --expert-model-parallel-size 2 --expert-tensor-parallel-size 1", "nested"),
            ("--pipeline-model-parallel-size 2", "nested"),
            ("--expert-model-parallel-size 2", "lockstep"),
            ("--expert-tensor-parallel-size 2", "lockstep"),
            (f"{TENSOR} --expert-model-parallel-size 2", "lockstep"),
            (f"{TENSOR} --expert-model-parallel-size 4 --expert-tensor-parallel-size 1", "lockstep"),
            ("--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1", "lockstep"),
        ],
    )
    def test_is_lockstep_where_ranks_meet_in_every_micro_batch(self, more: str, schedule: str, parse: Parse) -> None:
        settings = settings_from_args(parse(EXPERTS + more))
        assert (settings.schedule, settings.in_rounds) == (schedule, schedule == "lockstep")

    @pytest.mark.parametrize("schedule", ["nested", "batch-adaptive"])
    def test_another_is_refused_with_the_reason(self, schedule: str, parse: Parse) -> None:
        apart = f"--flexsp-schedule {schedule} {EXPERTS}"
        assert settings_from_args(parse(apart)).schedule == schedule
        with pytest.raises(FlexSPError, match=rf"--flexsp-schedule {schedule}: experts lie on several .*-size 2 x "):
            settings_from_args(parse(f"{apart} --expert-model-parallel-size 2"))
        with pytest.raises(FlexSPError, match=rf"--flexsp-schedule {schedule}: global_aux_loss adds up over all"):
            settings_from_args(parse(f"{apart} --moe-router-load-balancing-type global_aux_loss"))

    def test_static_groups_run_in_rounds(self, parse: Parse) -> None:
        settings = settings_from_args(parse(f"{EXPERTS} --expert-model-parallel-size 2 --flexsp-schedule static"))
        assert (settings.schedule, settings.in_rounds) == ("static", True)


@pytest.mark.parametrize(
    ("more", "dispatcher"),
    [
        ("", "alltoall"),
        (EXPERTS, "alltoall"),  # allgather, Megatron's default, wants micro-batches of one length
        (f"{EXPERTS} --moe-token-dispatcher-type allgather", "alltoall"),
        (f"{EXPERTS} --moe-token-dispatcher-type flex", "flex"),
    ],
)
def test_the_dispatcher_asked_for_is_kept_where_lengths_may_differ(more: str, dispatcher: str, parse: Parse) -> None:
    args = parse(more)
    let_ranks_differ_in_tokens(args)
    assert args.moe_token_dispatcher_type == dispatcher


def test_hybridep_pads_to_the_rank_with_the_most_tokens(parse: Parse) -> None:
    """A flag of its own has it do so, from Megatron 0.19 on."""
    args = parse(f"{EXPERTS} --moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep")
    check_compatibility(args)
    let_ranks_differ_in_tokens(args)
    assert args.moe_hybridep_pad_uneven_dispatch_inputs
    del args.moe_hybridep_pad_uneven_dispatch_inputs
    with pytest.raises(FlexSPError, match="hybridep before Megatron"):
        check_compatibility(args)


@pytest.mark.parametrize(
    "more",
    [
        "--moe-router-load-balancing-type sinkhorn",
        "--moe-expert-capacity-factor 1.0",
        "--moe-input-jitter-eps 0.1",
        "--overlap-moe-expert-parallel-comm",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
        "--tensor-model-parallel-size 2",
    ],
)
def test_what_is_not_right_over_packs_or_not_tried_is_refused(more: str, parse: Parse) -> None:
    check_compatibility(parse(EXPERTS))
    flag = more.split()[-2 if more.split()[-1][0] != "-" else -1]
    with pytest.raises(FlexSPError, match=rf"--flexsp can't be combined with\n  - .*{flag}"):
        check_compatibility(parse(EXPERTS + more))
