"""The faster forms of timm's blocks against timm's own, in values and gradients, fp32 and bf16.

Mutations that these tests caught when they were tried: no scale in the scores, in the queries' gradient or in the keys';
maps not transposed for the values' gradient; heads put back in another order; the fast form for normalised queries, masks,
or while keys are watched; products in fp32; the fused kernel in bf16; the last block's queries or residual of other tokens.
"""

import copy
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight import blocks
from selfsight.attention import attention_maps
from selfsight.blocks import LastBlock, QuickAttention, attend, quicken
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.recipe import DataConfig, EncoderConfig


def slow(heads: int, *packed: Tensor) -> Tensor:
    """Attention head by head, in the formula of Vaswani et al. 2017 (equation 1)."""
    q, k, v = torch.cat(packed, -1).chunk(3, -1) if len(packed) == 1 else (packed[0], *packed[1].chunk(2, -1))
    seen = []
    for query, key, value in zip(*(part.chunk(heads, -1) for part in (q, k, v)), strict=True):
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        seen.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ value)
    return torch.cat(seen, -1)


def shapes(cross: bool) -> list[tuple[int, ...]]:
    return [(2, 5, 24), (2, 7, 48)] if cross else [(2, 6, 72)]


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("form", "dtype", "close"), [("fused", torch.float32, 1e-6), ("products", torch.float32, 1e-6), ("products", torch.bfloat16, 2e-2)])  # fmt: skip
def test_attention_is_the_formula(
    cross: bool, form: str, dtype: torch.dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "by_products", lambda x: form == "products")
    generator = torch.Generator().manual_seed(2)
    packed = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes(cross)]
    exact = [part.detach().double().requires_grad_() for part in packed]
    ours, expected = attend(3, *packed), slow(3, *exact)
    weights = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((ours * weights.to(dtype)).sum(), packed)
    others = torch.autograd.grad((expected * weights).sum(), exact)
    assert ours.dtype == dtype
    for one, other in zip([ours, *gradients], [expected, *others], strict=True):
        assert torch.allclose(one.double(), other, rtol=close, atol=close * other.abs().max().item())


def attention(**options: Any) -> tuple[Attention, Attention]:
    torch.manual_seed(0)
    ours = Attention(24, 3, qkv_bias=True, **options)
    theirs = copy.deepcopy(ours)
    quicken(nn.ModuleList([ours]))
    assert type(ours) is QuickAttention
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


def test_in_fp32_it_is_timms_bit_by_bit() -> None:
    ours, theirs = attention()
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    results = []
    for module in (ours, theirs):
        out = module(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*module.parameters()])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_on_a_cpu_in_bf16_the_fused_kernel_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = attention()
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        expected = theirs(x)
        monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
        assert torch.allclose(ours(x), expected, atol=1e-2)
        with torch.no_grad():
            assert torch.allclose(ours(x), expected, atol=1e-2)
        with pytest.raises(AttributeError):
            theirs(x)
    with pytest.raises(AttributeError):
        ours(x)  # fp32 has it


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_norm": True}, {"gated": True}])
def test_other_attentions_stay_timms(options: dict[str, bool]) -> None:
    ours, theirs = attention(norm_layer=nn.LayerNorm, **options)
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    for given in ({}, {"attn_mask": mask}, {"is_causal": True}):
        assert torch.equal(ours(x, **given), theirs(x, **given))
    ours, theirs = attention()
    for given in ({"attn_mask": mask}, {"is_causal": True}):
        assert torch.equal(ours(x, **given), theirs(x, **given))


def test_who_watches_keys_or_maps_sees_them() -> None:
    config = EncoderConfig(image_size=16, patch=4, width=24, depth=2, heads=3)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    keys: list[Tensor] = []
    attn: Any = encoder.blocks[1].attn
    assert type(attn) is QuickAttention
    with torch.autocast("cpu", torch.bfloat16):
        plain = encoder.embed(images)
        hook = attn.k_norm.register_forward_hook(lambda module, given, out: keys.append(out))
        watched = encoder.embed(images)
        hook.remove()
        maps = attention_maps(encoder, images)
    assert [key.shape for key in keys] == [(2, 3, 17, 8)]
    assert torch.allclose(plain, watched, atol=2e-2)
    assert len(maps) == 2
    assert torch.allclose(maps[0].float().sum(-1), torch.ones(2, 3, 17), atol=2e-2)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_the_last_tokens_of_a_block_are_those_of_the_whole_block(count: int) -> None:
    torch.manual_seed(0)
    block = Block(24, 3, qkv_bias=True)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    last = LastBlock(24, 3, qkv_bias=True)
    last.load_state_dict(block.state_dict())
    x = torch.randn(2, 6, 24, requires_grad=True)
    results = []
    for made, out in ((block, block(x)[:, -count:]), (last, last(x, count))):
        results.append([out, *torch.autograd.grad(out.pow(3).sum(), [x, *made.parameters()])])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6 * one.abs().max().item())


def test_long_sequences_keep_no_maps() -> None:
    """Whose memory grows with the square of the tokens."""
    x = torch.zeros(1, blocks.MOST_KEYS, 3, dtype=torch.bfloat16)
    assert blocks.by_products(x) and not blocks.by_products(torch.cat([x, x[:, :1]], dim=1))


def test_who_watches_attention_or_mlp_is_called() -> None:
    config = EncoderConfig(image_size=16, patch=8, width=16, depth=2, heads=2)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    seen: list[str] = []
    for name in ("attn", "mlp"):
        getattr(encoder.blocks[1], name).register_forward_hook(lambda module, given, out, name=name: seen.append(name))
    encoder.embed(torch.zeros(1, 3, 16, 16))
    assert seen == ["attn", "mlp"]
