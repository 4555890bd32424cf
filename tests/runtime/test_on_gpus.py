"""The runtime on GPUs: its kernels on one, its groups over NCCL on four. ``pytest -m gpu tests/runtime``."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_flexsp.runtime.block_attention import Segments, block_attention, block_attention_backward
from tests.runtime.cases import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
TOLERANCE = 3e-2
"""Of bfloat16, and of the shortcuts that a GPU may take in 32 bits."""


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "causal"),
    [
        ((5, 130, 1), (5, 130, 1), True),
        ((1, 1), (1, 1), True),
        ((5, 0, 33), (7, 9, 200), False),
        ((5, 4, 33), (7, 0, 200), False),  # the second has nothing to attend to
        ((1, 0, 1), (3, 4, 5), False),
    ],
)
def test_a_part_of_a_ring_is_that_of_a_cpu(
    q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], causal: bool, heads: tuple[int, int]
) -> None:
    def bounds(lengths: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)

    torch.manual_seed(3)
    q, dout = torch.randn(2, sum(q_lengths), heads[0], 64).bfloat16()
    k, v = torch.randn(2, sum(k_lengths), heads[1], 64).bfloat16()
    results = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        segments = Segments(q_lengths, k_lengths, bounds(q_lengths).to(device), bounds(k_lengths).to(device))
        x = [tensor.to(device, dtype) for tensor in (q, k, v, dout)]
        out, lse = block_attention(*x[:3], segments, causal=causal, softmax_scale=0.2)
        # Queries without keys get theirs from the other parts of a ring: any finite number.
        whole = lse.masked_fill(lse == -torch.inf, 0.0)
        backward = block_attention_backward(x[3], *x[:3], out, whole, segments, causal=causal, softmax_scale=0.2)
        results[device] = [tensor.float().cpu() for tensor in (out, lse, *backward)]
    for name, found, wanted in zip(("out", "lse", "dq", "dk", "dv"), results["cuda"], results["cpu"], strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="there are fewer than four GPUs")
def test_groups_over_nccl_attend_as_one_process(torchrun: Callable, tmp_path: Path) -> None:
    torchrun(4, str(Path(__file__).parent / "four_processes.py"), str(tmp_path), "cuda", fresh=True)
    for rank in range(4):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for case in CASES:
            found = seen["differences"][case.name]
            assert all(difference < TOLERANCE for difference in found.values()), f"{case.name} on rank {rank}: {found}"
