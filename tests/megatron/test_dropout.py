"""What dropout draws from."""

import itertools

import pytest
import torch

from megatron_flexsp.megatron.dropout import step_seed
from megatron_flexsp.runtime.attention import packed_causal_attention


def test_no_two_ranks_and_no_two_steps_drop_alike() -> None:
    places = list(itertools.product((1234, 1235), (0, 64, 128), range(16), range(4)))
    seeds = sorted(step_seed(*place) for place in places)
    assert seeds == sorted({step_seed(*place) for place in places})  # the same each time
    assert seeds[0] >= 0 and seeds[-1] < 2**31


def test_attention_drops_weights_and_makes_up_for_them() -> None:
    torch.manual_seed(1)
    heads, tokens, width = 64, 96, 8
    q, k = torch.randn(tokens, heads, width), torch.randn(tokens, heads, width)
    ones = torch.ones(tokens, heads, width)
    dropped = packed_causal_attention(q, k, ones, (40, 56), softmax_scale=0.1, dropout=0.25)
    whole = packed_causal_attention(q, k, ones, (40, 56), softmax_scale=0.1)
    torch.testing.assert_close(whole, ones)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    # A first token sees itself alone: its one weight is dropped, or grows by 4/3.
    assert {round(value, 4) for value in dropped[0, :, 0].tolist()} == {0.0, 1.3333}
