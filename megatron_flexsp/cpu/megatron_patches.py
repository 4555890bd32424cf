"""What Megatron itself needs changed on a machine without a GPU. The one module of this room that knows its names.

Import it only after PyTorch's names are replaced: it imports Megatron.
"""

import functools
import importlib.util
import logging
import os
from argparse import Namespace
from typing import Any

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer import torch_norm
from megatron.training import arguments, initialize

from megatron_flexsp.cpu.replace import replaces

_parse_args = arguments.parse_args
_compile_helpers = dataset_utils.compile_helpers
_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict
_new_norm = torch_norm.WrappedTorchNorm.__new__


# Arguments that choose between kernels for the same mathematics, and the choice whose kernels exist on a CPU.
CPU_KERNELS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "cross_entropy_fusion_impl": "native",
}


@replaces(arguments)
@functools.wraps(_parse_args)
def parse_args(*positional: Any, **named: Any) -> Namespace:
    """Megatron's defaults, and GPU users, ask for CUDA kernels. Says on rank 0 which arguments it changed."""
    args = _parse_args(*positional, **named)
    chosen = {name: value for name, value in CPU_KERNELS.items() if getattr(args, name, value) != value}
    vars(args).update(chosen)
    if chosen and os.environ.get("RANK", "0") == "0":
        print("CPU kernels instead of CUDA's:", ", ".join(f"{name}={value}" for name, value in chosen.items()))
    return args


if hasattr(initialize, "parse_args"):  # the name that Megatron 0.17 calls
    replaces(initialize)(parse_args)


@replaces(dataset_utils)
@functools.wraps(_compile_helpers)
def compile_helpers() -> None:
    """The wheel brings the compiled helpers but no Makefile, and the original ends the process when `make` fails."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        _compile_helpers()


@replaces(DistributedOptimizer)
@functools.wraps(_state_dict)
def state_dict(self: Any) -> Any:
    """Without Apex and Transformer Engine, the original asserts that Adam has taken a step; loading comes before that.

    Adam's state before its first step is zeros.
    """
    adam = self.optimizer
    if isinstance(adam, torch.optim.Adam):
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            if not adam.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return _state_dict(self)


@replaces(DistributedOptimizer)
@functools.wraps(_load_state_dict)
def load_state_dict(self: Any, state_dict: Any) -> None:
    """Mends what shows only with PyTorch's Adam or with fp32 parameters, and keeps a resumed run from being exact.

    The original writes into fp32 parameters with autograd on, which PyTorch refuses. It gives all parameters one tensor
    as their step, so that Adam's next step would count once for each; and in the default checkpoint format it
    overwrites the number of steps with that of the optimizer before loading.
    """
    with torch.no_grad():
        _load_state_dict(self, state_dict)
    if isinstance(self.optimizer, torch.optim.Adam):
        step = state_dict["optimizer"]["param_groups"][0]["step"]
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(float(step))


@replaces(torch_norm.WrappedTorchNorm)
@functools.wraps(_new_norm)
def new_norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses sequence parallelism, for which it lacks only the mark that has a parameter's gradient summed."""
    sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
    try:
        norm = _new_norm(cls, config, *args, **kwargs)
    finally:
        config.sequence_parallel = sequence_parallel
    for parameter in norm.parameters():
        parameter.sequence_parallel = sequence_parallel
    return norm


def expect_one_generator() -> None:
    """Silence the tracker's warning that, inside a CUDA random state, the CPU's changed: here they are the same."""
    tracker = logging.getLogger("megatron.core.tensor_parallel.random")
    tracker.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
