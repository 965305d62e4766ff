"""data2vec against slow loops over images, patches and dimensions in float64.

Mutations that these tests caught when they were tried: the student's own tokens as target, a target that is masked, not
normalised or normalised over the whole image; the student unmasked or masked the other way; the loss over visible or all
patches, summed over dimensions, with another beta or without the factor of beta; no last layer; squares not enlarged; the
floor of a perfect predictor; drop path without the position; a teacher that is trained, is the student, is not scored, drops
branches or moves the wrong way.
"""

import copy
from functools import cache
from math import ceil, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.objectives.configs import Data2VecConfig
from selfsight.objectives.data2vec import Data2Vec
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}


@cache
def build(config: EncoderConfig) -> Encoder:
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)


def make(encoder: dict[str, Any] | None = None, noise: float = 0.1, **fields: Any) -> Data2Vec:
    """A student and a teacher that differ by noise."""
    built = copy.deepcopy(build(EncoderConfig(**(ENCODER | (encoder or {})))))
    torch.manual_seed(0)
    objective = build_objective(Data2VecConfig(**({"mask_size": 4} | fields)), built)
    assert isinstance(objective, Data2Vec)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(noise * torch.randn_like(parameter))
    return objective


def make_batch(count: int = 3) -> Batch:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return Batch((images,), torch.arange(100, 100 + count), seed=7)


def slow_mask(batch: Batch, size: int, ratio: float) -> Tensor:
    """The squares with the lowest numbers, patch by patch."""
    side, cell = 16 // size, size // 4
    rows = []
    for draws in batch.uniform("mask", side**2).tolist():
        lowest = sorted(range(side**2), key=lambda square: draws[square])[: ceil(side**2 * ratio)]
        rows.append([(row // cell) * side + column // cell in lowest for row in range(4) for column in range(4)])
    return torch.tensor(rows)


def slow_smooth_l1(error: float, beta: float) -> float:
    return 0.5 * error**2 / beta if abs(error) < beta else abs(error) - 0.5 * beta


def slow_target(vector: list[float]) -> list[float]:
    mean = sum(vector) / len(vector)
    variance = sum((value - mean) ** 2 for value in vector) / len(vector)
    return [(value - mean) / sqrt(variance + 1e-5) for value in vector]


@pytest.mark.parametrize(("size", "ratio", "beta"), [(4, 0.6, 0.3), (8, 0.5, 1.0), (4, 0.3, 2.0)])
def test_loss_and_floor_are_slow_loops(size: int, ratio: float, beta: float) -> None:
    objective, batch = make(mask_size=size, mask_ratio=ratio, beta=beta), make_batch()
    mask = slow_mask(batch, size, ratio)
    assert mask.sum(1).tolist() == [ceil((16 // size) ** 2 * ratio) * (size // 4) ** 2] * 3
    with torch.no_grad():
        taught = objective.teacher(batch.views[0]).patches.double().tolist()
        tokens = objective.encoder(batch.views[0], mask=mask, mask_token=objective.mask_token).patches
        predicted = objective.predict(tokens).double().tolist()
    losses, floors = [], []
    means = torch.zeros(3, 24, dtype=torch.float64)
    for image in range(3):
        for patch in range(16):
            target = slow_target(taught[image][patch])
            means[image] += torch.tensor(target, dtype=torch.float64) / 16
            if mask[image, patch]:
                pairs = zip(predicted[image][patch], target, strict=True)
                losses += [slow_smooth_l1(mine - other, beta) for mine, other in pairs]
                floors += [slow_smooth_l1(other, beta) for other in target]
    found = objective(batch)
    assert found.total.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.terms.keys() == {"floor"}
    assert found.terms["floor"].item() == pytest.approx(sum(floors) / len(floors), rel=1e-4)
    assert torch.allclose(found.watched["target"].double(), means, atol=1e-5)
    assert not found.terms["floor"].requires_grad and not found.watched["target"].requires_grad


def test_masked_pixels_reach_the_target_and_not_the_student() -> None:
    objective, batch = make(), make_batch()
    mask = slow_mask(batch, 4, 0.6)
    images = batch.views[0].clone().requires_grad_()
    objective(Batch((images,), batch.positions, batch.seed)).total.backward()
    assert images.grad is not None
    seen = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).abs().sum((1, 3, 4))
    assert torch.equal(seen == 0, mask)
    pixels = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = Batch((torch.where(pixels, 0.0, batch.views[0]),), batch.positions, batch.seed)
    assert objective(other).terms["floor"].item() != pytest.approx(objective(batch).terms["floor"].item(), rel=1e-5)
    seen_by_teacher: list[Tensor] = []
    objective.teacher.register_forward_pre_hook(lambda module, given: seen_by_teacher.append(given[0]))
    objective(batch)
    assert len(seen_by_teacher) == 1
    assert torch.equal(seen_by_teacher[0], batch.views[0])


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none() -> None:
    objective = make({"registers": 2, "positions": "learned"})
    objective(make_batch()).total.backward()
    lacking = [
        name for name, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert lacking == []
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    assert objective.predict.weight.shape == (24, 24)


def test_the_teacher_moves_and_is_what_is_scored() -> None:
    objective = make({"drop_path": 0.3}, momentum=0.75)
    assert objective.scored is objective.teacher
    assert not any(module.training for module in objective.train().teacher.modules())
    before = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    student = {name: value.clone() for name, value in objective.encoder.state_dict().items()}
    objective.after_step(1, 10)
    for name, value in objective.teacher.state_dict().items():
        assert torch.allclose(value, 0.75 * before[name] + 0.25 * student[name], atol=1e-6), name
    assert any(not torch.equal(value, student[name]) for name, value in before.items())
    same = make(noise=0.0)
    assert all(torch.equal(value, same.encoder.state_dict()[name]) for name, value in same.teacher.state_dict().items())


def test_an_image_is_treated_alike_in_any_batch() -> None:
    objective, batch = make({"drop_path": 0.5}), make_batch(4)
    parts = [Batch((batch.views[0][i : i + 1],), batch.positions[i : i + 1], batch.seed) for i in range(4)]
    mean = torch.stack([objective(own).total for own in parts]).mean().item()
    assert objective(batch).total.item() == pytest.approx(mean, rel=1e-4)


def test_it_learns_one_batch_below_the_floor() -> None:
    objective, batch = make(noise=0.0, momentum=1.0), make_batch(4)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    first = objective(batch)
    for step in range(120):
        loss = objective(batch)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        objective.after_step(step + 1, 120)
    assert loss.total.item() < 0.5 * loss.terms["floor"].item()
    assert torch.equal(loss.terms["floor"], first.terms["floor"])


@pytest.mark.parametrize(
    ("encoder", "fields", "message"),
    [
        ({}, {"mask_size": 6}, "mask_size: 6 must be a multiple of the patch"),
        ({}, {"mask_size": 8, "mask_ratio": 0.9}, "masks 4"),
        ({"name": "vit_relpos_small_patch16_224"}, {}, "vit_relpos_small_patch16_224 cannot mask patches one by one"),
    ],
)
def test_impossible_settings_are_refused(encoder: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(encoder, **fields)
