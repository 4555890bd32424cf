"""What autograd keeps is counted once each, and no longer than it is kept."""

import torch
from torch.utils.checkpoint import checkpoint

from megatron_flexsp.profiler.memory import SavedBytes, state_bytes


def test_counts_saved_tensors_but_not_parameters() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    x = torch.ones(16, 64, requires_grad=True)
    with SavedBytes([weight]) as saved:
        y = (x @ weight).exp()
        held = saved.held
        y.sum().backward()
    assert held == x.nbytes + y.nbytes  # the product keeps x, the exponential its result
    assert saved.peak == held
    del y
    assert saved.held == 0


def test_recomputed_layers_count_one_at_a_time() -> None:
    def layer(x: torch.Tensor) -> torch.Tensor:
        return x.exp().sin().cos()

    def peak(recompute: bool) -> int:
        x = torch.ones(1000, requires_grad=True)
        with SavedBytes() as saved:
            y = x
            for _ in range(8):
                y = checkpoint(layer, y, use_reentrant=True) if recompute else layer(y)
            y.sum().backward()
        return saved.peak

    # Sine and cosine keep what they are given; the first of these is the exponential's result.
    assert peak(recompute=False) == 8 * 2 * 4000
    assert peak(recompute=True) <= (8 + 2) * 4000


def test_views_of_one_storage_count_once() -> None:
    whole = torch.zeros(100)
    assert state_bytes([whole[:10], whole[50:], None, torch.zeros(5)]) == 400 + 20
