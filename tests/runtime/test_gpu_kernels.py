"""What the kernels of a GPU are asked for, on tensors that only claim to lie on one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_flexsp.runtime.attention import packed_causal_attention
from megatron_flexsp.runtime.block_attention import Segments, block_attention, block_attention_backward

FORWARD, BACKWARD = torch.ops.aten._flash_attention_forward.default, torch.ops.aten._flash_attention_backward.default


class Calls(TorchDispatchMode):
    """The positional arguments of the last call of each kernel. PyTorch's own check of shapes runs behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, kernel: Any, types: Any, args: Any = (), others: Any = None) -> Any:
        self.seen[kernel] = args
        return kernel(*args, **(others or {}))


@pytest.fixture(autouse=True)
def calls() -> Iterator[dict[Any, tuple[Any, ...]]]:
    with FakeTensorMode(), Calls() as made:
        yield made.seen


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def bounds(segments: int) -> Tensor:
    return on_gpu(segments + 1, dtype=torch.int32)


@pytest.mark.parametrize("q_lengths", [(5, 3), (1, 0, 1)])
def test_the_ring_asks_for_what_pytorch_takes(q_lengths: tuple[int, ...], calls: dict[Any, tuple[Any, ...]]) -> None:
    k_lengths = (4,) * len(q_lengths)
    segments = Segments(q_lengths, k_lengths, bounds(len(q_lengths)), bounds(len(q_lengths)))
    q = on_gpu(sum(q_lengths), 4, 64)
    kv = on_gpu(sum(k_lengths), 4, 64)
    k, v = kv[:, :2], kv[:, 2:]
    out, lse = block_attention(q, k, v, segments, causal=False, softmax_scale=1.0)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, len(q)), torch.float32)
    found = block_attention_backward(out, q, k, v, out, lse, segments, causal=False, softmax_scale=1.0)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
    for kernel, first in ((FORWARD, 5), (BACKWARD, 8)):
        # With grouped heads the kernel takes 1 as "one query in every stretch", and fails on a stretch without any.
        assert calls[kernel][first : first + 2] == (max(2, *q_lengths), 4)


def test_no_kernel_is_compiled_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """As cuDNN's would be, which newer versions of PyTorch prefer."""
    allowed = []
    kernel = F.scaled_dot_product_attention

    def spied(*args: Any, **others: Any) -> Tensor:
        allowed.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return kernel(*args, **others)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    q = on_gpu(9, 4, 64)
    packed_causal_attention(q, q[:, :2], q[:, 2:], (4, 5), 1.0)
    assert allowed == [(False, True)] * 2
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
