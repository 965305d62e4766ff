"""Attention maps against the softmax written out, and distances against a loop over patches."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import apply_rot_embed_cat

from selfsight.attention import attention_distance, attention_maps, mean_distance, patch_distances
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.recipe import DataConfig, EncoderConfig

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}
PLAIN: list[dict[str, Any]] = [
    TINY,
    TINY | {"pool": "cls", "registers": 3, "channels": 5},
    TINY | {"class_token": False},
    TINY | {"name": "deit3_small_patch16_224", "positions": "learned"},
    TINY | {"name": "vit_small_patch14_reg4_dinov2", "pool": "cls"},
    TINY | {"frames": 4, "tube": 2},
    TINY | {"channel_tokens": True, "channels": 3},
    {"name": "vit_small_patch16_dinov3", "image_size": 64, "depth": 2},
    {"name": "vit_small_patch16_rope_mixed_224", "image_size": 64, "depth": 2},
]


def make(seed: int = 0, **fields: Any) -> Encoder:
    config = EncoderConfig(**fields)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()
    for parameter in encoder.parameters():  # sharper attention than that of fresh weights
        parameter.data.add_(
            0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        )
    return encoder


def images(encoder: Encoder, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *encoder.preprocessing.shape, generator=torch.Generator().manual_seed(1))


def written_out(encoder: Encoder, x: torch.Tensor) -> list[torch.Tensor]:
    """softmax(q k / sqrt(d)) of each block, query by query, with the block's own input."""
    inputs: list[torch.Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0])) for block in encoder.blocks
    ]
    tokens, rope = encoder.begin(x)
    list(encoder._steps(tokens, rope))
    for hook in hooks:
        hook.remove()
    made = []
    for depth, (block, entered) in enumerate(zip(encoder.blocks, inputs, strict=True)):
        attn: Any = block.attn
        heads, bias = attn.num_heads, attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        three = torch.nn.functional.linear(entered, attn.qkv.weight, bias).unflatten(-1, (3, heads, -1))
        q, k = (attn.q_norm(three[:, :, 0]), attn.k_norm(three[:, :, 1]))
        q, k = (part.transpose(1, 2) for part in (q, k))
        if rope is not None:
            angle = rope[depth] if encoder.backbone.rope_mixed else rope
            first, half = encoder.prefix_tokens, attn.rotate_half
            q, k = (
                torch.cat([p[:, :, :first], apply_rot_embed_cat(p[:, :, first:], angle, half=half)], 2) for p in (q, k)
            )
        made.append(
            torch.stack([(k @ q[:, :, i, :, None])[..., 0] / q.shape[-1] ** 0.5 for i in range(q.shape[2])], 2).softmax(
                -1
            )
        )
    return made


@pytest.mark.parametrize("fields", PLAIN)
@torch.no_grad()
def test_maps_are_the_softmax_written_out(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    x = images(encoder)
    fused = [block.attn.fused_attn for block in encoder.blocks]  # type: ignore[union-attr]
    before = encoder.embed(x)
    maps = attention_maps(encoder.train(), x)
    assert encoder.training
    encoder.eval()
    tokens = encoder.prefix_tokens + encoder.patches
    assert [tuple(found.shape[2:]) for found in maps] == [(tokens, tokens)] * 2
    for ours, theirs in zip(maps, written_out(encoder, x), strict=True):
        assert torch.allclose(ours.sum(-1), torch.ones(()), atol=1e-5)
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(encoder.embed(x), before)
    assert [block.attn.fused_attn for block in encoder.blocks] == fused  # type: ignore[union-attr]
    assert not any(module._forward_hooks for module in encoder.modules())


def test_an_error_leaves_the_encoder_as_it_was() -> None:
    encoder = make(**TINY).train()
    for module in encoder.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    with pytest.raises(UsageError, match="images of shape"):
        attention_maps(encoder, torch.zeros(1, 3, 20, 20))
    with pytest.raises(ZeroDivisionError):
        attention_maps(encoder, images(encoder), lambda attention: attention / (1 // 0))
    assert encoder.training
    assert not any(module._forward_hooks for module in encoder.modules())
    assert all(block.attn.fused_attn for block in encoder.blocks)  # type: ignore[union-attr]


def test_other_backbones_are_refused() -> None:
    other = make(name="convnext_atto", image_size=32, pool="head")
    for function in (attention_maps, attention_distance):
        with pytest.raises(UsageError, match=r"convnext_atto: attention .*plain ViT"):
            function(other, torch.zeros(1, 3, 32, 32))


def test_distances_are_those_of_centres() -> None:
    found = patch_distances(2, 3, 4)
    for i in range(6):
        for j in range(6):
            assert found[i, j] == pytest.approx(4 * np.hypot(i // 3 - j // 3, i % 3 - j % 3))


@pytest.mark.parametrize("fields", [TINY, PLAIN[1], TINY | {"frames": 4, "tube": 2}])
@torch.no_grad()
def test_distance_is_a_loop_over_patches(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    x, first, patches = images(encoder), encoder.prefix_tokens, encoder.patches
    found = attention_distance(encoder, x)
    assert found.shape == (2, 2)
    for layer, maps in enumerate(attention_maps(encoder, x)):
        for head in range(2):
            means = []
            for attention in maps[:, head]:
                for i in range(patches):
                    row = attention[first + i, first:].numpy()
                    far = [4 * np.hypot(i % 16 // 4 - j % 16 // 4, i % 4 - j % 4) for j in range(patches)]
                    means.append((row / row.sum() * far).sum())
            assert found[layer, head].item() == pytest.approx(np.mean(means), rel=1e-5)


def test_distance_of_known_attention() -> None:
    distance = patch_distances(3, 3, 8)
    itself, even = torch.eye(9).expand(2, 1, 9, 9), torch.full((2, 1, 9, 9), 1 / 9)
    assert mean_distance(itself, distance).tolist() == [0]
    assert mean_distance(even, distance).item() == pytest.approx(distance.mean().item())
    both = torch.cat([itself, even], dim=1)
    prefixed = torch.zeros(2, 2, 11, 11)
    prefixed[:, :, 2:, 2:], prefixed[:, :, :, :2] = both * 0.1, 0.45  # most goes to two tokens in front
    assert mean_distance(prefixed, distance).tolist() == pytest.approx([0, distance.mean().item()])
