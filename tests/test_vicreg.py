"""VICReg against lightly's loss, and each term against a slow loop in float64.

Mutations that these tests caught when they were tried: the second view made as the first or encoded from it, L1 for L2,
a missing half of the variance, one view's term taken twice, weights exchanged, autocast or bfloat16 in the sums, a biased
variance, another epsilon, the hinge turned or dropped, no centring, the larger of the two matrices, the diagonal kept or
summed over images, N or no square for (N - 1)^2, another width, a batch of one let through, 127 not few or 128 few, GELU,
no norm, one layer less, biases, the other view watched, terms with gradient, the same stochastic depth for both views. Of moments: another share in order,
both draws the same, a triple reversed, no gradient, moments or views in another order, no weight, another floor, any images.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import VICRegLoss
from torch import nn

from selfsight.data.placer import Batch
from selfsight.data.views import View
from selfsight.encoder import build_encoder, pool_tokens, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.objectives.across import GlobalBatchNorm
from selfsight.objectives.base import Setting
from selfsight.objectives.configs import VICRegConfig
from selfsight.objectives.vicreg import VICReg, spread, triples
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}


def make(encoder: dict[str, Any] | None = None, **fields: Any) -> VICReg:
    config = EncoderConfig(**(ENCODER | (encoder or {})))
    torch.manual_seed(0)
    built = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    objective = build_objective(VICRegConfig(**({"expander_width": 12} | fields)), built)
    assert isinstance(objective, VICReg)
    return objective


def make_batch(count: int = 5) -> Batch:
    drawn = torch.Generator().manual_seed(3)
    views = tuple(torch.randn(count, 3, 16, 16, generator=drawn) for _ in range(2))
    return Batch(views, torch.arange(100, 100 + count), seed=7)


class Given(nn.Module):
    """Stands for the expander: gives these embeddings, of the first view and of the second."""

    def __init__(self, *embeddings: torch.Tensor) -> None:
        super().__init__()
        self.views = torch.stack(embeddings)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        assert len(features) == 2
        return self.views


def embeddings(count: int, width: int, spread: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views' embeddings, some of whose dimensions deviate by less than 1 and some by more, and which repeat others."""
    drawn = torch.Generator().manual_seed(count)
    first = torch.randn(count, width, generator=drawn) * torch.linspace(0.2, 2, width) + 3
    first[:, 0] = 0.5 * first[:, 1]
    second = first + spread * torch.randn(count, width, generator=drawn)
    return first.requires_grad_(), second.requires_grad_()


@pytest.mark.parametrize(("count", "width"), [(5, 12), (40, 12), (12, 12), (2, 7), (13, 12)])
def test_loss_and_gradients_are_lightlys(count: int, width: int) -> None:
    objective, pair = make(invariance=3.0, variance=5.0, covariance=2.0), embeddings(count, width)
    objective.expander = Given(*pair)  # type: ignore[assignment]
    loss = objective(make_batch(count)).total
    expected = VICRegLoss(lambda_param=3.0, mu_param=5.0, nu_param=2.0)(*pair)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, pair), torch.autograd.grad(expected, pair), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(("count", "width"), [(3, 6), (30, 6)])
def test_each_term_is_a_slow_loop(count: int, width: int) -> None:
    pair = embeddings(count, width)
    terms = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0}
    a, b = (view.detach().double().numpy() for view in pair)
    for image in range(count):
        for dimension in range(width):
            terms["invariance"] += (a[image, dimension] - b[image, dimension]) ** 2 / (count * width)
    for z in (a, b):
        for i in range(width):
            for j in range(width):
                product = sum((z[n, i] - z[:, i].mean()) * (z[n, j] - z[:, j].mean()) for n in range(count))
                if i == j:
                    terms["variance"] += max(0.0, 1 - np.sqrt(product / (count - 1) + 1e-4)) / width / 2
                else:
                    terms["covariance"] += (product / (count - 1)) ** 2 / width
    weights = {"invariance": 3.0, "variance": 5.0, "covariance": 2.0}
    objective = make(**weights)
    objective.expander = Given(*pair)  # type: ignore[assignment]
    result = objective(make_batch(count))
    assert result.terms.keys() == terms.keys()
    for name, term in terms.items():
        assert term > 0.01
        assert result.terms[name].item() == pytest.approx(term, rel=1e-5), name
        assert not result.terms[name].requires_grad
    assert result.total.item() == pytest.approx(sum(weights[name] * terms[name] for name in terms), rel=1e-5)
    watched, longer = result.watched["embedding"], torch.full((len(pair[0]), 1), pair[0].shape[1] ** 0.5)
    assert torch.equal(watched, torch.cat([pair[0], longer], 1))
    assert not result.watched["embedding"].requires_grad


@pytest.mark.parametrize("name", ["invariance", "variance", "covariance"])
def test_each_weight_belongs_to_its_term(name: str) -> None:
    weights = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0, name: 7.0}
    result = make(**weights)(make_batch())
    assert result.total.item() == pytest.approx(7 * result.terms[name].item())


def test_the_papers_weights() -> None:
    config = VICRegConfig()
    assert (config.invariance, config.variance, config.covariance) == (25.0, 25.0, 1.0)
    assert config.expander_layers == 3


@pytest.mark.parametrize(("count", "width"), [(2, 1_000_000), (1_000_000, 2)])
def test_covariance_needs_no_more_than_the_smaller_square(count: int, width: int) -> None:
    """The larger one would take 4 TB."""
    assert spread(torch.ones(1, 1).expand(count, width))[1].item() == 0


@pytest.mark.parametrize(("count", "width"), [(6, 20), (20, 6), (8, 8)])
def test_gradients_are_those_of_the_literal_formula(count: int, width: int) -> None:
    first = embeddings(count, width)[0].detach().double().requires_grad_()
    weights = torch.tensor([0.7, 1.3], dtype=torch.float64)
    centred = first - first.mean(0)
    products = centred.T @ centred / (count - 1)
    off = products[~torch.eye(width, dtype=torch.bool)]
    expected = (1 - (first.var(0) + 1e-4).sqrt()).clamp(min=0).mean(), off.square().sum() / width
    (gradient,) = torch.autograd.grad(weights @ torch.stack(expected), first)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        z = first.detach().to(dtype).requires_grad_()
        found = torch.stack(spread(z))
        (ours,) = torch.autograd.grad(weights.to(dtype) @ found, z)
        assert torch.allclose(found.double(), torch.stack(expected), rtol=close)
        assert (ours.double() - gradient).norm() < close * gradient.norm()
    assert 0 < (first.var(0) < 1).sum() < width  # the hinge has both its sides


def test_dead_dimensions_have_a_finite_gradient() -> None:
    z = torch.full((4, 3), 2.0, requires_grad=True)
    variance, covariance = spread(z)
    (variance + covariance).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert variance.item() == pytest.approx(1 - 1e-2)


def test_mixed_precision_does_not_reach_the_sums() -> None:
    first, second = embeddings(40, 12)
    objective = make()
    plain, mixed = [], []
    for results, enabled in ((plain, False), (mixed, True)):
        objective.expander = Given(first, second)  # type: ignore[assignment]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(objective(make_batch(40)).total)
    assert mixed[0].dtype == torch.float32
    assert mixed[0].item() == pytest.approx(plain[0].item(), rel=1e-6)
    halves = first.bfloat16(), second.bfloat16()
    objective.expander = Given(*halves)  # type: ignore[assignment]
    found = objective(make_batch(40)).total
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(VICRegLoss()(halves[0].float(), halves[1].float()).item(), rel=1e-5)


def test_the_expander() -> None:
    layers = [type(layer) for layer in make().expander]
    assert layers == [nn.Linear, GlobalBatchNorm, nn.ReLU, nn.Linear, GlobalBatchNorm, nn.ReLU, nn.Linear]
    expander = make({"pool": "cls+mean"}, expander_width=10).expander
    linear = [layer for layer in expander if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(48, 10), (10, 10), (10, 10)]
    assert linear[-1].bias is None
    assert [type(layer) for layer in make(expander_layers=1).expander] == [nn.Linear]
    theirs = nn.Sequential(
        linear[0], nn.BatchNorm1d(10), nn.ReLU(), linear[1], nn.BatchNorm1d(10), nn.ReLU(), linear[2]
    )
    x = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(expander(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_both_views_are_embedded_in_full(pool: str) -> None:
    objective, batch = make({"pool": pool}), make_batch()
    result = objective(batch)
    pair = [objective.expander(pool_tokens(objective.encoder(view), pool)) for view in batch.views]
    expected = VICRegLoss()(*pair)
    assert result.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(result.watched["embedding"][:, :-1], pair[0], atol=1e-6)
    result.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("pool", ["mean", "head"])
def test_each_view_has_its_own_drop_paths_and_each_image_too(pool: str) -> None:
    objective = make({"drop_path": 0.9, "depth": 4, "pool": pool})
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(6, -1, -1, -1)
    positions = torch.arange(6)
    first, second = (objective.feature(Batch((image, image.clone()), positions, 7), view) for view in (0, 1))
    assert torch.equal(first, objective.feature(Batch((image, image.clone()), positions, 7), 0))
    assert len(first.detach().unique(dim=0)) > 1
    batch = Batch((image, image.clone()), positions, 7)
    first, second = objective.feature(batch, 0), objective.feature(batch, 1)
    assert not torch.allclose(first, second)


def test_views_of_the_recipe() -> None:
    one, other = View(flip=0.1), View(shift=5, flip=0.2)
    assert make(view=one).views == (one, one)
    assert make(view=one, second_view=other).views == (one, other)
    assert make().views[0].jitter > 0


def test_one_image_is_refused() -> None:
    objective = make()
    with pytest.raises(UsageError, match="one image has no variance; it needs a batch of two"):
        objective(make_batch(1))
    with pytest.raises(UsageError, match=r"train.batch_size: vicreg compares images.*needs two at least"):
        objective.check(Setting(1, "x", 0))


def test_few_images_are_a_warning() -> None:
    objective = make()
    for images in (2, 127):
        (line,) = objective.check(Setting(images, "x", 0))
        assert f"of {images} images, fewer than 128" in line
        assert "train.accumulate does not enlarge it" in line
    assert objective.check(Setting(128, "x", 0)) == []


def test_it_learns() -> None:
    """Embeddings of one batch become invariant without collapse: every term falls."""
    objective, batch = make({"pool": "cls"}, expander_width=8), make_batch(16)
    views = batch.views[0], batch.views[0] + 0.1 * batch.views[1]
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    first = objective(Batch(views, batch.positions, 7))
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective(Batch(views, batch.positions, 7))
        loss.total.backward()
        optimizer.step()
    assert loss.total < 0.4 * first.total
    assert loss.terms["variance"] < 0.5 * first.terms["variance"]


# -- moments of clips


def clips(objective: VICReg, count: int = 6, first: int = 100) -> Batch:
    drawn = torch.Generator().manual_seed(first)
    views = tuple(torch.randn(count, 3, 16, 16, generator=drawn) for _ in objective.views)
    return Batch(views, torch.arange(first, first + count), seed=7)


def test_half_of_the_triples_have_neighbours_swapped() -> None:
    orders, labels = triples(torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)))
    found = Counter(zip(map(tuple, orders.tolist()), labels.tolist(), strict=True))
    assert found.keys() == {((0, 1, 2), 1), ((1, 0, 2), 0), ((0, 2, 1), 0)}  # never reversed
    for (_, label), count in found.items():
        expected = 2000 if label else 1000
        assert abs(count - expected) < 4 * expected**0.5


def test_order_verification_is_a_slow_loop() -> None:
    objective = make(order=3.0)
    batch = clips(objective)
    result = objective(batch)
    draws, features = batch.uniform("order", 2), [objective.feature(batch, view).detach() for view in range(3)]
    weight, bias = (p.detach().double() for p in objective.in_order.parameters())
    losses, right = [], []
    for clip, (shuffled, which) in enumerate(draws.tolist()):
        order = [0, 1, 2] if shuffled < 0.5 else [1, 0, 2] if which < 0.5 else [0, 2, 1]
        logits = weight @ torch.cat([features[moment][clip] for moment in order]).double() + bias
        label = int(order == [0, 1, 2])
        losses.append(-(logits[label] - logits.exp().sum().log()).item())
        right.append(bool(logits.argmax() == label))
    assert len(set(right)) == 2
    assert result.terms["order"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.terms["order_accuracy"].item() == pytest.approx(np.mean(right))
    assert result.terms["order/floor"].item() == pytest.approx(np.log(2))
    assert not any(term.requires_grad for term in result.terms.values())
    plain = make()
    plain.load_state_dict(objective.state_dict(), strict=False)
    rest = plain(Batch(batch.views[:2], batch.positions, batch.seed)).total.item()
    assert result.total.item() == pytest.approx(rest + 3 * np.mean(losses), rel=1e-5)
    assert {"order", "order_accuracy"}.isdisjoint(plain(batch).terms)
    result.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.in_order.parameters())


def test_three_views_show_three_moments() -> None:
    one, other = View(flip=0.1), View(blur=0.3)
    views = make(view=one, second_view=other, order=1.0).views
    assert [view.moment for view in views] == [0, 1, 2]
    assert [view.model_copy(update={"moment": None}) for view in views] == [one, other, one]
    assert "in_order.weight" not in make().state_dict()


def test_order_in_mixed_precision() -> None:
    objective = make(order=1.0)
    plain = objective(clips(objective)).terms["order"].item()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = objective(clips(objective)).terms["order"]
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(plain, rel=0.05)


def test_order_needs_clips() -> None:
    objective = make(order=1.0)
    with pytest.raises(UsageError, match=r"objective.order: .* moments of clips, and a sample here has no more frames"):
        objective.check(Setting(256, "x", 0, clips=False))
    assert objective.check(Setting(256, "x", 0, clips=True)) == objective.check(Setting(256, "x", 0)) == []
    assert make().check(Setting(256, "x", 0, clips=False)) == []


def moving_squares(count: int, first: int) -> Batch:
    """Three moments of a bright square that moves to the right over black, in 8 x 8 pixels."""
    drawn = torch.Generator().manual_seed(first)
    rows, starts = torch.randint(0, 6, (2, count), generator=drawn)
    views = torch.zeros(3, count, 1, 8, 8)
    for clip in range(count):
        for moment in range(3):
            column = int(starts[clip]) % 3 + 2 * moment - (moment == 2)
            views[moment, clip, 0, rows[clip] : rows[clip] + 3, column : column + 3] = 1.0
    return Batch(tuple(views), torch.arange(first, first + count), seed=7)


def test_the_order_of_moving_squares_is_learned() -> None:
    weights = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0, "order": 1.0}
    objective = make({"image_size": 8, "channels": 1, "depth": 1}, expander_layers=1, **weights).train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    for step in range(80):
        loss = objective(moving_squares(32, 32 * step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    tested = objective(moving_squares(256, 10**6)).terms
    assert tested["order_accuracy"] > 0.9
    assert tested["order"] < 0.5 * tested["order/floor"]
