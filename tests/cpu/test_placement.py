"""The mode that turns CUDA devices into the CPU."""

import pytest
import torch

from megatron_flexsp.cpu.placement import CudaMeansCpu


@pytest.fixture(autouse=True)
def mode() -> object:
    with CudaMeansCpu():
        yield


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda"), torch.device("cuda", 1)])
def test_every_way_to_name_a_cuda_device_means_the_cpu(device: object) -> None:
    made = torch.zeros(2, device=device)
    assert made.device.type == "cpu"
    assert made.to(device).device.type == "cpu"
    assert made.to(device=device, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert made.cuda(device, non_blocking=True).device.type == "cpu"


def test_other_devices_and_arguments_stay() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to(torch.float16).dtype == torch.float16
    assert torch.zeros(2).to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64


def test_modules_move_by_doing_nothing() -> None:
    layer = torch.nn.Linear(2, 2, device="cuda")
    weight = layer.weight
    assert layer.cuda(0).to("cuda").weight is weight


def test_types_are_named_as_on_cuda() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.zeros(1).type(torch.int32).dtype == torch.int32


def test_memory_is_not_pinned() -> None:
    assert not torch.zeros(1, pin_memory=True).pin_memory().is_pinned()
