"""install(): what a program sees afterwards, and when it refuses."""

import subprocess
import sys
import types
from pathlib import Path

import pytest

from megatron_flexsp.cpu import install
from megatron_flexsp.errors import FlexSPError

AFTERWARDS = """
import torch
from megatron_flexsp.cpu import install
install()
replaced = torch.cuda.is_available
install()
assert torch.cuda.is_available is replaced, "the second call did something"

assert torch.cuda.is_available() and torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
assert not torch.accelerator.is_available()
assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == torch.cuda.max_memory_allocated() == 0

start, end, side = torch.cuda.Event(enable_timing=True), torch.cuda.Event(), torch.cuda.Stream()
start.record()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side), torch.cuda.device(0):
    x = torch.ones(3, device=torch.cuda.current_device())
x.record_stream(side)
end.record(side)
assert 0 < start.elapsed_time(end) < 10_000

torch.cuda.manual_seed(7)
state = torch.cuda.get_rng_state()
drawn = torch.rand(3, device="cuda")
list(torch.utils.data.DataLoader([1, 2]))
following = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(drawn, torch.rand(3))
assert torch.equal(following, torch.rand(3)), "a data loader drew from CUDA's generator"

double = torch.compile(lambda x: 2 * x)
@torch.compile(dynamic=True)
def triple(x): return 3 * x
assert double(2) + triple(2) == 10

class OnCuda(torch.autograd.Function):
    def forward(ctx, x): return x * torch.full((), 2.0, device="cuda")
    def backward(ctx, gradient): return gradient * torch.full((), 3.0, device="cuda")
for backward in (torch.Tensor.backward, torch.autograd.backward):
    x = torch.ones(1, requires_grad=True)
    backward(OnCuda.apply(x).sum())
    assert x.grad.item() == 3.0

x = torch.ones(2).requires_grad_()
x.sum().backward()
torch.optim.AdamW([x], foreach=None).step()

torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
assert torch.distributed.get_backend() == "gloo"
torch.distributed.barrier(device_ids=[0])
group = torch.distributed.new_group([0], backend="nccl")
y = torch.full((1,), 6.0)
torch.distributed.all_reduce(y, op=torch.distributed.ReduceOp.AVG, group=group)
assert y.item() == 6.0
torch.distributed.destroy_process_group()
"""


def test_a_program_for_cuda_runs() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", AFTERWARDS], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_refuses_after_megatron_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    with pytest.raises(FlexSPError, match="too late"):
        install()
