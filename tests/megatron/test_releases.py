"""What differs between releases: found by what is there, and made up for exactly."""

from argparse import Namespace
from collections.abc import Callable

import numpy as np
import pytest

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import releases
from megatron_flexsp.megatron.arguments import check_compatibility


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dynamic_context_parallel", True),
        ("use_varlen_dataset", True),
        ("enable_mhc_connections", True),
        ("rotary_base_per_layer", [1e4] * 4),
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
