"""What the fused kernels of multi-latent attention are given for a slice; they run on GPUs alone."""

import pytest
import torch


def test_each_token_has_the_row_of_its_own_position(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    from megatron_flexsp.megatron import latent_attention, packed_attention

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))

    def made() -> YarnRotaryEmbedding:
        return YarnRotaryEmbedding(
            8, original_max_position_embeddings=4, scaling_factor=4.0, mscale=0.7, use_cpu_initialization=True
        )

    whole = made().get_cached_cos_sin(100)
    for seam in latent_attention.seams():
        if seam.target.endswith("get_cached_cos_sin"):
            assert seam.replacement is not None
            patched = seam.replacement(YarnRotaryEmbedding.get_cached_cos_sin)
            monkeypatch.setattr(YarnRotaryEmbedding, "get_cached_cos_sin", patched)
    monkeypatch.setattr(YarnRotaryEmbedding, "forward", packed_attention.rotary_forward(YarnRotaryEmbedding.forward))
    length = packed_attention.PackedLength(41)
    length.positions = torch.tensor([37, 38, 40, 0, 1, 2, 0, 0])
    embedding = made()
    found = embedding.get_cached_cos_sin(length)
    for part, expected in zip(found, whole, strict=True):
        assert part.is_contiguous()
        assert torch.equal(part, expected[length.positions])
    # What it keeps is still that of sequences from 0 on.
    assert torch.equal(embedding.get_cached_cos_sin(20)[0], whole[0][:20])
    # The same as the angles without fused kernels, and scaled as those are.
    angles, scale = embedding(length)
    assert torch.equal(found[0], angles.cos() * scale)
