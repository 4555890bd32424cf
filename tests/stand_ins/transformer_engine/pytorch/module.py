"""Linear layers and norms. Tensor-parallel communication is Megatron's own, where the real ones have theirs."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from transformer_engine.pytorch.fp8 import assert_dim_for_fp8_exec


def _norm(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if kind == "RMSNorm":
        # In single precision, as torch_norm's RMSNorm and the real kernels.
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps).to(
        x.dtype
    )


class LayerNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = Parameter(torch.ones(normalized_shape, dtype=params_dtype))
        self.bias = Parameter(torch.zeros(normalized_shape, dtype=params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: Tensor) -> Tensor:
        return _norm("LayerNorm", inp, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.Module):
    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = Parameter(torch.ones(normalized_shape, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: Tensor) -> Tensor:
        return _norm("RMSNorm", inp, self.weight, None, self.eps)


def _weight(
    module: Any,
    shape: tuple[int, int],
    parallel_mode: str | None,
    dtype: torch.dtype | None,
    init_method: Callable[[Tensor], Any],
    tracker: Callable[[], Any] | None,
    tracker_name: str | None,
) -> Parameter:
    """This rank's part of a matrix, initialised from the generator that the layer is told to use."""
    outputs, inputs = shape
    if parallel_mode == "column":
        outputs //= module.tp_size
    elif parallel_mode == "row":
        inputs //= module.tp_size
    weight = Parameter(torch.empty(outputs, inputs, dtype=dtype))
    with tracker().fork(*([tracker_name] if tracker_name else [])) if tracker else nullcontext():
        init_method(weight.data)
    weight.tensor_model_parallel = parallel_mode is not None
    weight.partition_dim = 1 if parallel_mode == "row" else 0
    weight.partition_stride = 1
    return weight


class Linear(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        save_original_input: bool = False,
    ) -> None:
        super().__init__()
        self.save_original_input = save_original_input
        assert not bias and not return_bias and not fuse_wgrad_accumulation and init_method is not None
        self.tp_group, self.parallel_mode = tp_group, parallel_mode
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.weight = _weight(
            self,
            (out_features, in_features),
            parallel_mode,
            params_dtype,
            init_method,
            get_rng_state_tracker,
            rng_tracker_name,
        )

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        assert_dim_for_fp8_exec(inp, self.weight)
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
            else:
                inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        out = F.linear(inp, self.weight)
        if self.parallel_mode == "row":
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out


class LayerNormLinear(torch.nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
    ) -> None:
        super().__init__()
        assert parallel_mode == "column" and init_method is not None
        assert not (bias or return_bias or fuse_wgrad_accumulation or return_layernorm_output or zero_centered_gamma)
        self.tp_group, self.eps, self.normalization = tp_group, eps, normalization
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.layer_norm_weight = Parameter(torch.ones(in_features, dtype=params_dtype))
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = Parameter(torch.zeros(in_features, dtype=params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = self.sequence_parallel
        self.weight = _weight(
            self, (out_features, in_features), parallel_mode, params_dtype, init_method, get_rng_state_tracker, None
        )

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        inp = _norm(self.normalization, inp, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        assert_dim_for_fp8_exec(inp, self.weight)
        if self.sequence_parallel:
            inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
        else:
            inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        return F.linear(inp, self.weight)


class GroupedLinear(torch.nn.Module):
    """Megatron makes a subclass as it is imported; experts are not stood in for."""
