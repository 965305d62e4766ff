"""The encoder against timm itself, dropping and masking against the full sequence, and weights from elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.layers.patch_embed import resample_patch_embed

from selfsight.encoder import Encoder, build_encoder, patchify, preprocessing_of, take, unpatchify
from selfsight.errors import UsageError
from selfsight.loading import load_encoder
from selfsight.positions import sincos
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.weights import load_weights

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}


def make(seed: int = 0, **fields: Any) -> Encoder:
    config = EncoderConfig(**fields)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()


def images(encoder: Encoder, count: int = 2) -> torch.Tensor:
    made = encoder.preprocessing
    return torch.randn(
        count, made.channels, made.image_size, made.image_size, generator=torch.Generator().manual_seed(1)
    )


# Every kind of plain transformer that timm calls vit_*, made small: norms before, layer scale, rotary positions, registers.
PLAIN: list[dict[str, Any]] = [
    TINY,
    TINY | {"pool": "cls", "registers": 3, "channels": 5},
    TINY | {"pool": "cls+mean"},
    TINY | {"class_token": False},
    TINY | {"name": "vit_base_patch16_clip_224"},
    TINY | {"name": "deit3_small_patch16_224", "positions": "learned"},
    TINY | {"name": "vit_small_patch14_reg4_dinov2", "pool": "cls"},
    TINY | {"name": "vit_base_patch16_siglip_224", "pool": "head"},
    {"name": "vit_small_patch16_dinov3", "image_size": 64, "depth": 2},
    {"name": "vit_small_patch16_rope_mixed_224", "image_size": 64, "depth": 2},
]
OTHERS = [
    {"name": "convnext_atto", "image_size": 64, "pool": "head"},
    {"name": "convnext_atto", "image_size": 64, "pool": "mean"},
    {"name": "vit_relpos_small_patch16_224", "pool": "head", "depth": 1},
    {"name": "swin_tiny_patch4_window7_224", "pool": "head"},
]


@pytest.mark.parametrize("fields", PLAIN + OTHERS)
@torch.inference_mode()
def test_features_are_timms(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    for parameter in encoder.parameters():  # zeros at the start would hide a forgotten part
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    x = images(encoder)
    tokens = encoder.backbone.forward_features(x)
    if encoder.plain:
        assert torch.allclose(torch.cat(encoder(x), 1), tokens, atol=2e-5)
    theirs = encoder.backbone(x)
    if encoder.pool == "cls+mean":
        theirs = torch.cat([tokens[:, 0], tokens[:, encoder.prefix_tokens :].mean(1)], 1)
    if fields != OTHERS[1]:  # timm's own ConvNeXt pool has a norm after it
        assert torch.allclose(encoder.embed(x), theirs, atol=2e-5)
    assert encoder.embed(x).shape == (2, encoder.width * (2 if encoder.pool == "cls+mean" else 1))


@pytest.mark.parametrize("fields", PLAIN)
@torch.inference_mode()
def test_keeping_all_patches_in_another_order_changes_nothing(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    x, patches = images(encoder), encoder.grid[0] * encoder.grid[1]
    keep = torch.stack([torch.randperm(patches, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.allclose(encoder(x, keep=keep).patches, take(encoder(x).patches, keep), atol=2e-5)
    assert torch.allclose(encoder(x, keep=keep).prefix, encoder(x).prefix, atol=2e-5)


@pytest.mark.parametrize("fields", PLAIN)
@torch.inference_mode()
def test_dropped_patches_do_not_matter_and_kept_ones_do(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    x, patches = images(encoder), encoder.grid[0] * encoder.grid[1]
    keep = torch.stack([torch.randperm(patches)[: patches // 2] for _ in range(2)])
    dropped = torch.ones(2, patches, dtype=torch.bool).scatter(1, keep, False)
    other = unpatchify(torch.where(dropped[..., None], 9.0, patchify(x, encoder.patch)), encoder.patch, encoder.grid)
    assert not torch.equal(x, other)
    assert torch.equal(encoder(x, keep=keep).patches, encoder(other, keep=keep).patches)
    changed = unpatchify(torch.where(dropped[..., None], patchify(x, encoder.patch), 9.0), encoder.patch, encoder.grid)
    assert not torch.allclose(encoder(x, keep=keep).patches, encoder(changed, keep=keep).patches, atol=1e-3)


@torch.inference_mode()
def test_dropping_is_timms_patch_dropout() -> None:
    """The same patches kept through timm's own PatchDropout, its choice of patches forced to ours."""
    encoder = make(**TINY, registers=2)
    x = images(encoder)
    keep = torch.tensor([[3, 0, 9], [15, 2, 7]])
    model = encoder.backbone
    tokens = model._pos_embed(model.patch_embed(x))
    kept = torch.cat([tokens[:, :3], take(tokens[:, 3:], keep)], 1)
    expected = model.norm(model.blocks(model.norm_pre(kept)))
    assert torch.allclose(torch.cat(encoder(x, keep=keep), 1), expected, atol=1e-5)


@torch.inference_mode()
def test_masked_patches_become_the_mask_token_before_positions() -> None:
    encoder = make(**TINY)
    x, token = images(encoder), torch.randn(24)
    mask = torch.rand(2, 16) < 0.5
    model = encoder.backbone
    embedded = model.patch_embed(x)
    for image in range(2):
        for patch in range(16):
            if mask[image, patch]:
                embedded[image, patch] = token
    expected = model.norm(model.blocks(model._pos_embed(embedded)))
    assert torch.allclose(torch.cat(encoder(x, mask=mask, mask_token=token), 1), expected, atol=1e-5)


def test_only_plain_transformers_drop_patches() -> None:
    encoder = make(name="convnext_atto", image_size=64, pool="head")
    with pytest.raises(UsageError, match="ConvNeXt cannot drop or mask patches"):
        encoder(images(encoder), keep=torch.zeros(2, 1, dtype=torch.long))


def test_fresh_weights_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = make(0, **TINY).state_dict(), make(0, **TINY).state_dict(), make(1, **TINY).state_dict()
    assert torch.equal(torch.rand(1), before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["backbone.blocks.0.attn.qkv.weight"], c["backbone.blocks.0.attn.qkv.weight"])


def test_stochastic_depth_is_given_its_draws() -> None:
    encoder = make(**TINY, drop_path=0.5).train()
    x = images(encoder, 3)
    assert len(encoder._drop_paths) == 2  # the first block is never dropped
    none, every = lambda _, n: torch.ones(3, n), lambda _, n: torch.zeros(3, n)
    mixed = lambda _, n: torch.tensor([[1.0] * n, [0.0] * n, [1.0] * n])  # noqa: E731
    kept, dropped, some = (encoder(x, draw=draw).patches for draw in (none, every, mixed))
    assert not torch.allclose(kept, dropped)
    assert torch.allclose(some[[0, 2]], kept[[0, 2]], atol=1e-6)
    assert torch.allclose(some[1], dropped[1], atol=1e-6)
    only_first = encoder.backbone
    y = only_first.norm(only_first.blocks[0](only_first._pos_embed(only_first.patch_embed(x))))
    assert torch.allclose(dropped, y[:, 1:], atol=1e-5)
    branch = encoder._drop_paths[0]
    branch.kept = torch.tensor([True, False])
    assert branch(torch.ones(2, 3)).tolist() == [[2.0] * 3, [0.0] * 3]  # the mean is kept: 1 / (1 - 0.5)
    assert torch.equal(encoder.eval()(x).patches, make(**TINY)(x).patches)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        encoder = make(**TINY, drop_path=0.5).train()
        encoder.checkpoint_blocks = len(encoder.blocks) * recompute
        encoder(
            images(encoder), draw=lambda _, n: torch.tensor([[1.0] * n, [0.0] * n])
        ).patches.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_recomputed_blocks_keep_the_draws_of_their_own_view() -> None:
    gradients = []
    for recompute in (False, True):
        encoder = make(**TINY, drop_path=0.5).train()
        encoder.checkpoint_blocks = len(encoder.blocks) * recompute
        views = [
            encoder(images(encoder), draw=lambda _, n, row=row: torch.tensor(row)[:, None].expand(2, n)).patches
            for row in ([1.0, 0.0], [0.0, 1.0])
        ]
        (views[0].square().sum() + 3 * views[1].square().sum()).backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("fields", PLAIN[:4])
@torch.inference_mode()
def test_other_sizes_have_resampled_positions(fields: dict[str, Any]) -> None:
    """timm's own model of the smaller size with timm's own resampling of the table."""
    encoder = make(**fields)
    small = make(**fields | {"image_size": 8})
    table, prefix = encoder.backbone.pos_embed, encoder.prefix_tokens
    state = encoder.backbone.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(table, [2, 2], [4, 4], num_prefix_tokens=prefix)
    small.backbone.load_state_dict(state)
    crops = images(small)
    found = encoder(crops, any_size=True)
    assert torch.allclose(torch.cat(found, 1), small.backbone.forward_features(crops), atol=1e-5)
    whole = images(encoder)
    assert torch.equal(encoder(whole, any_size=True).patches, encoder(whole).patches)


def test_other_sizes_are_refused_unless_asked_for_and_whole() -> None:
    encoder = make(**TINY)
    with pytest.raises(UsageError, match=r"the encoder takes \(3, 16, 16\)$"):
        encoder(torch.zeros(1, 3, 8, 8))
    with pytest.raises(UsageError, match="or other whole patches of 4 pixels"):
        encoder(torch.zeros(1, 3, 10, 8), any_size=True)
    rotary = make(name="vit_small_patch16_dinov3", image_size=64, depth=1)
    with pytest.raises(UsageError, match="has rotary positions"):
        rotary(torch.zeros(1, 3, 32, 32), any_size=True)


@torch.inference_mode()
def test_a_hierarchical_backbone_masks_after_its_stem() -> None:
    encoder = make(name="swin_tiny_patch4_window7_224", image_size=64, pool="head")
    assert (encoder.patch, encoder.grid, encoder.stride, encoder.stem_width) == (4, (16, 16), 32, 96)
    pictures = images(encoder, 1)
    nothing = torch.zeros(1, 256, dtype=torch.bool)
    token = torch.randn(96)
    assert torch.equal(encoder(pictures, mask=nothing, mask_token=token).patches, encoder(pictures).patches)
    mask = nothing.clone()
    mask[0, 16 * 2 + 5] = True  # the patch in row 2, column 5
    found = encoder(pictures, mask=mask, mask_token=token).patches
    spoilt = pictures.clone()
    spoilt[..., 8:12, 20:24] = 7.0
    assert torch.equal(encoder(spoilt, mask=mask, mask_token=token).patches, found)
    spoilt[..., 8:12, 24:28] = 7.0
    assert not torch.allclose(encoder(spoilt, mask=mask, mask_token=token).patches, found)


@pytest.mark.parametrize("fields", [*PLAIN[:3], *OTHERS[:2]])
def test_widths_are_those_of_the_features(fields: dict[str, Any]) -> None:
    encoder = make(**fields)
    assert encoder.embed(images(encoder)).shape == (2, encoder.feature_width)
    assert encoder(images(encoder)).patches.shape[1] == (encoder.preprocessing.image_size // encoder.stride) ** 2


def test_sincos_is_maes() -> None:
    """facebookresearch/mae's util/pos_embed.py, written out: w first, frequencies 1 / 10000^(i / (D / 4))."""
    table = sincos(16, (2, 3), prefix=1)
    assert torch.equal(table[0], torch.zeros(16))
    for row in range(2):
        for column in range(3):
            for i in range(4):
                frequency = 1 / 10000 ** (i / 4)
                expected = [torch.tensor(v) for v in (column * frequency, row * frequency)]
                got = table[1 + row * 3 + column]
                assert got[i] == pytest.approx(expected[0].sin().item(), abs=1e-6)
                assert got[4 + i] == pytest.approx(expected[0].cos().item(), abs=1e-6)
                assert got[8 + i] == pytest.approx(expected[1].sin().item(), abs=1e-6)
                assert got[12 + i] == pytest.approx(expected[1].cos().item(), abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos(18, (2, 2))


def test_patchify_is_the_stems_convolution_and_inverts() -> None:
    encoder = make(**TINY)
    x, stem = images(encoder), encoder.backbone.patch_embed.proj
    ours = patchify(x, 4) @ stem.weight.flatten(1).T + stem.bias
    assert torch.allclose(ours, stem(x).flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.equal(unpatchify(patchify(x, 4), 4, (4, 4)), x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "vit_tinny_patch16_224"},
            "timm has no model 'vit_tinny_patch16_224'; did you mean vit_tiny_patch16_224",
        ),
        ({"image_size": 30, "patch": 4}, "30 is not a multiple of the patch of 4"),
        ({"image_size": 200}, "200 is not a multiple of the patch of 16"),
        ({"width": 30, "heads": 4}, "30 is not a multiple of the 4 heads"),
        ({"width": 100}, "100 is not a multiple of the 3 heads"),
        ({"name": "convnext_atto", "heads": 4}, "encoder.heads: convnext_atto has no such option"),
        ({"name": "convnext_atto", "pool": "cls"}, "no class token"),
        ({**TINY, "class_token": False, "pool": "cls"}, "no class token"),
        ({**TINY, "width": 22}, "multiple of 4"),
    ],
)
def test_impossible_encoders_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**fields)


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"images of shape \(3, 20, 20\); the encoder takes \(3, 16, 16\)"):
        make(**TINY)(torch.zeros(1, 3, 20, 20))


# -- weights from elsewhere


def saved(encoder: Encoder, path: Path) -> str:
    save_file(encoder.backbone.state_dict(), path)
    return str(path)


def test_weights_load_whole(tmp_path: Path) -> None:
    source, target = make(1, **TINY), make(0, **TINY)
    lines = load_weights(target, saved(source, tmp_path / "w.safetensors"), "x")
    assert lines == [f"loaded all {len(source.backbone.state_dict())} tensors from {tmp_path / 'w.safetensors'}"]
    assert torch.equal(target.embed(images(target)), source.embed(images(source)))


def test_weights_are_adapted_to_size_patch_and_channels_and_say_so(tmp_path: Path) -> None:
    source = make(1, **TINY, positions="learned")
    path = saved(source, tmp_path / "w.safetensors")
    target = make(0, **(TINY | {"image_size": 48, "patch": 8, "channels": 1, "positions": "learned"}))
    lines = load_weights(target, path, "x")
    assert lines[1:] == [
        "patch_embed.proj.weight: 24x3x4x4 resampled to 24x1x8x8",
        "pos_embed: 1x17x24 resampled to 1x37x24",
    ]
    stem = source.backbone.patch_embed.proj.weight
    assert torch.allclose(
        target.backbone.patch_embed.proj.weight, resample_patch_embed(stem, [8, 8]).sum(1, keepdim=True), atol=1e-6
    )
    table = resample_abs_pos_embed(source.backbone.pos_embed, [6, 6], [4, 4], num_prefix_tokens=1)
    assert torch.equal(target.backbone.pos_embed, table)
    more = make(0, **(TINY | {"channels": 6, "positions": "learned"}))
    load_weights(more, path, "x")
    assert torch.allclose(more.backbone.patch_embed.proj.weight, stem.repeat(1, 2, 1, 1) / 2, atol=1e-6)


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = saved(make(1, **TINY), tmp_path / "w.safetensors")
    with pytest.raises(
        UsageError, match=r"of another architecture; tensors 12 missing: blocks.2.norm1.weight.*blocks.2.mlp.fc2.bias"
    ):
        load_weights(make(0, **(TINY | {"depth": 3})), path, "x")
    with pytest.raises(UsageError, match=r"12 unexpected: blocks.1"):
        load_weights(make(0, **(TINY | {"depth": 1})), path, "x")
    with pytest.raises(UsageError, match=r"of another shape: .*blocks.0.norm1.weight 24 for 48"):
        load_weights(make(0, **(TINY | {"width": 48})), path, "x")
    with pytest.raises(UsageError, match="1 missing: reg_token"):
        load_weights(make(0, **TINY, registers=1), path, "x")
    for source in ("nowhere.safetensors", "vit_no_such_model", str(tmp_path)):
        with pytest.raises(UsageError, match=r"neither a .safetensors file"):
            load_weights(make(0, **TINY), source, "x")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UsageError, match="not a safetensors file"):
        load_weights(make(0, **TINY), str(tmp_path / "bad.safetensors"), "x")


def test_a_classifier_is_left_out_and_named(tmp_path: Path) -> None:
    encoder = make(1, **TINY)
    tensors = encoder.backbone.state_dict() | {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert (
        load_weights(make(0, **TINY), str(tmp_path / "w.safetensors"), "x")[1]
        == "classifier left out: head.bias, head.weight"
    )


def test_norms_and_pools_of_other_models_find_their_place(tmp_path: Path) -> None:
    encoder = make(1, **TINY)
    tensors = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v
        for name, v in encoder.backbone.state_dict().items()
    }
    save_file(tensors | {"attn_pool.q.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    target = make(0, **TINY)
    lines = load_weights(target, str(tmp_path / "w.safetensors"), "x")
    assert lines[1:] == [
        "attention pool left out: attn_pool.q.weight",
        "fc_norm loaded as norm: the last norm stands before the pool, not after it",
    ]
    assert torch.equal(target.backbone.norm.weight, encoder.backbone.norm.weight)


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto",
        "resnet18",
        pytest.param("vgg11", marks=pytest.mark.slow),
        "densenet121",
        "hiera_tiny_224",
        "vit_small_patch16_18x2_224",
    ],
)
def test_every_kind_of_timm_model_takes_its_own_weights(name: str, tmp_path: Path) -> None:
    config = {"name": name, "pool": "head", "init": "timm", "positions": "learned"}
    source = make(1, **config)
    load_weights(make(0, **config), saved(source, tmp_path / "w.safetensors"), name)


def test_a_timm_model_by_name_through_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real loading code of timm and the hub, on a cache that holds what a download would have left there."""
    model = timm.create_model("vit_tiny_patch16_224")
    tag = model.pretrained_cfg["hf_hub_id"]
    snapshot = tmp_path / ("models--" + tag.replace("/", "--")) / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = load_encoder("vit_tiny_patch16_224")
    x = images(encoder, 1)
    with torch.inference_mode():
        assert torch.allclose(
            encoder.embed(x), model.eval().forward_head(model.forward_features(x), pre_logits=True), atol=1e-5
        )
    small = make(0, image_size=32, weights="timm", positions="learned")
    assert "pos_embed: 1x197x192 resampled to 1x5x192" in load_weights(small, "timm", "vit_tiny_patch16_224")
    assert load_file(snapshot / "model.safetensors").keys() == model.state_dict().keys()


def test_a_timm_model_that_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"vit_tiny_patch16_224: could not be fetched by timm \(.*") as told:
        load_encoder("vit_tiny_patch16_224")
    assert "\n" not in str(told.value)
    with pytest.raises(UsageError, match="nor a model that timm knows"):
        load_encoder("no_such_model")
    with pytest.raises(UsageError, match="no pretrained weights under this name"):
        load_encoder("vit_tiny_patch16_224.typo")


@pytest.mark.parametrize("fields", [PLAIN[1], PLAIN[7], OTHERS[0]])
@torch.inference_mode()
def test_tokens_and_features_come_from_one_pass(fields: dict[str, Any]) -> None:
    encoder, passes = make(**fields), []
    encoder.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    pools = ("head", "mean")
    tokens, features = encoder.encode(images(encoder), pools)
    assert len(passes) == 1
    assert torch.equal(tokens.patches, encoder(images(encoder)).patches)
    for pool in pools:
        assert torch.allclose(features[pool], encoder.embed(images(encoder), pool), atol=1e-6)
