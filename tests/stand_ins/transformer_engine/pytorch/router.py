"""Megatron imports these names; experts are not stood in for."""

from typing import Any


def _absent(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = _absent
