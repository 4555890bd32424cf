"""CUDA's random numbers: the CPU's generator plays the part of the CUDA device's.

Dropout and weights draw from it, and Megatron keeps its state for recomputation, for tensor-parallel regions and in
checkpoints, through the functions below.
"""

from typing import Any

import torch
from torch.utils.data import dataloader

from megatron_flexsp.cpu.replace import replaces

torch_default_generator = torch.default_generator


@replaces(torch.cuda)
def manual_seed(seed: int) -> None:
    """Seeds the one generator. (`torch.manual_seed` would call back here.)"""
    torch_default_generator.manual_seed(seed)


@replaces(torch.cuda)
def manual_seed_all(seed: int) -> None:
    """Seeds the one generator, also when `torch.manual_seed` asks for it."""
    torch_default_generator.manual_seed(seed)


@replaces(torch.cuda)
def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    """The state of the one generator."""
    return torch_default_generator.get_state()


@replaces(torch.cuda)
def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    """Sets the state of the one generator."""
    torch_default_generator.set_state(new_state)


@replaces(torch.cuda.random, name="get_rng_state")
def random_get_rng_state(device: Any = "cuda") -> torch.Tensor:
    """The name that Megatron's random-state tracker reads."""
    return torch_default_generator.get_state()


@replaces(torch._C)
def _cuda_setRNGState(new_state: torch.Tensor) -> None:
    """The name that Megatron's random-state tracker writes."""
    torch_default_generator.set_state(new_state)


_data_loader_iterator_init = dataloader._BaseDataLoaderIter.__init__


@replaces(dataloader._BaseDataLoaderIter, name="__init__")
def data_loader_iterator_init(self: Any, loader: Any) -> None:
    """A data loader draws a seed from the CPU's generator, and only some ranks have a data loader.

    With a CUDA device that leaves the device's generator alone. Without this, tensor-parallel ranks would apply
    different dropout to the same activations, and a resumed run would not equal an uninterrupted one.
    """
    state = torch_default_generator.get_state()
    _data_loader_iterator_init(self, loader)
    torch_default_generator.set_state(state)
