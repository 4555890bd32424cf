"""What a run takes from the machine that it is on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_flexsp.megatron.context import load_cost_model
from megatron_flexsp.megatron.estimate import estimate_cost_model
from tests.megatron.test_estimate import arguments


def test_ranks_with_unequal_gpus_take_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would think that it holds another number of tokens, and choose other groups."""
    monkeypatch.delenv("FLEXSP_DEVICE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    ours = SimpleNamespace(major=9, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: ours)
    theirs = torch.tensor([9, (80 << 30) - (300 << 20)])

    class TwoRanks:
        def all_reduce(self, tensor: torch.Tensor, op: Any) -> None:
            assert op == torch.distributed.ReduceOp.MIN
            torch.minimum(tensor, theirs, out=tensor)

    settings: Any = SimpleNamespace(cost_model=None, degrees=(1, 2), micro_batches_in_flight=1)
    hosts: Any = TwoRanks()
    expected = estimate_cost_model(
        arguments(), (1, 2), gpu=(9, (80 << 30) - (300 << 20)), ranks_per_node=8, micro_batches_in_flight=1
    )
    assert load_cost_model(arguments(), settings, hosts) == expected
