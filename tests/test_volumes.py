"""Volumes against torch's own 3D convolution, slow loops, and the encoder of plain images that they come from.

Mutations that these tests caught when they were tried: patches with planes, tubes or channels in another order, planes of
the depth's table tiled, added place by place, left out, trained when fixed and fixed when learned, sines and cosines
exchanged, other frequencies, a lone plane with a depth, decayed or not slowed as the stem is, volumes of another shape or with
rotary positions let through, masks tiled the other way, other places hidden in other planes, tubes where single patches were
asked for, turned out of their planes, pixels counted of one plane, of the first planes or of the next, a stem that is
not divided by its planes, planes in place of channels, a table cut or stepped instead of stretched, clips not looked for.
"""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from test_tar import make_tar
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from selfsight.assemble import assemble
from selfsight.data.index import build_index
from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, build_encoder, patchify, preprocessing_of, take, unpatchify
from selfsight.errors import UsageError
from selfsight.loading import load_encoder
from selfsight.objectives import build_objective, parse_objective
from selfsight.objectives.base import Objective
from selfsight.objectives.mae import MAE
from selfsight.objectives.pixels import gradient_magnitude, ms_ssim
from selfsight.optim import build_optimizer
from selfsight.positions import sincos, sincos_line
from selfsight.recipe import DataConfig, EncoderConfig, OptimConfig, load
from selfsight.recipe_data import has_planes
from selfsight.train import pretrain
from selfsight.weights import load_weights

TINY: dict[str, Any] = {"image_size": 8, "patch": 4, "width": 24, "depth": 2, "heads": 2}
VOLUME: dict[str, Any] = TINY | {"channels": 2, "frames": 6, "tube": 2}  # 3 planes of 2 x 2 patches
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def make(seed: int = 0, **fields: Any) -> Encoder:
    config = EncoderConfig(**fields)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()


def inputs(encoder: Encoder, count: int = 2) -> Tensor:
    return torch.randn(count, *encoder.preprocessing.shape, generator=torch.Generator().manual_seed(1))


def objective(name: str, encoder: dict[str, Any] = VOLUME, **fields: Any) -> Any:
    built = make(**encoder)
    torch.manual_seed(0)
    return build_objective(parse_objective({"name": name, **fields}), built).train()


def batch_of(made: Objective, count: int = 3) -> Batch:
    """Random views in the shapes that the objective wants."""
    drawn, shape = torch.Generator().manual_seed(3), made.encoder.preprocessing.shape[:-2]
    sizes = [view.size or made.encoder.preprocessing.image_size for view in made.views]
    views = tuple(torch.randn(count, *shape, size, size, generator=drawn) for size in sizes)
    return Batch(views, torch.arange(100, 100 + count), seed=7)


# -- patches and positions


def test_tubes_are_a_3d_convolution() -> None:
    encoder = make(**VOLUME)
    volumes, stem = inputs(encoder), encoder.backbone.patch_embed.proj
    kernel = stem.weight.view(24, 2, 2, 4, 4)
    expected = F.conv3d(volumes, kernel, stem.bias, stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    assert torch.allclose(encoder._embed_patches(volumes, None), expected, atol=1e-5)


def test_patchify_of_volumes_is_a_loop_and_inverts() -> None:
    volumes = torch.arange(2 * 3 * 4 * 6 * 9, dtype=torch.float32).view(2, 3, 4, 6, 9)
    patches, number = patchify(volumes, 3, 2), 0
    assert patches.shape == (2, 2 * 2 * 3, 3 * 2 * 3 * 3)
    for plane in (0, 2):
        for row in (0, 3):
            for column in (0, 3, 6):
                cut = volumes[:, :, plane : plane + 2, row : row + 3, column : column + 3]
                assert torch.equal(patches[:, number], cut.flatten(1))
                number += 1
    assert torch.equal(unpatchify(patches, 3, (2, 2, 3), 2), volumes)


def test_positions_are_the_planes_and_the_depths() -> None:
    table = sincos(16, (3, 2, 2), prefix=1)
    line, plane = sincos_line(16, 3), sincos(16, (2, 2))
    assert torch.equal(table[0], torch.zeros(16))
    for depth in range(3):
        for i in range(8):
            angle = torch.tensor(depth / 10000 ** (i / 8), dtype=torch.float64)
            assert line[depth, i].item() == pytest.approx(angle.sin().item(), abs=1e-6)
            assert line[depth, 8 + i].item() == pytest.approx(angle.cos().item(), abs=1e-6)
        for place in range(4):
            assert torch.equal(table[1 + 4 * depth + place], line[depth] + plane[place])
    assert torch.equal(sincos(16, (1, 2, 2)), plane)


@pytest.mark.parametrize(
    "fields",
    [{}, {"positions": "learned", "registers": 2}, {"name": "vit_base_patch16_clip_224"}],
)
@torch.inference_mode()
def test_tokens_are_those_of_a_loop_over_planes(fields: dict[str, Any]) -> None:
    encoder = make(**VOLUME | fields)
    assert (encoder.grid, encoder.plane_grid, encoder.patches, encoder.patch_values) == ((3, 2, 2), (2, 2), 12, 64)
    volumes, model = inputs(encoder), encoder.backbone
    table, prefix = model.pos_embed, 0 if model.no_embed_class else encoder.prefix_tokens
    assert encoder.depth_embed is not None
    tokens = []
    for step in range(3):
        tube = volumes[:, :, 2 * step : 2 * step + 2].flatten(1, 2)
        tokens.append(model.patch_embed(tube) + table[:, prefix:] + encoder.depth_embed[:, step])
    first = torch.cat([token for token in (model.cls_token, model.reg_token) if token is not None], 1)
    x = torch.cat([(first + table[:, :prefix] if prefix else first).expand(2, -1, -1), *tokens], 1)
    x = model.norm_pre(x)
    for block in model.blocks:
        x = block(x)
    assert torch.allclose(torch.cat(encoder(volumes), 1), model.norm(x), atol=1e-5)
    assert encoder.embed(volumes).shape == (2, 24)


@torch.inference_mode()
def test_dropped_and_masked_patches_of_volumes() -> None:
    encoder = make(**VOLUME)
    volumes, token = inputs(encoder), torch.randn(24)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert torch.allclose(encoder(volumes, keep=order).patches, take(encoder(volumes).patches, order), atol=1e-5)
    few, hidden = order[:, :5], order[:, 5:]
    spoilt = encoder.unpatchify(encoder.patchify(volumes).scatter(1, hidden[..., None].expand(-1, -1, 64), 9.0))
    assert torch.equal(encoder(volumes, keep=few).patches, encoder(spoilt, keep=few).patches)
    mask = torch.zeros(2, 12, dtype=torch.bool).scatter(1, hidden, True)
    found = encoder(volumes, mask=mask, mask_token=token)
    assert torch.equal(found.patches, encoder(spoilt, mask=mask, mask_token=token).patches)
    assert not torch.allclose(found.patches, encoder(volumes, mask=mask, mask_token=0 * token).patches)


@torch.inference_mode()
def test_one_tube_is_a_plain_image_of_its_planes() -> None:
    tube, plain = make(**TINY, channels=2, frames=3, tube=3), make(**TINY, channels=6)
    assert (tube.grid, tube.plane_embed) == ((1, 2, 2), None)
    volumes = inputs(tube)
    assert torch.equal(tube.embed(volumes), plain.embed(volumes.flatten(1, 2)))


@torch.inference_mode()
def test_planes_of_another_size_have_resampled_positions() -> None:
    encoder, small = make(**VOLUME), make(**VOLUME | {"image_size": 4})
    state = encoder.state_dict()
    state["backbone.pos_embed"] = resample_abs_pos_embed(state["backbone.pos_embed"], [1, 1], [2, 2])
    small.load_state_dict(state)
    crops = inputs(small)
    assert torch.allclose(encoder(crops, any_size=True).patches, small(crops).patches, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (TINY | {"frames": 5, "tube": 2}, "frames 5 is not a multiple of tube 2"),
        (TINY | {"tube": 2}, "frames 1 is not a multiple of tube 2"),
        ({"name": "convnext_atto", "pool": "head", "frames": 2}, "encoder.frames: convnext_atto takes plain images only"),
        ({"name": "vit_small_patch16_dinov3", "depth": 1, "frames": 2}, "encoder.frames: vit_small_patch16_dinov3 takes"),
    ],
)  # fmt: skip
def test_impossible_volumes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError if "multiple" in message else UsageError, match=message):
        make(**fields)


@pytest.mark.parametrize("shape", [(1, 2, 4, 8, 8), (1, 2, 8, 8), (1, 3, 6, 8, 8), (1, 2, 6, 8, 4)])
def test_volumes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for any_size in (False, True)[: 1 + (shape[1:3] != (2, 6))]:
        with pytest.raises(UsageError, match=r"images of shape \(.*; the encoder takes \(2, 6, 8, 8\)"):
            make(**VOLUME)(torch.zeros(shape), any_size=any_size)
    with pytest.raises(UsageError, match=r"images of shape \(3, 2, 8, 8\); the encoder takes \(3, 8, 8\)"):
        make(**TINY)(torch.zeros(1, 3, 2, 8, 8))


def test_the_depths_table_is_trained_like_the_stem_if_it_is_learned() -> None:
    fixed, learned = make(**VOLUME), make(**VOLUME, positions="learned")
    assert fixed.depth_embed is not None
    assert learned.depth_embed is not None
    assert torch.equal(fixed.depth_embed[0], sincos_line(24, 3))
    assert (fixed.depth_embed.requires_grad, learned.depth_embed.requires_grad) == (False, True)
    assert 0.01 < learned.depth_embed.std() < 0.03
    made = objective("mae", VOLUME | {"positions": "learned"}, **DECODER)
    optimizer = build_optimizer(made, made.encoder, OptimConfig(layer_decay=0.5, weight_decay=0.3))
    group = next(g for g in optimizer.param_groups if any(p is made.encoder.depth_embed for p in g["params"]))
    assert (group["weight_decay"], group["scale"]) == (0.0, 0.5**3)


# -- objectives


@pytest.mark.parametrize("masking", ["random", "tube"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_of_volumes_is_a_loop_over_hidden_tubes(masking: str, normalize: bool) -> None:
    made = objective("mae", **DECODER, masking=masking, normalize_patches=normalize, mask_ratio=0.5, predict_ratio=0.5)
    batch = batch_of(made)
    keep, hidden = made.mask(batch)
    assert (keep.shape, hidden.shape) == ((3, 6), (3, 3))
    predicted = made.decode(made.encoder(batch.views[0], keep=keep), keep, hidden)
    errors = []
    for image in range(3):
        for place, patch in enumerate(hidden[image].tolist()):
            plane, row, column = patch // 4 * 2, patch % 4 // 2 * 4, patch % 2 * 4
            cut = batch.views[0][image, :, plane : plane + 2, row : row + 4, column : column + 4].flatten().double()
            if normalize:
                cut = (cut - cut.mean()) / (cut.var() + 1e-6).sqrt()
            errors.append((predicted[image, place].double() - cut).square().mean())
    assert made(batch).total.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_tubes_hide_the_same_places_of_every_plane() -> None:
    made = objective("mae", **DECODER, masking="tube", mask_ratio=0.25)
    keep, hidden = made.mask(batch_of(made, 50))
    assert (keep.shape, hidden.shape) == ((50, 9), (50, 3))
    for index, each in ((keep, 3), (hidden, 1)):
        planes = index.view(50, 3, each)
        assert torch.equal(planes // 4, torch.arange(3)[None, :, None].expand(50, 3, each))
        assert torch.equal(planes % 4, planes[:, :1].expand(50, 3, each) % 4)
    assert torch.equal(torch.cat([keep, hidden], 1).sort(1).values, torch.arange(12).expand(50, 12))
    assert len({tuple(row) for row in hidden.tolist()}) == 4  # each image its own
    drawn = objective("mae", **DECODER, mask_ratio=0.25).mask(batch_of(made, 50))[1]
    assert len({tuple(row) for row in (drawn % 4).sort(1).values.tolist()}) > 4


def test_volumes_of_one_tube_are_learned_as_plain_images() -> None:
    losses = []
    for encoder in (TINY | {"channels": 2, "frames": 3, "tube": 3}, TINY | {"channels": 6}):
        made = objective("mae", encoder, **DECODER)
        batch = batch_of(made)
        flat = Batch(
            (torch.randn(3, 6, 8, 8, generator=torch.Generator().manual_seed(5)).view_as(batch.views[0]),),
            batch.positions,
            7,
        )
        loss = made(flat)
        loss.total.backward()
        losses.append((loss.total, made.encoder.backbone.patch_embed.proj.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_the_decoder_knows_planes_apart() -> None:
    made = objective("mae", **DECODER)
    assert isinstance(made, MAE)
    assert torch.equal(made.positions, sincos(16, (3, 2, 2), 1))


ALL: dict[str, dict[str, Any]] = {
    "mae": DECODER | {"loss": "ms-ssim", "edges": 0.5, "masking": "tube"},
    "simmim": {"mask_size": 4},
    "data2vec": {"mask_size": 4},
    "rotation": {},
    "vicreg": {"expander_width": 12, "order": 0.5},
    "dino": {"outputs": 16, "head_width": 16, "bottleneck": 8, "local_views": 2, "ibot": 1.0, "local_view": {"size": 4}},
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_objective_learns_from_volumes(name: str) -> None:
    fields = {"pool": "cls"} if name == "dino" else {}
    made = objective(name, VOLUME | {"positions": "learned"} | fields, **ALL[name])
    batch = batch_of(made, 6)
    loss = made(batch)
    loss.total.backward()
    assert loss.total.isfinite()
    lacking = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert made.encoder.depth_embed.grad.abs().sum() > 0
    shapes = {picture.shape[1:3] for picture in made.eval().pictures(batch).values()}
    assert shapes == {(2, 6)}


def test_masked_squares_are_masked_in_every_plane() -> None:
    made = objective("simmim", mask_size=4, mask_ratio=0.5)
    batch, seen = batch_of(made), {}
    made.encoder.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    loss, cells, volumes = made(batch), made.cells(batch), batch.views[0]
    assert torch.equal(seen["mask"], cells.flatten(1).repeat(1, 3))
    rebuilt, errors, floors = made.rebuild(batch, cells).double(), [], []
    for image in range(3):
        where = torch.zeros(8, 8, dtype=torch.bool)
        for row, column in cells[image].nonzero().tolist():
            where[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
        hidden = volumes[image].double()[..., where]
        errors.append((rebuilt[image][..., where] - hidden).abs().mean())
        floors.append((hidden - hidden.mean()).abs().mean())
    assert loss.total.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert loss.terms["floor"].item() == pytest.approx(torch.stack(floors).mean().item(), rel=1e-5)


def test_volumes_are_turned_in_their_planes() -> None:
    made = objective("rotation", turns="all")
    batch = batch_of(made, 2)
    turned, labels = made.turn(batch)
    for image, quarters in enumerate(labels.tolist()):
        for plane in range(6):
            source = batch.views[0][image % 2, :, plane]
            assert torch.equal(turned[image, :, plane], source.rot90(quarters, (1, 2)))


def test_pixels_of_volumes_are_compared_plane_by_plane() -> None:
    made = preprocessing_of(DataConfig(train="x"), EncoderConfig(**VOLUME | {"image_size": 16}))
    a, b = torch.rand(2, 2, 2, 6, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    planes = [ms_ssim(a[:, :, plane], b[:, :, plane], made._replace(frames=1)) for plane in range(6)]
    assert ms_ssim(a, b, made).item() == pytest.approx(torch.stack(planes).mean().item(), abs=1e-6)
    edges = torch.stack([gradient_magnitude(a[:, :, plane]) for plane in range(6)], 2)
    assert torch.equal(gradient_magnitude(a), edges)


# -- weights of plain images


def saved(encoder: Encoder, path: Path) -> str:
    save_file(encoder.backbone.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("tube", [1, 2, 4])
@torch.inference_mode()
def test_a_tube_of_equal_planes_looks_as_its_plane_did(tube: int, tmp_path: Path) -> None:
    plain, volume = make(1, **TINY), make(**TINY, frames=4, tube=tube)
    lines = load_weights(volume, saved(plain, tmp_path / "w.safetensors"), "x")
    told = (
        f"patch_embed.proj.weight: 24x3x4x4 resampled to 24x{3 * tube}x4x4, for patches of {tube} planes in place of 1"
    )
    assert lines[1:] == ([told] if tube > 1 else []) + (
        [f"depth_embed 1x{4 // tube}x24: fresh, the weights have none"] if tube < 4 else []
    )
    images = inputs(plain)
    still = images[:, :, None].expand(-1, -1, 4, -1, -1)
    expected = plain._embed_patches(images, None).repeat(1, 4 // tube, 1)
    assert torch.allclose(volume._embed_patches(still, None), expected, atol=1e-6)


@pytest.mark.parametrize(("channels", "tube"), [(1, 1), (1, 3), (2, 1), (4, 2), (13, 1)])
@torch.inference_mode()
def test_rgb_weights_fit_any_channels(channels: int, tube: int, tmp_path: Path) -> None:
    """Grey images look as they did in RGB, and three planes of one channel are not taken for three channels."""
    plain, other = make(1, **TINY), make(**TINY, channels=channels, frames=tube, tube=tube)
    load_weights(other, saved(plain, tmp_path / "w.safetensors"), "x")
    grey = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    shape = (2, channels, tube, 8, 8) if tube > 1 else (2, channels, 8, 8)
    ours = other._embed_patches((grey[:, :, None] if tube > 1 else grey).expand(shape), None)
    theirs = plain._embed_patches(grey.expand(2, 3, 8, 8), None)
    stem = plain.backbone.patch_embed.proj
    repeated = torch.stack([stem.weight[:, c % 3] for c in range(channels)], 1).sum(1) * 3 / channels
    expected = (
        theirs if channels == 1 else F.conv2d(grey, repeated[:, None], stem.bias, stride=4).flatten(2).transpose(1, 2)
    )
    assert torch.allclose(ours, expected, atol=1e-5)


@torch.inference_mode()
def test_tables_of_another_depth_are_stretched(tmp_path: Path) -> None:
    source, path = make(1, **VOLUME, positions="learned"), tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    same = make(**VOLUME, positions="learned")
    assert len(load_weights(same, str(path), "x")) == 1
    assert torch.equal(same.embed(inputs(same)), source.embed(inputs(source)))
    longer = make(**VOLUME | {"frames": 12, "positions": "learned"})
    assert load_weights(longer, str(path), "x")[1:] == ["depth_embed: 1x3x24 resampled to 1x6x24"]
    assert source.depth_embed is not None
    assert longer.depth_embed is not None
    for step, (left, right, share) in enumerate(
        [(0, 0, 0), (0, 1, 0.25), (0, 1, 0.75), (1, 2, 0.25), (1, 2, 0.75), (2, 2, 0)]
    ):
        expected = (1 - share) * source.depth_embed[0, left] + share * source.depth_embed[0, right]
        assert torch.allclose(longer.depth_embed[0, step], expected, atol=1e-6)
    plane = make(**TINY, channels=4)
    assert load_weights(plane, str(path), "x")[1:] == ["depth_embed left out: the encoder has none"]
    assert load_file(path).keys() == source.state_dict().keys()


# -- from shards to features


def npy(array: NDArray[Any]) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_a_run_over_volumes_is_loaded_as_it_was_trained(tmp_path: Path, unchecked_export: None) -> None:
    drawn = np.random.default_rng(0)
    files = [(f"{i:02d}.npy", npy(drawn.normal(size=(1, 7, 9, 10)).astype(np.float32))) for i in range(12)]
    (tmp_path / "x.tar").write_bytes(make_tar(files))
    build_index(tmp_path / "x.tar")
    fields = {
        "run_dir": str(tmp_path / "run"), "data.train": str(tmp_path), "data.depth": 32, "data.range": "[-4, 4]", "data.mean": [0.5], "data.std": [0.1],
        "data.frame_step": 2, "eval.train": None, "eval.test": None, "encoder.frames": 4, "encoder.tube": 2,
        "encoder.width": 24, "encoder.depth": 1, "objective.masking": "tube", "train.epochs": None, "train.steps": 4,
        "train.batch_size": 4, "train.workers": 0,
    }  # fmt: skip
    pretrain("digits/mae", fields)
    exported, saved_last = (load_encoder(tmp_path / "run" / name) for name in ("encoder", "checkpoints/step-00000004"))
    assert exported.preprocessing == saved_last.preprocessing
    assert exported.preprocessing.shape == (1, 4, 8, 8)
    volumes = inputs(exported)
    assert torch.equal(exported.embed(volumes), saved_last.embed(volumes))
    assert not torch.equal(exported.embed(volumes), make(0, **exported.config.model_dump()).embed(volumes))
    assert "what the encoder sees" in (tmp_path / "run" / "report.html").read_text()


def test_order_is_verified_of_clips_alone(tmp_path: Path, small_fields: dict[str, Any]) -> None:
    frame = BytesIO()
    Image.new("L", (8, 8)).save(frame, "PNG")
    fields = {name: value for name, value in small_fields.items() if "decoder" not in name} | {"objective.order": 1.0}
    with pytest.raises(UsageError, match=r"objective.order: its triples are moments of clips"):
        assemble(load("digits/vicreg", fields), torch.device("cpu"))
    clips = [(f"{i:02d}.{j}.png", frame.getvalue()) for i in range(8) for j in range(3)]
    rotten = [(f"{i:02d}.png", frame.getvalue() if i else b"no image") for i in range(8)]
    for files, told in ((clips, True), (rotten, None)):
        folder = tmp_path / f"clips-{told}"
        folder.mkdir()
        (folder / "x.tar").write_bytes(make_tar(files))
        build_index(folder / "x.tar")
        parts = assemble(load("digits/vicreg", fields | {"data.train": str(folder)}), torch.device("cpu"))
        made = parts.encoder.preprocessing
        assert has_planes(parts.shards, made) is told
        assert has_planes(parts.shards, made._replace(frames=3)) is (told and False)
