"""What a job has changed in Megatron, and in its own arguments: what it needs, and all of it told."""

from argparse import Namespace
from collections.abc import Callable

import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron.argument_changes import ArgumentChanges

Parse = Callable[..., Namespace]


@pytest.fixture
def a_fork_that_renamed_a_routers_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer.moe.router import TopKRouter

    monkeypatch.delattr(TopKRouter, "_apply_expert_bias")


@pytest.mark.usefixtures("a_fork_that_renamed_a_routers_method")
def test_a_place_that_has_moved_stops_only_those_who_need_it(parse: Parse) -> None:
    from megatron_flexsp.megatron import training_seams

    run = training_seams.FlexSPTraining()
    for seam in [*training_seams.entry_seams(run), *training_seams.job_seams(run, parse())]:
        seam.resolve()
    with pytest.raises(FlexSPError, match=r"TopKRouter\._apply_expert_bias is not there"):
        for seam in training_seams.job_seams(run, parse("--num-experts 4")):
            seam.resolve()


@pytest.mark.parametrize(
    ("flags", "target"),
    [
        ("--num-experts 4", "TopKRouter.forward"),
        ("--multi-latent-attention", "MLASelfAttention.get_query_key_value_tensors"),
        ("--mtp-num-layers 1", "multi_token_prediction:roll_tensor"),
        ("--flexsp-profile costs.json", "training:train_step"),
    ],
)
def test_a_model_brings_its_own_places(flags: str, target: str, parse: Parse) -> None:
    from megatron_flexsp.megatron import training_seams

    def targets(args: Namespace) -> set[str]:
        return {seam.target for seam in training_seams.job_seams(training_seams.FlexSPTraining(), args)}

    plain, further = targets(parse()), targets(parse(flags))
    assert plain < further <= targets(training_seams.EVERYTHING)
    assert {name for name in further - plain if name.endswith(target)}


def test_changed_arguments_are_told(capsys: pytest.CaptureFixture) -> None:
    args, changes = Namespace(micro_batch_size=None, lr=0.1, sft=False), ArgumentChanges()
    with changes.seen(args):
        args.micro_batch_size, args.lr = 1, 0.1
    args.sft = True  # by Megatron
    with changes.seen(args):
        args.tp_only_amax_red = True
    changes.print()
    assert capsys.readouterr().out.endswith(": micro_batch_size=1, tp_only_amax_red=True\n")


def test_nothing_is_told_where_nothing_changed(capsys: pytest.CaptureFixture) -> None:
    changes = ArgumentChanges()
    with changes.seen(Namespace(lr=0.1)):
        pass
    changes.print()
    assert capsys.readouterr().out == ""
