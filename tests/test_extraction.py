"""Scales and merged tokens: against loops, against the release of token merging written out, and against the plain path."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from selfsight.data.build import write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, pool_tokens, preprocessing_of
from selfsight.errors import UsageError
from selfsight.eval.extraction import embed, reading_size, resized, tiled
from selfsight.eval.features import Extraction, batch_of, extract, prepared
from selfsight.merging import embed_merged, merge_tokens, pool_merged
from selfsight.preprocessing import Preprocessing
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 5, "heads": 2}
MERGED: list[dict[str, Any]] = [
    TINY,
    TINY | {"class_token": False},
    TINY | {"pool": "cls+mean", "registers": 2},
    TINY | {"pool": "cls", "registers": 3},
    TINY | {"name": "deit3_small_patch16_224", "positions": "learned"},
    TINY | {"frames": 4, "tube": 2},
    TINY | {"channel_tokens": True, "channels": 3},
]


def make(seed: int = 0, **fields: Any) -> Encoder:
    config = EncoderConfig(**fields)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()
    for parameter in encoder.parameters():
        parameter.data.add_(
            0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        )
    return encoder


def images(encoder: Encoder, count: int = 3, scale: int = 1) -> torch.Tensor:
    *planes, height, width = encoder.preprocessing.shape
    drawn = torch.Generator().manual_seed(1)
    return torch.randn(count, *planes, scale * height, scale * width, generator=drawn)


# -- scales


def test_the_plain_scale_is_the_plain_path() -> None:
    encoder = make(**TINY)
    x = images(encoder)
    plain, found = encoder.embed_pools(x, encoder.pools), embed(encoder, x, encoder.pools, Extraction())
    assert list(plain) == list(found)
    assert all(torch.equal(plain[pool], found[pool]) for pool in plain)


@pytest.mark.parametrize("fields", [TINY, TINY | {"frames": 4, "tube": 2}, TINY | {"channel_tokens": True}])
@torch.no_grad()
def test_scales_are_a_loop_over_tiles(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    x = images(encoder, scale=3)
    for pool in ("mean", "cls", "cls+mean", "last4"):
        parts = []
        for scale in (3, 1, 2):
            flat = x.flatten(1, -3)
            whole = F.interpolate(flat, (16 * scale,) * 2, mode="bicubic", antialias=True) if scale < 3 else flat
            whole = whole.view(*x.shape[:-2], 16 * scale, 16 * scale)
            tiles = [whole[..., 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for r in range(scale) for c in range(scale)]
            parts.append(sum(encoder.embed(tile, pool) for tile in tiles) / scale**2)
        found = embed(encoder, x, (pool,), Extraction((3, 1, 2)))[pool]
        assert torch.allclose(found, torch.cat(parts, 1), atol=1e-5)  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_tiles_are_slices(scale: int, height: int, width: int) -> None:
    x = torch.arange(2.0 * 3 * scale**2 * height * width).view(2, 3, scale * height, scale * width)
    found = tiled(x, scale)
    for number in range(scale**2):
        top, left = number // scale * height, number % scale * width
        assert torch.equal(found[number], x[..., top : top + height, left : left + width])


def test_a_larger_image_is_read_and_not_a_small_one_enlarged(tmp_path: Any) -> None:
    """A chequerboard of single pixels is grey at the encoder's size, and itself at twice that."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    from PIL import Image

    write_shards(iter([(Image.fromarray(board), i % 2) for i in range(4)]), tmp_path, "s")
    encoder = make(**TINY | {"channels": 1})
    shards, extraction = Shards(str(tmp_path)), Extraction((1, 2))
    assert reading_size(encoder, extraction) == 32
    [large] = prepared(encoder.preprocessing, shards, CPU, size=32)
    assert large.amax() - large.amin() == pytest.approx(2, abs=0.01)
    assert resized(large, 16).std() < 0.02
    found = extract(encoder, shards, CPU, ("mean", "cls"), extraction=extraction)
    assert {pool: tuple(v.shape) for pool, v in found.vectors.items()} == {"mean": (4, 48), "cls": (4, 48)}
    expected = embed(encoder, large, ("mean",), extraction)["mean"]
    assert torch.allclose(found.vectors["mean"], expected, atol=1e-6)


def test_any_backbone_has_scales() -> None:
    other = make(name="convnext_atto", image_size=32, pool="head")
    x = images(other, scale=2)
    assert embed(other, x, ("head",), Extraction((1, 2)))["head"].shape == (3, 2 * other.feature_width)


@pytest.mark.parametrize(
    ("extraction", "message"),
    [
        (Extraction(()), "scales: none; give different whole numbers from 1 on"),
        (Extraction((1, 1)), "scales: 1, 1; give"),
        (Extraction((0, 1)), "scales: 0, 1; give"),
        (Extraction((-2,)), "scales: -2; give"),
        (Extraction((1.5,)), r"scales: 1\.5; give"),  # type: ignore[arg-type]
        (Extraction(merge=-1), "merge: -1 tokens a block; give 0"),
        (Extraction((1, 2)), r"images of 16 x 16; scales \(1, 2\) take 32"),
    ],
)
def test_bad_extractions_are_refused(extraction: Extraction, message: str) -> None:
    encoder = make(**TINY)
    with pytest.raises(UsageError, match=message):
        embed(encoder, images(encoder), ("mean",), extraction)


# -- merging


def released(metric: torch.Tensor, r: int, class_token: bool) -> Any:
    """Bipartite soft matching as the authors' code has it (facebookresearch/ToMe, tome/merge.py), one image at a time."""

    def merge(x: torch.Tensor) -> torch.Tensor:
        """The sum of what is merged."""
        made = []
        for one, keys in zip(x, metric, strict=True):
            tokens, count = len(one), min(r, (len(one) - class_token) // 2)
            if not count:
                return x
            keys = keys / keys.norm(dim=-1, keepdim=True)
            a, b = list(range(0, tokens, 2)), list(range(1, tokens, 2))
            best = {i: max(((keys[i] @ keys[j]).item(), -j) for j in b) for i in a}
            if class_token:
                best[0] = (-float("inf"), -b[0])
            order = sorted(a, key=lambda i: -best[i][0])
            led, stay = order[:count], order[count:]
            stay = sorted(stay) if class_token else stay
            rows = {j: one[j].clone() for j in b}
            for i in led:
                rows[-best[i][1]] += one[i]
            made.append(torch.stack([*(one[i] for i in stay), *rows.values()]))
        return torch.stack(made)

    return merge


def reference(encoder: Encoder, x: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ToMeBlock and ToMeAttention of the release (tome/patch/timm.py), on an encoder of at most a class token."""
    x, _ = encoder.begin(x)
    size = None
    for block in encoder.blocks:
        attn: Any = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2])
        scores = (q @ k.transpose(-2, -1)) * attn.scale
        if size is not None:
            scores = scores + size.log()[:, None, None, :, 0]
        x = x + block.ls1(attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        size = torch.ones_like(x[..., :1]) if size is None else size
        merge = released(k.mean(1), r, encoder.prefix_tokens == 1)
        x, size = merge(x * size), merge(size)
        x = x / size
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return encoder.backbone.norm(x), size[..., 0]


@pytest.mark.parametrize("fields", [TINY, TINY | {"class_token": False}, MERGED[4], MERGED[5]])
@pytest.mark.parametrize("merge", [1, 2, 100])
@torch.no_grad()
def test_merging_is_the_release(fields: dict[str, Any], merge: int) -> None:
    encoder = make(**fields)
    x = images(encoder)
    tokens, size = reference(encoder, x, merge)
    first = encoder.prefix_tokens
    patches, size = tokens[:, first:], size[:, first:, None]
    assert size.sum(1).flatten().tolist() == [encoder.patches] * 3
    found = embed_merged(encoder, x, ("mean", "gem", "cls")[: 2 + first], merge)
    assert torch.allclose(found["mean"], (patches * size).sum(1) / size.sum(1), atol=1e-5)
    gem = ((patches.clamp(min=1e-6) ** 3 * size).sum(1) / size.sum(1)) ** (1 / 3)
    assert torch.allclose(found["gem"], gem, atol=1e-4)
    if first:
        assert torch.allclose(found["cls"], tokens[:, 0], atol=1e-5)
    assert not torch.allclose(found["mean"], encoder.embed(x, "mean"), atol=1e-4)


@pytest.mark.parametrize("fields", MERGED)
@torch.no_grad()
def test_nothing_merged_is_the_plain_path(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    x = images(encoder)
    plain, found = encoder.embed_pools(x, encoder.pools), embed_merged(encoder, x, encoder.pools, 0)
    assert all(torch.equal(plain[pool], found[pool]) for pool in encoder.pools)
    merged = embed_merged(encoder, x, encoder.pools, 2)
    assert all(merged[pool].shape == plain[pool].shape for pool in encoder.pools)
    assert not any(module._forward_hooks for module in encoder.modules())


@torch.no_grad()
def test_equal_patches_merge_without_a_trace() -> None:
    """All patches the same, and no positions: whatever is merged, attention in proportion to sizes and means that count
    patches give what they gave."""
    encoder = make(**TINY | {"registers": 1})
    encoder.backbone.pos_embed.zero_()
    x = torch.randn(2, 3, 1, 1).expand(2, 3, 16, 16)
    plain = encoder.embed_pools(x, encoder.pools)
    for merge in (1, 3, 8):
        found = embed_merged(encoder, x, encoder.pools, merge)
        assert all(torch.allclose(found[pool], plain[pool], atol=1e-4) for pool in encoder.pools)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(0, 4), st.integers(1, 14), st.integers(0, 5))
def test_every_patch_stays_counted(merge: int, prefix: int, patches: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    x, keys = (torch.randn(2, prefix + patches, 5, generator=drawn) for _ in range(2))
    sizes = torch.ones(2, prefix + patches)
    merged, counted = merge_tokens(x, sizes, keys, merge, prefix)
    assert merged.shape[1] == prefix + patches - min(merge, patches // 2)
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    assert torch.equal(counted[:, :prefix], sizes[:, :prefix])
    assert torch.equal(counted.sum(1), sizes.sum(1))
    total = (merged * counted[..., None]).sum(1)
    assert torch.allclose(total, x.sum(1), atol=1e-4)


def test_the_most_similar_meet() -> None:
    """Patches 0, 2, 4 are led to 1, 3, 5; of the pairs (0, 5), (2, 3), (4, 1) the two most alike become one."""
    angles = torch.tensor([0.0, 2.0, 1.0, 1.1, 2.4, 0.01])
    keys = torch.stack([angles.cos(), angles.sin()], 1)[None]
    x = torch.eye(6)[None]
    merged, sizes = merge_tokens(x, torch.ones(1, 6), keys, 2, 0)
    assert sizes.tolist() == [[1, 1, 2, 2]]
    rows = [[0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0], [0.5, 0, 0, 0, 0, 0.5]]
    assert merged[0].tolist() == rows
    with_prefix = torch.cat([torch.full((1, 2, 6), 7.0), x], 1)
    merged, sizes = merge_tokens(with_prefix, torch.ones(1, 8), torch.cat([keys[:, :2], keys], 1), 2, 2)
    assert merged[0].tolist() == [[7.0] * 6] * 2 + rows[:1] + rows[1:]
    assert sizes.tolist() == [[1, 1, 1, 1, 2, 2]]


@torch.no_grad()
def test_pools_of_one_patch_each_are_the_plain_ones() -> None:
    encoder = make(**TINY)
    tokens = encoder(images(encoder))
    for pool in ("cls", "mean", "cls+mean", "gem"):
        found = pool_merged([(tokens, torch.ones(3, 16))], pool, True)
        assert torch.allclose(found, pool_tokens(tokens, pool), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "pool", "message"),
    [
        (
            {"name": "vit_small_patch16_dinov3", "image_size": 64, "depth": 2},
            "cls",
            "has rotary positions or other blocks",
        ),
        ({"name": "convnext_atto", "image_size": 32, "pool": "head"}, "head", "has no plain sequence of tokens"),
        (TINY | {"name": "vit_base_patch16_siglip_224", "pool": "head"}, "head", "the pool `head` is .* own"),
    ],
)
def test_what_cannot_be_merged_is_refused(fields: dict[str, Any], pool: str, message: str, tmp_path: Any) -> None:
    encoder = make(**fields)
    with pytest.raises(UsageError, match=f"merge: .*{message}"):
        embed(encoder, images(encoder), (pool,), Extraction(merge=2))
    assert embed(encoder, images(encoder), (pool,), Extraction())[pool].shape == (3, encoder.feature_width)
    write_shards(iter(pictures(4)), tmp_path, "s")
    with pytest.raises(UsageError, match=message):
        extract(encoder, Shards(str(tmp_path)), CPU, extraction=Extraction(merge=2))


def test_batches_are_bounded_by_bytes_as_well_as_by_count() -> None:
    made = Preprocessing(224, 3, (0.5,) * 3, (0.5,) * 3)
    assert batch_of(made, 224) == batch_of(made, 384) == 256
    assert batch_of(made, 8 * 224) == 2**29 // (4 * 3 * (8 * 224) ** 2) == 13
    assert batch_of(made._replace(frames=16), 8 * 224) == 1  # 588 MiB, and still one
    assert batch_of(made, 10**5) == 1


def test_features_do_not_depend_on_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, shards, ids = make(image_size=8, patch=2, width=16, depth=1, heads=2), Shards("digits:test"), np.arange(50)
    seen: list[int] = []
    whole = extract(encoder, shards, CPU, ids=ids, advance=seen.append)
    monkeypatch.setattr("selfsight.eval.features.BATCH_BYTES", 4 * 3 * 64 * 20)
    few = extract(encoder, shards, CPU, ids=ids, advance=seen.append)
    assert seen == [50, 20, 20, 10]
    assert torch.allclose(whole.vectors["mean"], few.vectors["mean"], atol=1e-5)
