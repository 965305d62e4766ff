"""MAE against transformers' ViTMAE with the same weights and mask, and against slow loops for masks and targets.

Mutations that these tests caught when they were tried: keep and hidden swapped, the decoder's positions of visible tokens
taken in grid order, the loss over all patches, the target's variance biased (unbiased=False), the mask token without
positions, the decoder's class token without its own.
"""

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from selfsight.data.loader import Batch
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.objectives.configs import MAEConfig
from selfsight.objectives.mae import MAE, random_masking
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
def test_the_loss_is_a_slow_loop(normalize: bool) -> None:
    objective, batch = make(normalize_patches=normalize), make_batch(2)
    images = batch.views[0]
    keep, hidden = random_masking(batch.uniform("mask", 16), objective.visible)
    with torch.no_grad():
        predicted = objective.decode(objective.encoder(images, keep=keep), keep, hidden)
        result = objective(batch)
    errors, targets = [], [[], []]  # type: ignore[var-annotated]
    for image in range(2):
        for place, patch in enumerate(hidden[image].tolist()):
            row, column = divmod(patch, 4)
            pixels = images[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().double().numpy()
            if normalize:
                pixels = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            errors.append((predicted[image, place].double().numpy() - pixels) ** 2)
            targets[image].append(pixels)
    assert result.total.item() == pytest.approx(np.mean(errors), rel=1e-5)
    assert result.terms["floor"].item() == pytest.approx(np.mean([np.var(own) for own in targets]), rel=1e-4)


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


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(2, 40), st.data())
def test_masks_split_the_patches_by_their_draws(images: int, patches: int, data: st.DataObject) -> None:
    visible = data.draw(st.integers(1, patches - 1))
    draws = torch.rand(images, patches, dtype=torch.float64)
    keep, hidden = random_masking(draws, visible)
    for image in range(images):
        assert sorted([*keep[image].tolist(), *hidden[image].tolist()]) == list(range(patches))
        assert draws[image, keep[image]].max() <= draws[image, hidden[image]].min()
    assert keep.shape == (images, visible)


def test_masks_are_uniform_over_patches_and_follow_the_position() -> None:
    batch = Batch((torch.zeros(4000, 1, 1, 1),), torch.arange(4000), seed=0)
    keep, _ = random_masking(batch.uniform("mask", 16), 4)
    counts = torch.bincount(keep.flatten(), minlength=16).double() / 4000
    assert (counts - 0.25).abs().max() < 0.03
    alone = Batch((torch.zeros(1, 1, 1, 1),), torch.tensor([1234]), seed=0)
    assert torch.equal(random_masking(alone.uniform("mask", 16), 4)[0][0], keep[1234])


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9, 0.93])
def test_mask_ratios(ratio: float) -> None:
    assert make(mask_ratio=ratio).visible == round(16 * (1 - ratio))


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


def test_pictures_show_the_task() -> None:
    objective, batch = make(normalize_patches=True), make_batch(2)
    shown = objective.pictures(batch)
    assert list(shown) == ["augmented view", "what the encoder sees", "reconstruction"]
    original, seen, rebuilt = shown.values()
    assert torch.equal(original, batch.views[0])
    visible = (seen == original).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).all(-1).all(1).flatten(1)
    assert visible.sum(1).tolist() == [4, 4]
    assert torch.equal(rebuilt[seen != 0], original[seen != 0])


def test_it_learns_one_batch_below_the_floor() -> None:
    objective, batch = make(normalize_patches=False), make_batch(4)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(300):
        loss = objective(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.total.item() < 0.5 * loss.terms["floor"].item()


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
                a, b = f"{mine}.{block}", f"{other}.{block}"
                qkv = [theirs[f"{b}.attention.{name}_proj.{part}"] for name in "qkv"]
                ours[f"{a}.attn.qkv.{part}"] = torch.cat(qkv)
                ours[f"{a}.attn.proj.{part}"] = theirs[f"{b}.attention.o_proj.{part}"]
                ours[f"{a}.norm1.{part}"] = theirs[f"{b}.layernorm_before.{part}"]
                ours[f"{a}.norm2.{part}"] = theirs[f"{b}.layernorm_after.{part}"]
                for layer in ("fc1", "fc2"):
                    ours[f"{a}.mlp.{layer}.{part}"] = theirs[f"{b}.mlp.{layer}.{part}"]
    return ours
