"""MAE against transformers' ViTMAE with the same weights and mask, and against slow loops for masks and targets.

Mutations that these tests caught when they were tried: keep and hidden swapped, the decoder's positions of visible
tokens taken in grid order, the loss over all patches, the target's variance biased (unbiased=False), the mask token
without positions, the decoder's class token without its own, the counts of visible and of rebuilt patches cut off
instead of rounded or taken of all patches, none rebuilt for a small predict_ratio, visible patches rebuilt, l1 and l2
swapped, a sum instead of a mean, MS-SSIM with the wrong sign or without gradient, the weight of the edges dropped or
negated, edges not normalised, detached, absolute, swapped with the pixels, left out of the floor, the floor's colour
taken over the batch, a patch or as 0, a patch's mean or variance not given back, predictions put in sorted places or
on black, stochastic depth from torch's generator, terms or pictures with a gradient.
"""

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from reference.transformers_vit import block_as_ours
from scipy import ndimage
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from selfsight.data.placer import Batch
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.objectives.configs import MAEConfig
from selfsight.objectives.mae import MAE
from selfsight.objectives.masks import random_masking
from selfsight.objectives.pixels import ms_ssim
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}


def make(encoder: dict[str, Any] | None = None, **fields: Any) -> MAE:
    config = EncoderConfig(**(ENCODER | (encoder or {})))
    torch.manual_seed(0)
    built = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    options = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2} | fields
    objective = build_objective(MAEConfig(**options), built)
    assert isinstance(objective, MAE)
    return objective


def make_batch(count: int = 3, channels: int = 3, size: int = 16) -> Batch:
    images = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(3))
    return Batch((images,), torch.arange(100, 100 + count), seed=7)


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_and_gradients_are_transformers(normalize: bool) -> None:
    ours, batch = make(normalize_patches=normalize), make_batch()
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=16, patch_size=4,
            decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_intermediate_size=64,
            mask_ratio=0.75, norm_pix_loss=normalize, hidden_act="gelu", layer_norm_eps=1e-6, attn_implementation="eager",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.02,
        )
    )  # fmt: skip
    with torch.no_grad():  # initial biases and tokens of zero would hide mistakes
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    weights = as_ours(dict(theirs.named_parameters()))
    named = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert weights.keys() == named.keys()
    # Positions are not copied: ours must be the ones that transformers makes, which are facebookresearch/mae's.
    for part in (*theirs.modules(), *theirs.parameters()):
        part._is_hf_initialized = False  # type: ignore[union-attr,assignment]
    theirs.vit.embeddings.initialize_weights()
    theirs.decoder.initialize_weights(16)
    ours.load_state_dict(as_ours(dict(theirs.named_parameters())), strict=False)
    assert torch.allclose(ours.encoder.backbone.pos_embed, theirs.vit.embeddings.position_embeddings, atol=1e-6)
    assert torch.allclose(ours.positions, theirs.decoder.decoder_pos_embed[0], atol=1e-6)
    expected = theirs(batch.views[0], noise=batch.uniform("mask", 16))
    keep, hidden = random_masking(batch.uniform("mask", 16), ours.visible)
    assert torch.equal(expected.mask.bool(), torch.ones(3, 16, dtype=torch.bool).scatter(1, keep, False))
    assert torch.equal(expected.ids_restore.argsort(1), torch.cat([keep, hidden], 1))
    loss = ours(batch).total
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = as_ours({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in named.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name


def test_every_trained_parameter_gets_a_gradient() -> None:
    objective = make({"registers": 2})
    objective(make_batch()).total.backward()
    lacking = [
        name for name, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert lacking == []


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("loss", "part"), [("l2", 1.0), ("l1", 1.0), ("l2", 0.5), ("l1", 0.3)])
def test_the_loss_is_a_slow_loop(normalize: bool, loss: str, part: float) -> None:
    objective, batch = make(normalize_patches=normalize, loss=loss, predict_ratio=part), make_batch(2)
    batch.views[0][1] += 2  # each image has its own mean
    images = batch.views[0]
    keep, hidden = objective.mask(batch)
    with torch.no_grad():
        predicted = objective.decode(objective.encoder(images, keep=keep), keep, hidden)
        result = objective(batch)

    def distance(difference: Any) -> Any:
        return abs(difference) if loss == "l1" else difference**2

    errors, floors = [], []
    for image in range(2):
        own = []
        for place, patch in enumerate(hidden[image].tolist()):
            pixels = pixels_of(images[image].double(), patch)
            if normalize:
                pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            errors.append(distance(predicted[image, place].double().numpy() - pixels))
            own.append(pixels)
        floors.append(np.mean(distance(np.array(own) - np.mean(own))))
    assert result.total.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert result.terms["floor"].item() == pytest.approx(np.mean(floors), rel=1e-4)
    assert not result.terms["floor"].requires_grad


@pytest.mark.parametrize(("part", "rebuilt"), [(1.0, 12), (0.5, 6), (0.3, 4), (0.01, 1)])
def test_the_decoder_rebuilds_a_part_of_the_hidden_patches(part: float, rebuilt: int) -> None:
    objective, batch = make(predict_ratio=part), make_batch()
    keep, all_hidden = random_masking(batch.uniform("mask", 16), 4)
    seen: list[torch.Tensor] = []
    objective.predict.register_forward_hook(lambda module, inputs, output: seen.append(output))
    objective.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective(batch)
    assert seen[0].shape == (3, 1 + 4 + rebuilt, 16)  # the others are spared the decoder
    assert seen[1].shape == (3, rebuilt, 48)
    kept, hidden = objective.mask(batch)
    assert torch.equal(kept, keep)
    for image in range(3):
        assert len(set(hidden[image].tolist())) == rebuilt
        assert set(hidden[image].tolist()) <= set(all_hidden[image].tolist())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_ms_ssim_compares_whole_images(normalize: bool, part: float) -> None:
    objective = make(loss="ms-ssim", normalize_patches=normalize, predict_ratio=part)
    batch = make_batch(2)
    images = batch.views[0].double()
    keep, hidden = objective.mask(batch)
    with torch.no_grad():
        predicted = objective.decode(objective.encoder(batch.views[0], keep=keep), keep, hidden).double()
    made, painted = images.clone(), images.clone()
    for image in range(2):
        targets = []
        for place, patch in enumerate(hidden[image].tolist()):
            pixels = pixels_of(images[image], patch)
            mean, scale = (pixels.mean(), np.sqrt(pixels.var(ddof=1) + 1e-6)) if normalize else (0.0, 1.0)
            paint(made[image], patch, predicted[image, place].numpy() * scale + mean)
            targets.append((pixels - mean) / scale)
        for patch in hidden[image].tolist():
            pixels = pixels_of(images[image], patch)
            mean, scale = (pixels.mean(), np.sqrt(pixels.var(ddof=1) + 1e-6)) if normalize else (0.0, 1.0)
            paint(painted[image], patch, np.full(48, np.mean(targets)) * scale + mean)
    result = objective(batch)
    preprocessing = objective.encoder.preprocessing
    original = batch.views[0]
    assert result.total.item() == pytest.approx(1 - ms_ssim(made.float(), original, preprocessing).item(), abs=1e-5)
    floor = 1 - ms_ssim(painted.float(), original, preprocessing).item()
    assert result.terms["floor"].item() == pytest.approx(floor, abs=1e-5)
    assert 0.01 < result.total.item() < 1
    result.total.backward()
    assert objective.predict.weight.grad is not None
    assert objective.predict.weight.grad.any()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("loss", "part"), [("l2", 1.0), ("l1", 0.5)])
def test_edges_are_a_second_target(normalize: bool, loss: str, part: float) -> None:
    fields = {"normalize_patches": normalize, "loss": loss, "predict_ratio": part}
    objective, batch = make(edges=0.25, **fields), make_batch(2)
    images = batch.views[0]
    edges = sobel(images)
    keep, hidden = objective.mask(batch)
    with torch.no_grad():
        predicted = objective.decode(objective.encoder(images, keep=keep), keep, hidden).double().numpy()
    assert predicted.shape[-1] == 96
    first, second, floors = [], [], []
    for image in range(2):
        own = []
        for place, patch in enumerate(hidden[image].tolist()):
            wanted = [pixels_of(images[image].double(), patch), pixels_of(edges[image], patch)]
            if normalize:
                wanted = [(pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6) for pixels in wanted]
            difference = predicted[image, place, :48] - wanted[0]
            first.append(abs(difference) if loss == "l1" else difference**2)
            second.append((predicted[image, place, 48:] - wanted[1]) ** 2)
            own.append(wanted[1])
        floors.append(np.var(own))
    result = objective(batch)
    assert result.terms["edges"].item() == pytest.approx(np.mean(second), rel=1e-4)
    assert not result.terms["edges"].requires_grad
    assert result.total.item() == pytest.approx(np.mean(first) + 0.25 * np.mean(second), rel=1e-4)
    result.total.backward()
    assert objective.predict.weight.grad is not None
    assert objective.predict.weight.grad.any(1).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_the_floor_is_of_all_that_the_total_holds(normalize: bool) -> None:
    """The report draws it under the total: what one who has learned nothing would score, edges and all."""
    batch = make_batch(2)
    plain, both = (make(edges=weight, normalize_patches=normalize) for weight in (0.0, 0.25))
    edges, floors = sobel(batch.views[0]), []
    for image, hidden in enumerate(both.mask(batch)[1].tolist()):
        own = [pixels_of(edges[image], patch) for patch in hidden]
        if normalize:
            own = [(pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6) for pixels in own]
        floors.append(np.var(own))
    expected = plain(batch).terms["floor"].item() + 0.25 * np.mean(floors)
    assert both(batch).terms["floor"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_predictions_are_put_where_they_belong(normalize: bool) -> None:
    objective, images = make(normalize_patches=normalize), make_batch(2).views[0]
    hidden = torch.tensor([[14, 3, 6], [0, 5, 9]])
    predicted = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(5))
    expected = images.double()
    for image in range(2):
        for place, patch in enumerate(hidden[image].tolist()):
            own, pixels = predicted[image, place].double().numpy(), pixels_of(images[image].double(), patch)
            if normalize:
                own = own * np.sqrt(pixels.var(ddof=1) + 1e-6) + pixels.mean()
            paint(expected[image], patch, own)
    made = objective.in_place(predicted, images, hidden)
    assert torch.allclose(made.double(), expected, atol=1e-5)
    assert torch.equal((made != images).any(1), (expected != images).any(1))
    # what is a perfect prediction gives the image back
    assert torch.allclose(objective.in_place(objective.target(images, hidden), images, hidden), images, atol=1e-5)


def test_visible_patches_do_not_enter_the_loss_and_hidden_ones_not_the_prediction() -> None:
    objective, batch = make(), make_batch(1)
    images = batch.views[0].clone().requires_grad_()
    keep, hidden = random_masking(batch.uniform("mask", 16), objective.visible)
    target = objective.target(images, hidden)
    (gradient,) = torch.autograd.grad(target.sum() * 0 + target.square().sum(), images)
    seen = gradient.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).abs().sum((0, 1, 3, 4))
    assert not seen[keep[0]].any()
    assert seen[hidden[0]].all()
    predicted = objective.decode(objective.encoder(images, keep=keep), keep, hidden)
    (gradient,) = torch.autograd.grad(predicted.square().sum(), images)
    seen = gradient.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).abs().sum((0, 1, 3, 4))
    assert seen[keep[0]].all()
    assert not seen[hidden[0]].any()


@pytest.mark.parametrize(("ratio", "visible"), [(0.5, 8), (0.6, 6), (0.75, 4), (0.9, 2), (0.93, 1), (0.95, 1)])
def test_mask_ratios(ratio: float, visible: int) -> None:
    objective, batch = make(mask_ratio=ratio), make_batch()
    keep, hidden = objective.mask(batch)
    for image, draws in enumerate(batch.uniform("mask", 16).tolist()):
        order = sorted(range(16), key=draws.__getitem__)
        assert keep[image].tolist() == order[:visible]
        assert hidden[image].tolist() == order[visible:]
    result = objective(batch)
    assert result.total.isfinite()
    assert result.terms.keys() == {"floor"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 0.99}, "0.99 of 16 patches leaves 0 visible"),
        ({"mask_ratio": 0.01}, "0.01 of 16 patches leaves 16 visible"),
        ({"decoder_width": 18}, "must be a multiple of 4"),
        ({"decoder_width": 20, "decoder_heads": 3}, "and of the 3 heads"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**fields)


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_backbone_that_cannot_drop_patches_is_refused(name: str) -> None:
    config = EncoderConfig(name=name, image_size=64, pool="head")
    built = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    with pytest.raises(UsageError, match=r"vit_\*"):
        build_objective(MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2), built)(make_batch(size=64))


@pytest.mark.parametrize(
    "fields", [{}, {"normalize_patches": False}, {"predict_ratio": 0.5, "edges": 1.0}, {"loss": "ms-ssim"}]
)
def test_pictures_show_the_task(fields: dict[str, Any]) -> None:
    objective, batch = make(**fields), make_batch(2)
    shown = objective.pictures(batch)
    assert list(shown) == ["augmented view", "what the encoder sees", "reconstruction"]
    original, seen, rebuilt = shown.values()
    assert torch.equal(original, batch.views[0])
    visible = (seen == original).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).all(-1).all(1).flatten(1)
    assert visible.sum(1).tolist() == [4, 4]
    keep, hidden = objective.mask(batch)
    for image in range(2):
        assert visible[image].nonzero().flatten().tolist() == sorted(keep[image].tolist())
    with torch.no_grad():
        predicted = objective.decode(objective.encoder(original, keep=keep), keep, hidden)[..., :48]
        assert torch.equal(rebuilt, objective.in_place(predicted, original, hidden))
    assert not rebuilt.requires_grad
    changed = (rebuilt != original).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).any(-1).any(1).flatten(1)
    for image in range(2):
        assert changed[image].nonzero().flatten().tolist() == sorted(hidden[image].tolist())


def test_stochastic_depth_is_drawn_by_position() -> None:
    objective, batch = make({"drop_path": 0.5}).train(), make_batch(8)
    objective(batch)
    draws = batch.uniform("drop path", 2)
    for place, module in enumerate(objective.encoder._drop_paths):
        assert module.kept is not None
        assert module.kept.tolist() == [draw >= module.rate for draw in draws[:, place].tolist()]


@pytest.mark.parametrize("fields", [{}, {"loss": "l1", "edges": 1.0}, {"loss": "ms-ssim", "normalize_patches": False}])
def test_the_loss_is_taken_in_full_precision(fields: dict[str, Any]) -> None:
    objective, batch = make(**fields), make_batch()
    floor = objective(batch).terms["floor"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = objective(batch)
    assert result.total.dtype == torch.float32
    assert result.terms["floor"].item() == pytest.approx(floor, rel=1e-6)


def test_the_decoder_starts_as_maes() -> None:
    objective = make(decoder_width=64)
    assert 0.01 < objective.mask_token.std().item() < 0.03
    for module in (objective.embed, objective.predict, objective.blocks[0].mlp.fc1):
        assert not module.bias.any()
        bound = (6 / sum(module.weight.shape)) ** 0.5  # Glorot & Bengio 2010
        assert 0.95 * bound < module.weight.abs().max() <= bound


def test_it_learns_one_batch_below_the_floor() -> None:
    objective, batch = make(normalize_patches=False), make_batch(4)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(300):
        loss = objective(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.total.item() < 0.5 * loss.terms["floor"].item()


def pixels_of(image: torch.Tensor, patch: int) -> Any:
    """One of the 4 x 4 patches of 4 x 4 pixels, in the order (channel, row, column)."""
    row, column = divmod(patch, 4)
    return image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().numpy()


def paint(image: torch.Tensor, patch: int, pixels: Any) -> None:
    """The inverse of `pixels_of`."""
    row, column = divmod(patch, 4)
    image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = torch.from_numpy(pixels).view(3, 4, 4)


def sobel(images: torch.Tensor) -> torch.Tensor:
    """Length of each channel's gradient, by scipy: Sobel kernels over 8, borders repeated."""
    channels = images.double().flatten(0, 1).numpy()
    edges = [np.hypot(*(ndimage.sobel(one, axis=axis, mode="nearest") / 8 for axis in (0, 1))) for one in channels]
    return torch.from_numpy(np.stack(edges)).view(images.shape)


def as_ours(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' tensors (weights or gradients) under our names: q, k and v joined, pixels of a patch in our order."""
    ours: dict[str, torch.Tensor] = {
        "encoder.backbone.cls_token": theirs["vit.embeddings.cls_token"],
        "encoder.backbone.patch_embed.proj.weight": theirs["vit.embeddings.patch_embeddings.projection.weight"],
        "encoder.backbone.patch_embed.proj.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
        "mask_token": theirs["decoder.mask_token"].flatten(),
    }
    for part in ("weight", "bias"):
        ours[f"encoder.backbone.norm.{part}"] = theirs[f"vit.layernorm.{part}"]
        ours[f"embed.{part}"] = theirs[f"decoder.decoder_embed.{part}"]
        ours[f"norm.{part}"] = theirs[f"decoder.decoder_norm.{part}"]
        ours[f"predict.{part}"] = rearrange(
            theirs[f"decoder.decoder_pred.{part}"], "(p q c) ... -> (c p q) ...", p=4, q=4
        )
        for mine, other in (("encoder.backbone.blocks", "vit.layers"), ("blocks", "decoder.decoder_layers")):
            for block in range(2):
                ours |= block_as_ours(theirs, f"{other}.{block}", f"{mine}.{block}", part)
    return ours
