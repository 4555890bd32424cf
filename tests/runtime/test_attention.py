"""Packed attention against a dense softmax over the whole pack with a block-diagonal causal mask."""

import pytest
import torch

from megatron_flexsp.runtime.attention import packed_causal_attention
from tests.runtime.dense import dense_attention


@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 1, 5), (2, 9, 1, 1, 4)])
@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (4, 2), (6, 3), (4, 1)])
def test_values_and_gradients_are_those_of_a_dense_softmax(
    heads: int, key_value_heads: int, lengths: tuple[int, ...]
) -> None:
    shapes = [(sum(lengths), count, 8) for count in (heads, key_value_heads, key_value_heads)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0])
    scale = 0.3  # not 1 / sqrt(8): the caller's factor counts

    out = packed_causal_attention(*inputs, lengths, scale)
    expected = dense_attention(*inputs, lengths, scale)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)

    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_a_token_never_sees_another_sequence_or_its_own_future() -> None:
    lengths = (3, 4)
    q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
    before = packed_causal_attention(q, k, v, lengths, 1.0)
    k[4], v[4] = torch.randn(2, 8), torch.randn(2, 8)
    after = packed_causal_attention(q, k, v, lengths, 1.0)
    changed = (before != after).any(dim=(1, 2)).tolist()
    assert changed == [False, False, False, False, True, True, True]
