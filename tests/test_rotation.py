"""Rotation against numpy.rot90 and a cross-entropy that is written out.

Mutations that these tests caught when they were tried: turned the other way, flipped or not at all, labels in another
order, 3 or 3.99 instead of 4 draws' worth, rounded labels, draws from torch's generator or of the neighbour, labels
of all turns image by image, the modes swapped, the loss divided by log 4, smoothed, summed or a margin, the least
likely answer as the answer, log 3, half precision, features detached or normalised, stochastic depth of other images
or from torch's generator, a head as wide as the tokens.
"""

from math import exp, floor, log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsight import keyed
from selfsight.data.placer import Batch
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.objectives import build_objective
from selfsight.objectives.configs import RotationConfig
from selfsight.objectives.rotation import Rotation
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}


def make(encoder: dict[str, Any] | None = None, **fields: Any) -> Rotation:
    config = EncoderConfig(**(ENCODER | (encoder or {})))
    torch.manual_seed(0)
    built = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    objective = build_objective(RotationConfig(**fields), built)
    assert isinstance(objective, Rotation)
    return objective


def make_batch(count: int = 16) -> Batch:
    """Images of whole numbers, all different within an image."""
    generator = torch.Generator().manual_seed(3)
    images = torch.stack([torch.randperm(3 * 16 * 16, generator=generator) for _ in range(count)])
    return Batch((images.view(count, 3, 16, 16).float() / 256,), torch.arange(100, 100 + count), seed=7)


def turned_by_numpy(image: Tensor, quarters: int) -> Tensor:
    return torch.from_numpy(np.stack([np.rot90(channel, quarters) for channel in image.numpy()]))


def test_one_turn_of_each_image_is_numpys_by_its_label() -> None:
    objective, batch = make(), make_batch()
    turned, labels = objective.turn(batch)
    assert labels.dtype == torch.int64
    assert turned.shape == (16, 3, 16, 16)
    assert set(labels.tolist()) == {0, 1, 2, 3}  # each kind is tried
    for image, label, before in zip(turned, labels.tolist(), batch.views[0], strict=True):
        assert torch.equal(image, turned_by_numpy(before, label))
    assert torch.equal(objective.pictures(batch)["turned"], turned)
    assert torch.equal(objective.pictures(batch)["augmented view"], batch.views[0])


def test_the_label_is_drawn_by_position_alone() -> None:
    objective, batch = make(), make_batch()
    _, labels = objective.turn(batch)
    some = [5, 2]
    other = Batch((batch.views[0][some],), batch.positions[some], seed=7)
    assert objective.turn(other)[1].tolist() == labels[some].tolist()
    many = Batch((torch.zeros(4000, 1, 2, 2),), torch.arange(4000), seed=0)
    draws = keyed.uniform(0, "rotation", many.positions.numpy(), 1)
    assert objective.turn(many)[1].tolist() == [floor(4 * draw) for draw in draws[:, 0]]
    shares = torch.bincount(objective.turn(many)[1], minlength=4) / 4000
    assert (shares - 0.25).abs().max() < 0.03


def test_all_four_turns_of_each_image_are_numpys() -> None:
    objective, batch = make(turns="all"), make_batch(3)
    turned, labels = objective.turn(batch)
    assert turned.shape == (12, 3, 16, 16)
    assert labels.dtype == torch.int64
    seen = set()
    for number, (image, label) in enumerate(zip(turned, labels.tolist(), strict=True)):
        assert torch.equal(image, turned_by_numpy(batch.views[0][number % 3], label))
        seen.add((number % 3, label))
    assert len(seen) == 12
    assert objective.pictures(batch)["turned"].shape == batch.views[0].shape


@pytest.mark.parametrize("turns", ["one", "all"])
@pytest.mark.parametrize("pool", ["mean", "cls+mean", "head"])
def test_the_loss_is_a_cross_entropy_written_out(turns: str, pool: str) -> None:
    objective, batch = make({"pool": pool}, turns=turns), make_batch()
    with torch.no_grad():
        objective.head.weight.mul_(10)  # some answers are right for sure, some wrong
        turned, labels = objective.turn(batch)
        features = objective.encoder.embed(turned).double()
        logits = (features @ objective.head.weight.double().T + objective.head.bias.double()).tolist()
    losses, right = [], []
    for row, label in zip(logits, labels.tolist(), strict=True):
        losses.append(-log(exp(row[label]) / sum(exp(value) for value in row)))
        right.append(max(range(4), key=row.__getitem__) == label)
    result = objective(batch)
    assert result.total.item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.terms.keys() == {"accuracy", "floor"}
    assert result.terms["accuracy"].item() == pytest.approx(np.mean(right))
    assert result.terms["floor"].item() == pytest.approx(1.3862943611)
    assert not any(term.requires_grad for term in result.terms.values())


def test_an_answer_that_is_always_the_same_is_right_for_its_label() -> None:
    batch = make_batch()
    for turns, wanted in (("one", None), ("all", 0.25)):
        objective = make(turns=turns)
        torch.nn.init.zeros_(objective.head.weight)
        torch.nn.init.zeros_(objective.head.bias)
        assert objective(batch).total.item() == pytest.approx(log(4))  # what the floor says
        for label in range(4):
            with torch.no_grad():
                objective.head.bias.zero_()[label] = 1
            share = (objective.turn(batch)[1] == label).float().mean().item()
            assert objective(batch).terms["accuracy"].item() == pytest.approx(share)
            assert wanted in (None, share)


@pytest.mark.parametrize("turns", ["one", "all"])
def test_every_trained_parameter_gets_a_gradient(turns: str) -> None:
    objective = make({"registers": 2}, turns=turns)
    objective(make_batch()).total.backward()
    lacking = [
        name for name, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert lacking == []


@pytest.mark.parametrize("turns", ["one", "all"])
def test_stochastic_depth_is_drawn_by_position_and_alike_for_all_turns_of_an_image(turns: str) -> None:
    objective, batch = make({"drop_path": 0.5, "depth": 3}, turns=turns).train(), make_batch(6)
    objective(batch)
    draws = keyed.uniform(7, "drop path", batch.positions.numpy(), 4)  # two places in two of the three blocks
    assert len(objective.encoder._drop_paths) == 4
    for place, module in enumerate(objective.encoder._drop_paths):
        expected = [bool(draw >= module.rate) for draw in draws[:, place]]
        assert module.kept is not None
        assert module.kept.tolist() == expected * (4 if turns == "all" else 1)


def test_the_loss_is_taken_in_full_precision() -> None:
    objective, batch = make(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = objective(batch)
    assert result.total.dtype == torch.float32
    assert result.terms["floor"].item() == pytest.approx(log(4), abs=1e-6)
