"""The fused rotary embedding, not fused."""

import torch


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    start_positions: torch.Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    assert tensor_format != "thd" or cu_seqlens is not None
    assert (tensor_format, start_positions, interleaved, fused, cp_size) == ("sbhd", None, False, True, 1)
    # The kernel takes row i of the angles for token i, whatever the number of rows.
    assert freqs.dim() == 4 and freqs.shape[1:3] == (1, 1) and freqs.shape[0] >= t.shape[0]
    freqs = freqs[: t.shape[0]].float()
    turned, kept = t[..., : freqs.shape[-1]], t[..., freqs.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    half_turn = torch.cat((-second, first), dim=-1)
    turned = turned * freqs.cos().to(t.dtype) + half_turn * freqs.sin().to(t.dtype)
    return torch.cat((turned, kept), dim=-1)
