"""What we rely on in Transformer Engine, held against the oldest and the newest release that we know.

Transformer Engine can't be imported without a GPU, so its sources are read. scripts/test.sh downloads the two wheels.
"""

import ast
import sys
from pathlib import Path

import pytest

from tests.megatron.te_sources import Release, assertions, definition, parameters, uses

STAND_IN = Path(__file__).parents[1] / "stand_ins" / "transformer_engine"
WHEELS = Path(sys.prefix) / "transformer_engine"
ATTENTION = "pytorch/attention/dot_product_attention/dot_product_attention.py"


@pytest.fixture(params=["2.8.0", "2.20.2"])
def release(request: pytest.FixtureRequest) -> Release:
    wheel = WHEELS / f"transformer_engine-{request.param}-py3-none-any.whl"
    if not wheel.is_file():
        pytest.skip(f"{wheel} is missing: pip download --no-deps --dest {wheel.parent} transformer_engine")
    return Release(wheel)


def real_file(release: Release, *paths: str) -> str:
    """The first of these files that the release has: some moved."""
    return next(path for path in paths if release.has(path))


@pytest.mark.parametrize(
    ("stand_in", "name", "paths"),
    [
        *[
            ("attention/__init__.py", f"DotProductAttention.{method}", (ATTENTION,))
            for method in ("__init__", "forward")
        ],
        *[("module.py", f"Linear.{method}", ("pytorch/module/linear.py",)) for method in ("__init__", "forward")],
        *[
            ("module.py", f"LayerNormLinear.{method}", ("pytorch/module/layernorm_linear.py",))
            for method in ("__init__", "forward")
        ],
        ("module.py", "LayerNorm.__init__", ("pytorch/module/layernorm.py",)),
        ("module.py", "RMSNorm.__init__", ("pytorch/module/rmsnorm.py",)),
        ("attention/rope.py", "apply_rotary_pos_emb", ("pytorch/attention/rope.py",)),
        ("distributed.py", "activation_recompute_forward.__init__", ("pytorch/distributed.py",)),
        ("distributed.py", "checkpoint", ("pytorch/distributed.py",)),
        ("fp8.py", "fp8_autocast", ("pytorch/quantization.py", "pytorch/fp8.py")),
        ("fp8.py", "fp8_model_init", ("pytorch/quantization.py", "pytorch/fp8.py")),
        ("fp8.py", "FP8GlobalStateManager.is_fp8_enabled", ("pytorch/quantization.py", "pytorch/fp8.py")),
    ],
)
def test_the_stand_in_has_the_real_signature(
    release: Release, stand_in: str, name: str, paths: tuple[str, ...]
) -> None:
    """It may lack parameters that needn't be given; what it has stands in the real order, with the real default."""
    real = parameters(release.function(real_file(release, *paths), name))
    source = ast.parse((STAND_IN / "pytorch" / stand_in).read_text())
    ours = parameters(definition(source, name))
    assert list(ours) == [parameter for parameter in real if parameter in ours]
    for parameter, default in ours.items():
        # The newest attention can do without a query, and takes one all the same.
        assert default == real[parameter] or default is None, parameter
    assert [parameter for parameter, default in real.items() if default is None and parameter not in ours] == []


def test_packed_attention_asserts_what_we_give_it(release: Release) -> None:
    assert assertions(release.function(ATTENTION, "DotProductAttention.forward")) >= {
        "num_gqa_groups == self.num_gqa_groups_per_partition",
        "key_layer.shape[:-1] == value_layer.shape[:-1]",
        "query_layer.shape[-1] == key_layer.shape[-1]",
        "query_layer.dtype == key_layer.dtype and query_layer.dtype == value_layer.dtype",
        "all((len(x.shape) == 3 for x in (query_layer, key_layer, value_layer)))",
        "'padding' in attn_mask_type",
        "cu_seqlens_q is not None and cu_seqlens_kv is not None",
        "cu_seqlens_q.dtype == torch.int32 and cu_seqlens_kv.dtype == torch.int32",
    }
    layout = release.function("pytorch/attention/dot_product_attention/utils.py", "get_qkv_layout")
    assert "check_last_dim_contiguous" in assertions(layout)


def test_the_number_of_key_value_heads_is_only_asserted(release: Release) -> None:
    """So that another number may be put there for one call."""
    attention = release.module(ATTENTION)
    places = uses(attention, "num_gqa_groups_per_partition")
    stored = [place for place in places if isinstance(place.ctx, ast.Store)]
    asserted = [
        place
        for node in ast.walk(release.function(ATTENTION, "DotProductAttention.forward"))
        if isinstance(node, ast.Assert)
        for place in uses(node, "num_gqa_groups_per_partition")
    ]
    assert len(stored) == 1
    assert len(places) == len(stored) + len(asserted)


def test_the_widths_of_heads_are_only_asserted(release: Release) -> None:
    """So that values may be widened to the queries' width for one call."""
    module, forward = release.module(ATTENTION), release.function(ATTENTION, "DotProductAttention.forward")
    for name in ("hidden_size_per_attention_head_k", "hidden_size_per_attention_head_v"):
        places = uses(module, name)
        asserted = [place for node in ast.walk(forward) if isinstance(node, ast.Assert) for place in uses(node, name)]
        said = [
            place for node in ast.walk(forward) if isinstance(node, ast.FormattedValue) for place in uses(node, name)
        ]
        stored = [place for place in places if isinstance(place.ctx, ast.Store)]
        assert len(stored) == 1
        assert {id(place) for place in places} == {id(place) for place in (*stored, *asserted, *said)}


def test_the_scale_of_the_scores_is_kept_where_it_is_looked_for(release: Release) -> None:
    made = release.function("pytorch/attention/dot_product_attention/backends.py", "FlashAttention.__init__")
    assert "self.softmax_scale = softmax_scale" in [ast.unparse(node) for node in ast.walk(made)]
    attention = release.function(ATTENTION, "DotProductAttention.__init__")
    given = [
        ast.unparse(node.value.args[0])
        for node in ast.walk(attention)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.flash_attention"
    ]
    assert given == ["softmax_scale"]


def test_the_softmax_offset_is_read_at_each_call(release: Release) -> None:
    """So that a member's part of it may be put there for one call."""
    forward = release.function(ATTENTION, "DotProductAttention.forward")
    read = [ast.unparse(node) for node in ast.walk(forward) if isinstance(node, ast.IfExp)]
    wanted = "self.softmax_offset.reshape(1, -1, 1, 1).to(torch.float32) if self.softmax_offset is not None else None"
    assert wanted in read
    assert len(uses(forward, "softmax_offset")) == 2


def test_packs_have_attention_sinks_from_the_versions_that_are_asked_for(release: Release) -> None:
    backend = ast.unparse(release.function("pytorch/attention/dot_product_attention/utils.py", "get_attention_backend"))
    version = tuple(map(int, release.wheel.name.split("-")[1].split(".")))
    assert ("qkv_format == 'thd' and cudnn_version < (9, 18, 0)" in backend) == (version >= (2, 12))
    assert ("Disabling FusedAttention for softmax_type = %s and qkv_format = thd" in backend) == (version < (2, 12))


def test_lengths_are_asked_of_the_device_only_where_they_are_not_given(release: Release) -> None:
    forward = release.function(ATTENTION, "DotProductAttention.forward")
    asked = [node for node in ast.walk(forward) if isinstance(node, ast.If) and calls(node, "item")]
    innermost = {ast.unparse(node.test) for node in asked if not any(calls(inner, "item") for inner in inner_ifs(node))}
    assert innermost == {"max_seqlen_q is None", "max_seqlen_kv is None"}


def calls(tree: ast.AST, method: str) -> bool:
    return bool(uses(tree, method))


def inner_ifs(node: ast.If) -> list[ast.If]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.If) and inner is not node]


def test_padding_between_sequences_is_looked_for_only_where_padded_lengths_are_given(release: Release) -> None:
    """The comparison of both would make the host wait."""
    forward = release.function(ATTENTION, "DotProductAttention.forward")
    comparisons = [
        node for node in ast.walk(forward) if isinstance(node, ast.BoolOp) and "torch.equal" in ast.unparse(node)
    ]
    innermost = [node for node in comparisons if isinstance(node.op, ast.And)]
    assert all(ast.unparse(node.values[0]).endswith("_padded is not None") for node in innermost)
    assert bool(comparisons) == bool(innermost)


def test_kernels_of_8_bits_ask_of_tokens_what_slices_are_padded_to(release: Release) -> None:
    """Megatron's alignment, by which slices are padded, is a multiple of what is asked here."""
    dimensions = ast.unparse(release.function("pytorch/utils.py", "assert_dim_for_fp8_exec"))
    assert "math.prod(tensor.shape[:-1]) % 8" in dimensions
    constants = release.module("pytorch/constants.py").body
    assert "MXFP8_BLOCK_SCALING_SIZE = 32" in [ast.unparse(line) for line in constants]


def test_blocks_are_gathered_whole(release: Release) -> None:
    """Under sequence parallelism slices are padded to them; the oldest release takes nothing else."""
    path = "pytorch/tensor/float8_blockwise_tensor.py"
    asked = ast.unparse(release.function(path, "Float8BlockQuantizer.is_quantizable"))
    assert asked.count("% self.block_len != 0") == 2
    assert "self.block_len = 128" in ast.unparse(release.function(path, "Float8BlockQuantizer.__init__"))


def test_scaling_is_reduced_over_the_given_group_when_the_outermost_context_ends(release: Release) -> None:
    """The stand-in does so too; by other recipes than delayed scaling nothing is put into the buffer."""
    file = real_file(release, "pytorch/quantization.py", "pytorch/fp8.py")
    manager = next(
        node
        for node in release.module(file).body
        if isinstance(node, ast.ClassDef) and node.name == "FP8GlobalStateManager"
    )
    methods = {method.name: method for method in manager.body if isinstance(method, ast.FunctionDef)}
    ends = methods.get("autocast_exit") or methods["fp8_autocast_exit"]
    assert calls(ends, "reduce_and_update_fp8_tensors")
    assert calls(methods["reduce_and_update_fp8_tensors"], "reduce_tensor_across_group_op_max")
    conditions = [
        ast.unparse(node.test)
        for node in ast.walk(methods["add_fp8_tensors_to_global_buffer"])
        if isinstance(node, ast.If) and isinstance(node.body[0], ast.Return)
    ]
    assert any("delayed" in condition for condition in conditions)


def test_what_weights_are_scaled_by_is_the_same_on_all_ranks(release: Release) -> None:
    """With delayed scaling the optimizer enters the greatest value of all ranks' parts into a weight's history."""
    cast = ast.unparse(release.function("pytorch/tensor/utils.py", "_cast_master_weights_to_fp8_delayed_scaling"))
    in_order = [
        "amaxes.append(quantizer.amax.view(1))",
        "all_reduce(packed_amaxes, op=torch.distributed.ReduceOp.MAX, group=group)",
        "[packed_amax_views, amaxes]",
    ]
    assert sorted(in_order, key=cast.index) == in_order
