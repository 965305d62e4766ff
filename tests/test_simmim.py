"""SimMIM against transformers' ViTForMaskedImageModeling with the same weights and mask, and against slow loops.

Mutations that these tests caught when they were tried: a factor of 3 or the channels dropped from the mean, squares
instead of absolute differences, the loss over all or over visible pixels, the floor squared, over all pixels, with a
colour of the batch or of a channel, draws from torch's generator, the mask inverted, by the highest draws, one square
short, transposed or tiled instead of enlarged, the mask token detached or zero or of the wrong width, the prediction
transposed, detached, in half precision or on the patches that go in, stochastic depth from torch's generator,
pictures inverted or with a gradient, Swin refused, ConvNeXt not.
"""

from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reference.transformers_vit import block_as_ours
from torch import Tensor
from transformers import ViTConfig, ViTForMaskedImageModeling

from selfsight.data.placer import Batch
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.objectives.configs import SimMIMConfig
from selfsight.objectives.simmim import SimMIM
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}
SWIN: dict[str, Any] = {"name": "swin_tiny_patch4_window7_224", "image_size": 64, "pool": "head"}


def make(encoder: dict[str, Any] | None = None, **fields: Any) -> SimMIM:
    config = EncoderConfig(**(ENCODER | (encoder or {})))
    return built(config, **({"mask_size": 4} | fields))


def built(config: EncoderConfig, **fields: Any) -> SimMIM:
    torch.manual_seed(0)
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    objective = build_objective(SimMIMConfig(**fields), encoder)
    assert isinstance(objective, SimMIM)
    return objective


@pytest.fixture(scope="module")
def swin() -> SimMIM:
    """Squares of 32 pixels, as the paper's: 8 x 8 patches that go in, one token that comes out."""
    return built(EncoderConfig(**SWIN), mask_size=32, mask_ratio=0.5)


def make_batch(count: int = 3, size: int = 16) -> Batch:
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))
    return Batch((images,), torch.arange(100, 100 + count), seed=7)


def slow_mask(batch: Batch, size: int, ratio: float) -> NDArray[np.bool_]:
    """Masked pixels (B, S, S): the squares with the lowest draws, rounded up."""
    side = batch.views[0].shape[-1] // size
    mask = np.zeros((len(batch.positions), side * size, side * size), dtype=bool)
    for image, draws in enumerate(batch.uniform("mask", side**2).tolist()):
        for square in sorted(range(side**2), key=draws.__getitem__)[: ceil(ratio * side**2)]:
            row, column = divmod(square, side)
            mask[image, size * row : size * (row + 1), size * column : size * (column + 1)] = True
    return mask


def slow_losses(predicted: Tensor, batch: Batch, mask: NDArray[np.bool_], patch: int) -> tuple[float, float]:
    """Loss and floor from predicted masked tokens (B, M, C p p), a masked value at a time."""
    side = batch.views[0].shape[-1] // patch
    hidden_tokens = torch.from_numpy(mask[:, ::patch, ::patch].copy()).flatten(1)
    whole = predicted.new_full((len(mask), side**2, predicted.shape[-1]), torch.nan)
    whole[hidden_tokens] = predicted.detach().flatten(0, 1)
    errors, floors = [], []
    for image, tokens, hidden in zip(batch.views[0].double().numpy(), whole.double().numpy(), mask, strict=True):
        values = [value for channel in image for value in channel[hidden]]
        colour = np.mean(values)
        floors.append(np.mean([abs(value - colour) for value in values]))
        for channel in range(3):
            for row, column in zip(*hidden.nonzero(), strict=True):
                token = tokens[row // patch * side + column // patch].reshape(3, patch, patch)
                errors.append(abs(token[channel, row % patch, column % patch] - image[channel, row, column]))
    return float(np.mean(errors)), float(np.mean(floors))


def with_predictions(objective: SimMIM, batch: Batch) -> tuple[Any, Tensor]:
    """The objective's answer, and the predicted masked tokens (B, M, C p p) that it was made from, which keep their gradient."""
    seen: list[Tensor] = []
    hook = objective.predict.register_forward_hook(lambda module, inputs, output: seen.append(output))
    result = objective(batch)
    hook.remove()
    (predicted,) = seen
    predicted.retain_grad()
    return result, predicted


@pytest.mark.parametrize("size", [4, 8])
def test_loss_and_gradients_are_transformers(size: int) -> None:
    ours, batch = make({"positions": "learned"}, mask_size=size), make_batch()
    theirs = ViTForMaskedImageModeling(
        ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=16, patch_size=4,
            encoder_stride=4, hidden_act="gelu", layer_norm_eps=1e-6, attn_implementation="eager",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.02,
        )
    )  # fmt: skip
    with torch.no_grad():  # initial biases and tokens of zero would hide mistakes
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = as_ours(dict(theirs.named_parameters()))
    named = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert weights.keys() == named.keys()
    ours.load_state_dict(weights)
    masked_patches = torch.from_numpy(slow_mask(batch, size, 0.6)[:, ::4, ::4].copy()).flatten(1)
    expected = theirs(batch.views[0], bool_masked_pos=masked_patches)
    result, predicted = with_predictions(ours, batch)
    assert torch.allclose(ours.rebuild(batch, ours.cells(batch)), expected.reconstruction, atol=1e-5)
    assert predicted.shape == (3, masked_patches.sum() // 3, 48)
    # transformers divides by 1e-5 more than the masked pixels
    count = masked_patches.sum().item() * 16
    assert result.total.item() == pytest.approx(expected.loss.item() * (count + 1e-5) / count, abs=1e-5)
    result.total.backward()
    expected.loss.backward()
    gradients = as_ours({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    for name, parameter in named.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-5), name


@pytest.mark.parametrize(("size", "ratio"), [(4, 0.6), (8, 0.6), (8, 0.25), (4, 0.01), (4, 0.9)])
def test_whole_squares_are_masked_by_their_draws_and_their_number_is_rounded_up(size: int, ratio: float) -> None:
    objective, batch = make(mask_size=size, mask_ratio=ratio), make_batch(4)
    mask = slow_mask(batch, size, ratio)
    cells = objective.cells(batch)
    assert cells.dtype == torch.bool
    assert cells.shape == (4, 16 // size, 16 // size)
    assert cells.sum((1, 2)).tolist() == [ceil(ratio * (16 // size) ** 2)] * 4
    seen: list[Tensor] = []
    forward = objective.encoder.forward

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.append(named["mask"])
        return forward(*arguments, **named)

    objective.encoder.forward = spy  # type: ignore[method-assign]
    objective(batch)
    for image in range(4):
        for row in range(16):
            for column in range(16):
                assert cells[image, row // size, column // size] == mask[image, row, column]
                assert seen[0][image, row // 4 * 4 + column // 4] == mask[image, row, column]


def test_masks_are_uniform_over_squares_and_follow_the_position() -> None:
    objective = make()
    batch = Batch((torch.zeros(4000, 1, 1, 1),), torch.arange(4000), seed=0)
    cells = objective.cells(batch)
    assert (cells.double().mean(0) - 10 / 16).abs().max() < 0.03
    some = torch.tensor([1234, 77])
    other = Batch((torch.zeros(2, 1, 1, 1),), some, seed=0)
    assert torch.equal(objective.cells(other), cells[some])


@pytest.mark.parametrize(("size", "ratio"), [(4, 0.6), (8, 0.4), (4, 0.05)])
def test_loss_and_floor_are_slow_loops_over_masked_pixels(size: int, ratio: float) -> None:
    objective, batch = make(mask_size=size, mask_ratio=ratio), make_batch()
    batch.views[0][1] += 3  # each image has its own mean
    batch.views[0][:, 1] += 1
    result, predicted = with_predictions(objective, batch)
    loss, floor = slow_losses(predicted, batch, slow_mask(batch, size, ratio), 4)
    assert result.total.item() == pytest.approx(loss, rel=1e-5)
    assert result.terms.keys() == {"floor"}
    assert result.terms["floor"].item() == pytest.approx(floor, rel=1e-5)
    assert not result.terms["floor"].requires_grad


def test_visible_pixels_do_not_enter_the_loss() -> None:
    objective, batch = make(), make_batch()
    result, predicted = with_predictions(objective, batch)
    result.total.backward()
    assert predicted.grad is not None
    # each masked value has the same weight, and only its sign counts
    assert torch.allclose(predicted.grad.abs(), torch.tensor(1 / (3 * 10 * 48)))
    images = batch.views[0].clone().requires_grad_()
    cells = objective.cells(batch)
    (gradient,) = torch.autograd.grad(objective(Batch((images,), batch.positions, 7)).total, images)
    with torch.no_grad():
        changed = batch.views[0] + 5 * torch.from_numpy(slow_mask(batch, 4, 0.6))[:, None]
        assert torch.equal(
            objective.rebuild(batch, cells), objective.rebuild(Batch((changed,), batch.positions, 7), cells)
        )
    assert gradient.abs().amax(1).all()  # masked as targets, visible as what the encoder sees


@pytest.mark.parametrize("size", [4, 8])
def test_masked_pixels_do_not_enter_the_prediction_and_visible_ones_do(size: int) -> None:
    objective, batch = make(mask_size=size), make_batch()
    images = batch.views[0].clone().requires_grad_()
    whole = objective.rebuild(Batch((images,), batch.positions, 7), objective.cells(batch))
    assert whole.shape == images.shape
    (gradient,) = torch.autograd.grad(whole.square().sum(), images)
    mask = torch.from_numpy(slow_mask(batch, size, 0.6))[:, None].expand_as(images)
    assert not gradient[mask].any()
    assert gradient[~mask].all()


def test_every_trained_parameter_gets_a_gradient() -> None:
    objective = make({"registers": 2})
    objective(make_batch()).total.backward()
    assert lacking(objective) == []


def lacking(objective: SimMIM) -> list[str]:
    """Names of the trained parameters without a gradient."""
    named = objective.named_parameters()
    return [name for name, p in named if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_swin_learns_from_masked_squares(swin: SimMIM) -> None:
    batch = make_batch(2, size=64)
    swin.zero_grad()
    result, predicted = with_predictions(swin, batch)
    assert predicted.shape == (2, 2, 3 * 32 * 32)
    assert swin.cells(batch).sum((1, 2)).tolist() == [2, 2]
    loss, floor = slow_losses(predicted, batch, slow_mask(batch, 32, 0.5), 32)
    assert result.total.item() == pytest.approx(loss, rel=1e-5)
    assert result.terms["floor"].item() == pytest.approx(floor, rel=1e-5)
    result.total.backward()
    assert lacking(swin) == []


@pytest.mark.parametrize("size", [16, 32])
def test_squares_smaller_than_a_token_that_comes_out(size: int) -> None:
    """Their loss is of whole images; of squares that are tokens it is the same as of the tokens."""
    objective, batch = built(EncoderConfig(**SWIN), mask_size=size, mask_ratio=0.5), make_batch(2, size=64)
    cells, mask = objective.cells(batch), slow_mask(batch, size, 0.5)
    result = objective(batch)
    whole = objective.rebuild(batch, cells)
    errors = (whole - batch.views[0]).abs()[torch.from_numpy(mask)[:, None].expand_as(whole)]
    assert result.total.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    other = objective.loss_of_parts(batch.views[0], cells, whole)
    assert other.total.item() == pytest.approx(result.total.item(), rel=1e-6)
    assert other.terms["floor"].item() == pytest.approx(result.terms["floor"].item(), rel=1e-6)


def test_swin_sees_a_mask_token_in_place_of_each_masked_patch(swin: SimMIM) -> None:
    batch = make_batch(2, size=64)
    images = batch.views[0].clone().requires_grad_()
    stem, layers = swin.encoder.backbone.patch_embed, swin.encoder.backbone.layers
    seen: list[Tensor] = []
    hook = layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    whole = swin.rebuild(Batch((images,), batch.positions, 7), swin.cells(batch))
    hook.remove()
    assert whole.shape == images.shape
    mask = slow_mask(batch, 32, 0.5)
    embedded = stem(images)
    for image in range(2):
        for row in range(16):
            for column in range(16):
                hidden = mask[image, 4 * row, 4 * column]
                expected = swin.mask_token if hidden else embedded[image, row, column]
                assert torch.allclose(seen[0][image, row, column], expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(whole.square().sum(), images)
    pixels = torch.from_numpy(mask)[:, None].expand_as(images)
    assert not gradient[pixels].any()
    assert gradient[~pixels].all()


def test_stochastic_depth_is_drawn_by_position() -> None:
    objective, batch = make({"drop_path": 0.5}).train(), make_batch(8)
    objective(batch)
    draws = batch.uniform("drop path", 2)
    for place, module in enumerate(objective.encoder._drop_paths):
        assert module.kept is not None
        assert module.kept.tolist() == [draw >= module.rate for draw in draws[:, place].tolist()]


def test_pictures_show_the_task() -> None:
    objective, batch = make(mask_size=8), make_batch(2)
    shown = objective.pictures(batch)
    assert list(shown) == ["augmented view", "what the encoder sees", "reconstruction"]
    original, seen, rebuilt = shown.values()
    assert torch.equal(original, batch.views[0])
    mask = torch.from_numpy(slow_mask(batch, 8, 0.6))[:, None].expand_as(original)
    assert not seen[mask].any()
    assert torch.equal(seen[~mask], original[~mask])
    assert torch.equal(rebuilt[~mask], original[~mask])
    with torch.no_grad():
        assert torch.equal(rebuilt[mask], objective.rebuild(batch, objective.cells(batch))[mask])
    assert not rebuilt.requires_grad


def test_the_loss_is_taken_in_full_precision() -> None:
    objective, batch = make(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = objective(batch)
        whole = objective.rebuild(batch, objective.cells(batch))
    assert whole.dtype == torch.float32
    assert result.total.dtype == torch.float32


@pytest.mark.parametrize(
    ("encoder", "fields", "message"),
    [
        ({}, {"mask_size": 6}, "objective.mask_size: 6 must be a multiple of the patch of 4"),
        ({}, {"mask_size": 12}, "objective.mask_size: 12 must be .* a divisor of the image's 16"),
        ({}, {"mask_size": 32}, "objective.mask_size: 32 must be .* a divisor of the image's 16"),
        ({}, {"mask_size": 8, "mask_ratio": 0.8}, "objective.mask_ratio: 0.8 of 4 squares of 8 pixels masks 4"),
        ({}, {"mask_size": 16}, "objective.mask_ratio: 0.6 of 1 squares of 16 pixels masks 1"),
    ],
)
def test_impossible_settings_are_refused(encoder: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(encoder, **fields)


def test_a_backbone_without_patches_is_refused() -> None:
    config = EncoderConfig(name="convnext_atto", image_size=64, pool="head")
    with pytest.raises(UsageError, match=r"encoder.name: convnext_atto cannot mask patches; choose a vit_\* or swin\*"):
        built(config, mask_size=32)


def as_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors (weights or gradients) under our names: q, k and v joined, its 1 x 1 convolution a product."""
    ours: dict[str, Tensor] = {
        "encoder.backbone.cls_token": theirs["vit.embeddings.cls_token"],
        "encoder.backbone.pos_embed": theirs["vit.embeddings.position_embeddings"],
        "encoder.backbone.patch_embed.proj.weight": theirs["vit.embeddings.patch_embeddings.projection.weight"],
        "encoder.backbone.patch_embed.proj.bias": theirs["vit.embeddings.patch_embeddings.projection.bias"],
        "mask_token": theirs["vit.embeddings.mask_token"].flatten(),
        # PixelShuffle takes channels in the order (c p q), which is ours
        "predict.weight": theirs["decoder.0.weight"].flatten(1),
        "predict.bias": theirs["decoder.0.bias"],
    }
    for part in ("weight", "bias"):
        ours[f"encoder.backbone.norm.{part}"] = theirs[f"vit.layernorm.{part}"]
        for block in range(2):
            ours |= block_as_ours(theirs, f"vit.layers.{block}", f"encoder.backbone.blocks.{block}", part)
    return ours
