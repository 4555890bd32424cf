"""What differs between releases: found by what is there, and made up for exactly."""

from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import releases
from megatron_flexsp.megatron.flag_checks import check_compatibility


def test_every_name_that_megatron_calls_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training import arguments, initialize

    assert releases.places_of("parse_args")[0] == "megatron.training.arguments:parse_args"
    monkeypatch.setattr(initialize, "parse_args", arguments.parse_args, raising=False)
    assert releases.places_of("parse_args")[1:] == ["megatron.training.initialize:parse_args"]
    monkeypatch.delattr(initialize, "parse_args")
    assert releases.places_of("parse_args")[1:] == []


@pytest.mark.parametrize("model", ["", "--num-experts 4 --swiglu --group-query-attention --num-query-groups 2"])
def test_operations_of_unequal_lengths_from_a_count_of_equal_ones(
    model: str, parse: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the count of a release that takes lengths."""
    from megatron.training.training import num_floating_point_operations

    args = parse(f"--ffn-hidden-size 64 --kv-channels 4 {model}")
    args.padded_vocab_size = 264
    lengths = np.array([3, 48, 17, 1, 30])
    expected = num_floating_point_operations(
        args,
        len(lengths),
        seqlen_squared_sum_in_batch=float((lengths**2).sum()),
        total_real_tokens_in_batch=float(lengths.sum()),
    )
    assert releases.count_operations(num_floating_point_operations, args, lengths) == pytest.approx(expected, rel=1e-9)


def test_outputs_stay_where_megatron_would_free_them_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = SimpleNamespace(config=SimpleNamespace(deallocate_pipeline_outputs=True))
    releases.keep_what_is_being_sent([chunk])
    assert chunk.config.deallocate_pipeline_outputs  # 0.19 waits for the transfer

    from megatron.core.pipeline_parallel import schedules

    # It says nothing of waiting.
    monkeypatch.setattr(schedules, "forward_backward_pipelining_with_interleaving", schedules.deallocate_output_tensor)
    releases.frees_what_is_being_sent.cache_clear()
    releases.keep_what_is_being_sent([chunk])
    releases.frees_what_is_being_sent.cache_clear()
    assert not chunk.config.deallocate_pipeline_outputs


def test_a_chat_template_gives_tokens_alone_where_megatron_counts_on_it() -> None:
    class Plain:
        def apply_chat_template(self, conversation: list[str], return_dict: bool = True) -> object:
            return {"input_ids": conversation} if return_dict else conversation

    class ReadsBoth(SimpleNamespace):
        def _extract_token_ids(self) -> None: ...

    for sft, gives in (
        (SimpleNamespace(_tokenizer=Plain()), ["a"]),
        (ReadsBoth(_tokenizer=Plain()), {"input_ids": ["a"]}),
    ):
        releases.have_chat_templates_give_tokens(SimpleNamespace(_tokenizer=sft))
        assert sft._tokenizer.apply_chat_template(["a"]) == gives


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dynamic_context_parallel", True),
        ("use_varlen_dataset", True),
        ("enable_mhc_connections", True),
        ("rotary_base_per_layer", [1e4] * 4),
        ("mtp_hsm", True),
        ("moe_n_hash_layers", 1),
        ("expert_tensor_parallel_num_weight_shards", 2),
    ],
)
def test_what_only_newer_releases_have_is_refused(name: str, value: object, parse: Callable[..., Namespace]) -> None:
    """Set here, since the installed release may not know the flag."""
    args = parse("--num-experts 4")
    check_compatibility(args)
    setattr(args, name, value)
    with pytest.raises(FlexSPError, match="--" + name.replace("_", "-")):
        check_compatibility(args)
