"""DINO against lightly's losses with the same outputs, and against slow loops over views, images, patches and tensors.

Mutations that these tests caught when they were tried: the student as its own teacher, targets of the views swapped, the
head of the wrong branch, a term with another's weight or none, a temperature dropped or multiplied, the centre added, left
out, of the other row, moved by the wrong share, by the sum or by the last micro-batch, in evaluation, never cleared or not
saved; pairs of the same view kept, the mean over all pairs; masks inverted, drawn alike for both views, off by one at either
end, with the probability turned round; the patch loss over masked images only, over all patches alike, or detached; local
views mixed up between images, drawn alike; prototypes frozen for one step more, without a gradient or never; a bottleneck
without its length; Sinkhorn with a round less, without one of its divisions; KoLeo of the farthest, of itself, with the other
sign, detached, of one view twice; the teacher's heads forgotten, its decay constant, off by one step or turned round; student
and teacher swapped in the average; a norm after its activation, a bias under a norm.
"""

import copy
from functools import cache
from math import cos, exp, log, pi, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight import keyed
from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective, parse_objective
from selfsight.objectives.base import mlp
from selfsight.objectives.configs import DINOConfig
from selfsight.objectives.dino import DINO, Head, cross_view_entropy, entropy, koleo, sinkhorn
from selfsight.recipe import DataConfig, EncoderConfig

ENCODER: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}
OPTIONS: dict[str, Any] = {
    "outputs": 12, "head_width": 16, "bottleneck": 8, "local_views": 2, "local_view": {"size": 8}, "freeze_prototypes": 0.0,
    "teacher_warmup": 0.5, "teacher_temperature": (0.04, 0.07),
}  # fmt: skip


@cache
def build(config: EncoderConfig, seed: int) -> Encoder:
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed)


def make(encoder: dict[str, Any] | None = None, seed: int = 0, **fields: Any) -> DINO:
    """A student and a teacher that differ, without biases and tokens of zero, which would hide mistakes."""
    objective = fresh(encoder, seed, **fields)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "pos_embed" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return objective


def fresh(encoder: dict[str, Any] | None = None, seed: int = 0, **fields: Any) -> DINO:
    built = copy.deepcopy(build(EncoderConfig(**(ENCODER | (encoder or {}))), seed))
    torch.manual_seed(seed)
    objective = build_objective(DINOConfig(**(OPTIONS | fields)), built)
    assert isinstance(objective, DINO)
    return objective


def make_batch(count: int = 4, views: int = 2, start: int = 100, progress: float = 0.25, seed: int = 3) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    sizes = [16, 16] + [8] * views
    made = tuple(torch.randn(count, 3, size, size, generator=draw) for size in sizes)
    return Batch(made, torch.arange(start, start + count), seed=7, progress=progress)


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(tuple(view[rows] for view in batch.views), batch.positions[rows], batch.seed, progress=batch.progress)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def cross_entropy(target: np.ndarray, logits: np.ndarray) -> float:
    top = logits.max()
    return float(-(target * (logits - top - log(np.exp(logits - top).sum()))).sum())


def global_tokens(objective: DINO, batch: Batch, number: int) -> tuple[Any, Any, Tensor]:
    """The teacher's tokens of a whole view, the student's of a masked one (if there is iBOT), and the mask."""
    view = batch.views[number]
    if not objective.config.ibot:
        return objective.teacher(view), objective.encoder(view), torch.zeros(len(view), 16, dtype=torch.bool)
    mask = objective.mask(batch, number)
    return objective.teacher(view), objective.encoder(view, mask=mask, mask_token=objective.mask_token), mask


@torch.no_grad()
def slow(objective: DINO, batch: Batch, temperature: float) -> dict[str, Any]:
    """Every term, one image, view, patch and prototype at a time, in float64."""
    heat, images = objective.config.student_temperature, len(batch.positions)
    seen = [global_tokens(objective, batch, number) for number in range(2)]
    taught = [objective.teacher_head(own[0].patches.mean(1)).double().numpy() for own in seen]
    features = [own[1].patches.mean(1) for own in seen]
    features += [objective.encoder(view, any_size=True).patches.mean(1) for view in batch.views[2:]]
    learned = [objective.head(feature).double().numpy() for feature in features]
    center = objective.center.double().numpy()
    losses, targets, patch_losses, patch_outputs = [], [], [], []
    for image in range(images):
        for first in range(2):
            target = softmax((taught[first][image] - center[0]) / temperature)
            targets.append(target)
            for second in range(len(learned)):
                if second != first:
                    losses.append(cross_entropy(target, learned[second][image] / heat))
    found: dict[str, Any] = {"dino": np.mean(losses), "mean": np.mean(np.concatenate(taught), axis=0)}
    found["entropy"] = np.mean([-sum(p * log(p) for p in target if p > 0) for target in targets])
    found["mean entropy"] = -sum(p * log(p) for p in np.mean(targets, axis=0))
    if objective.config.ibot:
        for teacher, student, mask in seen:
            for image in range(images):
                own = []
                for patch in range(16):
                    if mask[image, patch]:
                        output = objective.teacher_patch_head(teacher.patches[image, patch]).double().numpy()
                        logits = objective.patch_head(student.patches[image, patch]).double().numpy()
                        own.append(cross_entropy(softmax((output - center[1]) / temperature), logits / heat))
                        patch_outputs.append(output)
                patch_losses.append(np.mean(own) if own else 0.0)
        found |= {"ibot": np.mean(patch_losses), "patch mean": np.mean(patch_outputs, axis=0)}
    if objective.config.koleo:
        found["koleo"] = sum(slow_koleo(feature.double().numpy()) for feature in features[:2])
    return found


def slow_koleo(features: np.ndarray) -> float:
    unit = [feature / sqrt((feature**2).sum()) for feature in features]
    nearest = [
        min(sqrt(((unit[i] - unit[j]) ** 2).sum()) for j in range(len(unit)) if i != j) for i in range(len(unit))
    ]
    return float(-np.mean(np.log(nearest)))


def move(objective: DINO) -> None:
    """A student's step, of any kind."""
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("views", [0, 1, 3])
def test_loss_gradients_and_center_are_lightlys_over_several_steps(views: int) -> None:
    objective = make(local_views=views, center_momentum=0.8, student_temperature=0.13)
    theirs = DINOLoss(output_dim=12, student_temp=0.13, center_momentum=0.8)
    kept: dict[str, list[Tensor]] = {"taught": [], "learned": []}
    objective.teacher_head.register_forward_hook(lambda module, given, out: kept["taught"].append(out))
    objective.head.register_forward_hook(lambda module, given, out: (kept["learned"].append(out), out.retain_grad())[0])
    for step, temperature in enumerate((0.04, 0.049, 0.058, 0.067, 0.07)):
        batch = make_batch(views=views, progress=0.15 * step, seed=step)
        kept["taught"], kept["learned"] = [], []
        loss = objective(batch).total
        loss.backward()
        (taught,), (learned,) = kept["taught"], kept["learned"]
        mine = (0.13 * learned.detach()).requires_grad_()  # the head has divided by the temperature
        assert (len(taught), len(mine)) == (2, 2 + views)
        expected = theirs(list(taught), list(mine), teacher_temp=temperature)
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        assert learned.grad is not None and mine.grad is not None
        assert learned.grad.abs().amax((1, 2)).min() > 1e-5
        assert torch.allclose(learned.grad, 0.13 * mine.grad, atol=1e-7)
        before = objective.center.clone()
        objective.after_step(step + 1, 5)
        assert torch.allclose(objective.center[0], theirs.center[0, 0], atol=1e-6)
        assert not torch.allclose(objective.center, before, atol=1e-4)
        move(objective)


def test_gradients_of_the_cross_entropy_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    for count in (1, 2, 5):
        targets, logits = (
            torch.rand(2, 3, 7),
            (5 * torch.randn(count, 3, 7)).requires_grad_(),
        )  # not quite distributions
        pairs = [(t, s) for t in range(2) for s in range(count) if s != t]
        expected = -sum((targets[t] * logits[s].log_softmax(-1)).sum() for t, s in pairs) / (3 * len(pairs))
        found = cross_view_entropy(targets, logits)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        ours, theirs = (torch.autograd.grad(3 * value, logits)[0] for value in (found, expected))
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("extra", [{}, {"ibot": 0.7, "koleo": 0.2}, {"ibot": 1.3, "mask_probability": 1.0}])
def test_the_loss_is_a_slow_loop(views: int, extra: dict[str, Any]) -> None:
    objective, batch = make(local_views=views, **extra), make_batch(6, views)
    objective.center.copy_(0.1 * torch.randn(objective.center.shape))
    found, expected = objective(batch), slow(objective, batch, 0.055)
    terms = {name: term.item() for name, term in found.terms.items()}
    assert set(terms) == {"dino", "teacher_entropy", "teacher_mean_entropy", *extra} - {"mask_probability"}
    assert terms["teacher_entropy"] == pytest.approx(expected["entropy"], rel=1e-4)
    assert terms["teacher_mean_entropy"] == pytest.approx(expected["mean entropy"], rel=1e-4)
    for name in {"dino", "ibot", "koleo"} & set(terms):
        assert terms[name] == pytest.approx(expected[name], rel=1e-4), name
    weighted = expected["dino"] + sum(extra[name] * expected[name] for name in ("ibot", "koleo") if name in extra)
    assert found.total.item() == pytest.approx(weighted, rel=1e-4)
    assert not any(term.requires_grad for term in found.terms.values())
    before = objective.center.clone()
    objective.after_step(1, 10)
    for row, name in enumerate(["mean", *(["patch mean"] if extra else [])]):
        moved = 0.9 * before[row].double() + 0.1 * torch.from_numpy(expected[name])
        assert torch.allclose(objective.center[row].double(), moved, atol=1e-6), name


def test_the_patch_loss_and_its_center_are_lightlys() -> None:
    objective = make(local_views=0, ibot=1.0, mask_probability=0.6, center_momentum=0.7, teacher_warmup=0.0)
    theirs = IBOTPatchLoss(output_dim=12, teacher_temp=0.07, student_temp=0.1, center_momentum=0.7)
    for step in range(3):
        batch = make_batch(8, 0, seed=step, start=50 * step)
        seen = [global_tokens(objective, batch, number) for number in range(2)]
        mask = torch.cat([own[2] for own in seen])
        assert 0 < mask.any(1).sum() < 16
        taught = objective.teacher_patch_head(torch.cat([own[0].patches for own in seen])[mask])
        learned = objective.patch_head(torch.cat([own[1].patches for own in seen])[mask])
        expected = theirs(taught, learned, mask.view(16, 4, 4))
        assert objective(batch).terms["ibot"].item() == pytest.approx(expected.item(), abs=1e-5)
        objective.after_step(step + 1, 3)
        assert torch.allclose(objective.center[1], theirs.center.value[0], atol=1e-6)
        move(objective)


def test_pairs_of_the_same_view_are_left_out() -> None:
    targets, logits = torch.rand(2, 3, 5).softmax(-1), torch.randn(4, 3, 5)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 3)]
    losses = [cross_entropy(targets[t, i].numpy(), logits[s, i].numpy()) for t, s in pairs for i in range(3)]
    assert cross_view_entropy(targets, logits).item() == pytest.approx(np.mean(losses), rel=1e-5)
    sole = torch.autograd.functional.jacobian(lambda x: cross_view_entropy(targets[:1], x), logits)
    assert not sole[0].any()
    assert sole[1:].flatten(1).any(1).all()


def test_koleo_and_its_gradient_are_lightlys_and_a_slow_loop() -> None:
    features = torch.randn(9, 6, requires_grad=True)
    twin = features.detach().clone().requires_grad_()
    value, expected = koleo(features), KoLeoLoss()(twin)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert value.item() == pytest.approx(slow_koleo(twin.detach().double().numpy()), abs=1e-5)
    assert features.grad is not None and twin.grad is not None
    assert torch.allclose(features.grad, twin.grad, atol=1e-6)
    assert torch.isfinite(koleo(torch.ones(3, 4)))


@pytest.mark.parametrize(("rows", "prototypes", "temperature"), [(6, 4, 0.3), (3, 8, 0.1), (16, 16, 0.05)])
def test_sinkhorn_is_a_slow_loop(rows: int, prototypes: int, temperature: float) -> None:
    logits = torch.rand(rows, prototypes, generator=torch.Generator().manual_seed(rows)) * 2 - 1
    shares = [[exp(value / temperature) for value in row] for row in logits.double().tolist()]
    whole = sum(map(sum, shares))
    shares = [[value / whole for value in row] for row in shares]
    for _ in range(3):
        columns = [sum(row[k] for row in shares) for k in range(prototypes)]
        shares = [[row[k] / columns[k] / prototypes for k in range(prototypes)] for row in shares]
        shares = [[value / sum(row) / rows for value in row] for row in shares]
    expected = torch.tensor(shares, dtype=torch.float64) * rows
    assert torch.allclose(sinkhorn(logits, temperature).double(), expected, rtol=1e-4, atol=1e-7)


def test_sinkhorn_gives_distributions_that_use_all_prototypes_alike() -> None:
    logits = torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(8)[0]
    found = sinkhorn(logits, 1.0, rounds=30)
    assert torch.allclose(found.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(found.sum(0), torch.full((8,), 8.0), atol=1e-2)
    assert torch.allclose(sinkhorn(logits, 0.05).sum(1), torch.ones(64), atol=1e-5)
    assert sinkhorn(logits, 0.05).sum(0)[0] < 16  # softmax would give it all 64
    assert sinkhorn(torch.zeros(0, 8), 0.05).shape == (0, 8)


def test_sinkhorn_takes_the_place_of_the_center() -> None:
    objective, batch = make(balance="sinkhorn", ibot=1.0, mask_probability=1.0), make_batch(6)
    with torch.no_grad():
        outputs = [objective.teacher_head(objective.teacher(view).patches.mean(1)) for view in batch.views[:2]]
        found = objective(batch)
        balanced = sinkhorn(torch.cat(outputs), 0.055)  # both views together, as in DINOv2
        assert torch.allclose(found.watched["teacher"], balanced[:6], atol=1e-6)
        features = [objective.encoder(v, mask=objective.mask(batch, i), mask_token=objective.mask_token)
                    for i, v in enumerate(batch.views[:2])]  # fmt: skip
        pooled = [tokens.patches.mean(1) for tokens in features]
        pooled += [objective.encoder(view, any_size=True).patches.mean(1) for view in batch.views[2:]]
        logits = torch.stack([objective.head(feature) / 0.1 for feature in pooled])
        expected = cross_view_entropy(torch.stack([balanced[:6], balanced[6:]]), logits)
    assert found.terms["dino"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.terms["ibot"].isfinite() and found.terms["ibot"] > 0
    objective.after_step(1, 10)
    assert not objective.center.any()


def test_entropy_is_in_nats() -> None:
    assert entropy(torch.tensor([0.25, 0.25, 0.5, 0.0])).item() == pytest.approx(1.5 * log(2))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("layers", "norm"), [(1, False), (3, False), (3, True)])
def test_the_head_is_its_formula(normalize: bool, layers: int, norm: bool) -> None:
    options = {"head_width": 9, "bottleneck": 5, "head_layers": layers, "head_norm": norm}
    head = Head(10, DINOConfig(outputs=7, normalize_prototypes=normalize, **options))
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    linears = [module for module in head.mlp if isinstance(module, nn.Linear)]
    assert [(own.in_features, own.out_features) for own in linears] == (
        [(10, 5)] if layers == 1 else [(10, 9), (9, 9), (9, 5)]
    )
    x = torch.randn(4, 10)
    y = x.double().detach().numpy()
    for number, linear in enumerate(linears):
        if number:
            if norm:
                batch_norm = head.mlp[3 * number - 2]
                y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5)
                y = y * batch_norm.weight.detach().double().numpy() + batch_norm.bias.detach().double().numpy()
            y = 0.5 * y * (1 + torch.erf(torch.from_numpy(y) / sqrt(2)).numpy())
        y = y @ linear.weight.detach().double().numpy().T
        y += 0 if norm else linear.bias.detach().double().numpy()
    y /= np.sqrt((y**2).sum(1, keepdims=True))
    prototypes = head.prototypes.detach().double().numpy()
    if normalize:
        prototypes = prototypes / np.sqrt((prototypes**2).sum(1, keepdims=True))
    assert np.allclose(head(x).detach().numpy(), y @ prototypes.T, atol=1e-5)


def test_mlp_puts_norm_and_activation_between_layers_only() -> None:
    assert [type(module) for module in mlp([4, 6, 6, 2], nn.BatchNorm1d, nn.ReLU)] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear,
    ]  # fmt: skip
    assert [type(module) for module in mlp([4, 6, 2])] == [nn.Linear, nn.GELU, nn.Linear]
    normed = mlp([4, 6, 2], nn.BatchNorm1d)
    assert normed[0].bias is None and normed[3].bias is None
    assert mlp([4, 6, 2])[0].bias is not None and mlp([4, 6, 2])[2].bias is not None
    assert normed[1].num_features == 6


def test_frozen_prototypes_get_a_gradient_of_zero_and_the_rest_learns() -> None:
    for progress, frozen in ((0.0, True), (0.0999, True), (0.1, False), (0.5, False)):
        objective = make(ibot=1.0, mask_probability=1.0, freeze_prototypes=0.1)
        objective(make_batch(progress=progress)).total.backward()
        for head in (objective.head, objective.patch_head):
            assert head.prototypes.grad is not None
            assert head.prototypes.grad.any() != frozen
            assert all(p.grad is not None and p.grad.any() for p in head.mlp.parameters())


def test_freezing_prototypes_does_not_change_the_loss() -> None:
    losses = [make(freeze_prototypes=share)(make_batch()).total.item() for share in (0.0, 1.0)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    ("warmup", "progress", "expected"),
    [(0.5, 0.0, 0.02), (0.5, 0.25, 0.05), (0.5, 0.4, 0.068), (0.5, 0.5, 0.08), (0.5, 0.9, 0.08), (0.0, 0.0, 0.08), (1.0, 0.5, 0.05)],
)  # fmt: skip
def test_the_teachers_temperature_rises_linearly_and_stays(warmup: float, progress: float, expected: float) -> None:
    objective = fresh(teacher_temperature=(0.02, 0.08), teacher_warmup=warmup)
    assert objective.teacher_temperature(progress) == pytest.approx(expected)


@pytest.mark.parametrize("step", [1, 3, 8])
def test_teacher_and_its_heads_move_by_the_average_of_a_slow_loop(step: int) -> None:
    objective = make(ibot=1.0, momentum=0.6)
    pairs = [
        (objective.teacher, objective.encoder),
        (objective.teacher_head, objective.head),
        (objective.teacher_patch_head, objective.patch_head),
    ]
    before = [{name: tensor.clone() for name, tensor in average.state_dict().items()} for average, _ in pairs]
    student = [{name: tensor.clone() for name, tensor in live.state_dict().items()} for _, live in pairs]
    objective.after_step(step, 8)
    decay = 1 - (1 - 0.6) * (cos(pi * (step - 1) / 8) + 1) / 2
    assert step > 1 or decay == pytest.approx(0.6)
    for (average, live), old, own in zip(pairs, before, student, strict=True):
        for name, tensor in average.state_dict().items():
            expected = decay * old[name].double() + (1 - decay) * own[name].double()
            assert torch.allclose(tensor.double(), expected, atol=1e-6), name
            assert torch.equal(live.state_dict()[name], own[name]), name
    names = [name for name, value in before[0].items() if not torch.equal(value, student[0][name])]
    assert len(names) > 10  # teacher and student did differ


def test_the_teacher_starts_as_the_student_never_trains_and_is_what_is_scored() -> None:
    objective = fresh({"drop_path": 0.3}, ibot=1.0)
    averages = [objective.teacher, objective.teacher_head, objective.teacher_patch_head]
    live = [objective.encoder, objective.head, objective.patch_head]
    for average, student in zip(averages, live, strict=True):
        assert average is not student
        assert average.state_dict().keys() == student.state_dict().keys()
        assert all(torch.equal(value, student.state_dict()[name]) for name, value in average.state_dict().items())
        assert not any(parameter.requires_grad for parameter in average.parameters())
    assert objective.train() is objective
    assert not any(module.training for average in averages for module in average.modules())
    assert all(module.training for student in live for module in student.modules())
    assert not objective.eval().training
    assert not any(module.training for module in objective.modules())
    assert objective.scored is objective.teacher
    objective.train()(make_batch()).total.backward()
    assert all(parameter.grad is None for average in averages for parameter in average.parameters())


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_features_are_those_of_the_pool(pool: str) -> None:
    objective, batch = make({"pool": pool}), make_batch()
    loss = objective(batch)
    assert torch.allclose(loss.watched["feature"], objective.encoder.embed(batch.views[0]), atol=1e-5)
    outputs = objective.teacher_head(objective.teacher.embed(batch.views[0])).detach()
    assert torch.allclose(loss.watched["teacher"], (outputs / 0.055).softmax(-1), atol=1e-5)
    assert not any(vectors.requires_grad for vectors in loss.watched.values())


def test_local_views_go_through_the_student_only() -> None:
    objective, batch = make(local_views=3), make_batch(5, 3)
    seen: dict[str, list[tuple[int, ...]]] = {"teacher": [], "encoder": []}
    objective.teacher.register_forward_pre_hook(lambda module, given: seen["teacher"].append(given[0].shape))
    objective.encoder.register_forward_pre_hook(lambda module, given: seen["encoder"].append(given[0].shape))
    objective(batch)
    assert seen["teacher"] == [(10, 3, 16, 16)]
    images = {size: sum(shape[0] for shape in seen["encoder"] if shape[-1] == size) for size in (16, 8)}
    assert images == {16: 10, 8: 15}
    assert len(seen["encoder"]) == 2
    assert [view.size for view in objective.views] == [None, None, 8, 8, 8]
    config = DINOConfig(**(OPTIONS | {"local_views": 3}))
    assert objective.views == (config.view, config.second_view, *[config.local_view] * 3)
    before = objective.center.clone()
    objective.after_step(1, 2)
    again = make(local_views=0)
    again(Batch(batch.views[:2], batch.positions, batch.seed, progress=batch.progress))
    again.after_step(1, 2)
    assert torch.allclose(objective.center, again.center, atol=1e-6)
    assert not torch.allclose(objective.center, before)


def test_two_micro_batches_are_one_batch() -> None:
    whole, halves, batch = make({"drop_path": 0.5}, ibot=1.0), make({"drop_path": 0.5}, ibot=1.0), make_batch(12)
    loss = whole(batch)
    parts = [halves(part(batch, rows)) for rows in (slice(0, 6), slice(6, 12))]
    assert not halves.center.any()  # it moves after the step
    for name in ("dino", "ibot", "teacher_entropy"):
        mean = torch.stack([own.terms[name] for own in parts]).mean().item()
        assert loss.terms[name].item() == pytest.approx(mean, rel=1e-4), name
    for objective in (whole, halves):
        objective.after_step(1, 10)
    assert whole.center.any(1).all()
    assert torch.allclose(whole.center[0], halves.center[0], atol=1e-6)
    center = halves.center.clone()
    halves.after_step(2, 10)  # nothing was seen since
    assert torch.equal(halves.center, center)


def test_micro_batches_with_more_masked_patches_count_for_more_in_the_patches_center() -> None:
    whole, halves, batch = make(ibot=1.0), make(ibot=1.0), make_batch(12)
    whole(batch)
    counts = []
    for rows in (slice(0, 6), slice(6, 12)):
        counts.append(sum(int(halves.mask(part(batch, rows), number).sum()) for number in range(2)))
        halves(part(batch, rows))
    assert counts[0] != counts[1]
    for objective in (whole, halves):
        objective.after_step(1, 10)
    assert torch.allclose(whole.center[1], halves.center[1], atol=1e-6)


def test_a_step_without_masked_patches_leaves_their_center() -> None:
    objective = make(ibot=1.0, mask_probability=0.0)
    objective.center.fill_(0.5)
    objective(make_batch())
    objective.after_step(1, 10)
    assert not torch.allclose(objective.center[0], torch.tensor(0.5))
    assert torch.allclose(objective.center[1], torch.tensor(0.5))


def test_evaluation_does_not_move_the_center() -> None:
    objective = make().eval()
    objective(make_batch())
    objective.after_step(1, 10)
    assert not objective.center.any()


def test_masks_are_within_the_shares_and_follow_the_position() -> None:
    objective = fresh(ibot=1.0, mask_ratio=(0.25, 0.5), mask_probability=0.7)
    batch = Batch((torch.zeros(4000, 1, 1, 1),), torch.arange(4000), seed=0)
    masks = [objective.mask(batch, number) for number in range(2)]
    for mask in masks:
        counts = mask.sum(1)
        assert mask.shape == (4000, 16)
        assert mask.dtype == torch.bool
        assert set(counts.tolist()) == {0, 4, 5, 6, 7, 8}
        assert (counts > 0).double().mean().item() == pytest.approx(0.7, abs=0.03)
        assert counts[counts > 0].double().mean().item() == pytest.approx(6, abs=0.1)
        assert (mask[counts > 0].double().mean(0) - 6 / 16).abs().max() < 0.04
    assert not torch.equal(*masks)
    hit = [mask.any(1) for mask in masks]
    assert (hit[0] & hit[1]).double().mean().item() == pytest.approx(0.49, abs=0.04)  # views are drawn apart
    few = Batch((torch.zeros(3, 1, 1, 1),), torch.tensor([77, 5, 3999]), seed=0)
    assert torch.equal(objective.mask(few, 1), masks[1][[77, 5, 3999]])
    other = Batch((torch.zeros(4000, 1, 1, 1),), torch.arange(4000), seed=1)
    assert not torch.equal(objective.mask(other, 0), masks[0])


@pytest.mark.parametrize(("ratio", "count"), [((0.01, 0.01), 1), ((0.99, 0.99), 15)])
def test_masks_leave_one_patch_seen_and_one_masked(ratio: tuple[float, float], count: int) -> None:
    mask = fresh(ibot=1.0, mask_ratio=ratio, mask_probability=1.0).mask(make_batch(9), 0)
    assert mask.sum(1).tolist() == [count] * 9


@pytest.mark.parametrize("ibot", [0.0, 1.0])
def test_every_view_has_draws_of_its_own(ibot: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, purposes = keyed.uniform, []

    def uniform(seed: int, purpose: str, *others: Any) -> Any:
        purposes.append(purpose)
        return plain(seed, purpose, *others)

    monkeypatch.setattr(keyed, "uniform", uniform)
    make({"drop_path": 0.5}, ibot=ibot)(make_batch())
    assert len(purposes) == len(set(purposes)) == 4 + 4 * bool(ibot)


def test_the_patch_loss_teaches_masked_tokens_and_no_others() -> None:
    objective, batch = make(local_views=0, ibot=1.0), make_batch(6, 0)
    seen = [global_tokens(objective, batch, number) for number in range(2)]
    masks = [own[2] for own in seen]
    taught, learned = (torch.cat([own[which].patches for own in seen]) for which in (0, 1))
    loss = objective.patch_loss(taught, learned, torch.cat(masks), 0.05, False)
    for (_, tokens, _), mask in zip(seen, masks, strict=True):
        (gradient,) = torch.autograd.grad(loss, tokens.patches, retain_graph=True)
        assert torch.equal(gradient.any(-1), mask)
    assert objective.mask_token.grad is None
    loss.backward()
    assert objective.mask_token.grad is not None and objective.mask_token.grad.any()


def test_masked_pixels_reach_the_teacher_and_not_the_student() -> None:
    objective, batch = make(local_views=0, ibot=1.0, mask_probability=1.0), make_batch(3, 0)
    images = batch.views[0].requires_grad_()
    objective(batch).total.backward()
    assert images.grad is not None
    seen = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).abs().sum((1, 3, 4))
    assert torch.equal(seen == 0, objective.mask(batch, 0))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ibot": 1.0, "mask_probability": 1.0},
        {"koleo": 0.1},
        {"ibot": 1.0, "koleo": 0.1, "mask_probability": 1.0},
        {"balance": "sinkhorn", "ibot": 1.0, "mask_probability": 1.0},
    ],
)
def test_every_trained_parameter_gets_a_gradient(fields: dict[str, Any]) -> None:
    objective = make({"registers": 2, "positions": "learned"}, **fields)
    objective(make_batch()).total.backward()
    trained = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not grad.any()] == []
    assert not any(name.startswith("teacher") for name in trained)


@pytest.mark.parametrize(("balance", "norm"), [("centering", False), ("sinkhorn", False), ("centering", True)])
def test_every_trained_parameter_gets_a_gradient_though_no_patch_is_masked(balance: str, norm: bool) -> None:
    objective = make(ibot=1.0, koleo=0.1, mask_probability=0.0, balance=balance, head_norm=norm)
    loss = objective(make_batch())
    loss.total.backward()
    trained = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()] == []
    idle = {name for name, grad in trained.items() if grad is not None and not grad.any()}
    assert idle == {name for name in trained if name.startswith(("patch_head", "mask_token"))}
    assert loss.terms["ibot"] == 0
    objective.after_step(1, 10)
    assert objective.center.isfinite().all()


def test_a_step_that_the_device_left_out_changes_nothing() -> None:
    plain, taken, left_out = (make(ibot=1.0) for _ in range(3))
    before = {name: value.clone() for name, value in left_out.state_dict().items()}
    for objective, took in ((plain, None), (taken, torch.tensor(1.0)), (left_out, torch.tensor(0.0))):
        objective(make_batch())
        if objective is left_out:
            objective.seen = {which: (outputs * torch.nan, count) for which, (outputs, count) in objective.seen.items()}
        objective.took = took
        objective.after_step(2, 10)
        assert not objective.seen
    assert all(torch.equal(value, before[name]) for name, value in left_out.state_dict().items())
    assert plain.center.any(1).all()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in taken.state_dict().items())
    moved = [name for name, value in plain.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.partition(".")[0] for name in moved} == {"center", "teacher", "teacher_head", "teacher_patch_head"}


def test_a_checkpoint_holds_center_and_teacher() -> None:
    objective = make(ibot=1.0)
    for step in range(2):
        objective(make_batch(seed=step))
        objective.after_step(step + 1, 10)
    other = make(ibot=1.0, seed=5)
    assert other.load_state_dict({name: value.clone() for name, value in objective.state_dict().items()}, strict=True)
    assert other.center.any()
    assert torch.equal(other.center, objective.center)
    batch = make_batch(seed=9)
    assert torch.equal(other(batch).total, objective(batch).total)
    for own in (objective, other):
        own.after_step(3, 10)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in objective.state_dict().items())
    assert all(
        torch.equal(value, other.teacher.state_dict()[name]) for name, value in objective.scored.state_dict().items()
    )


@pytest.mark.parametrize(
    ("encoder", "fields", "message"),
    [
        ({}, {"local_view": {"size": 6}}, "local_view.size: 6 is not a multiple of the patch of 4"),
        ({"pool": "head"}, {"local_views": 0}, "dino with encoder.pool head"),
    ],
)
def test_impossible_settings_are_refused(encoder: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fresh(encoder, **fields)
    assert fresh(local_views=0, local_view={"size": 6}).views  # nobody asks for it


def test_backbones_of_another_kind_take_neither_local_views_nor_ibot() -> None:
    config = EncoderConfig(**(ENCODER | {"name": "vit_relpos_small_patch16_224"}))
    other = build(config, 0)
    for fields in ({"local_views": 1}, {"local_views": 0, "ibot": 1.0}):
        with pytest.raises(UsageError, match="for local views and ibot a vit_"):
            DINO(other, DINOConfig(**(OPTIONS | fields)))
    objective = DINO(other, DINOConfig(**(OPTIONS | {"local_views": 0})))
    assert objective.head.mlp[0].in_features == other.feature_width


def test_initial_heads_tell_vectors_apart_and_biases_are_zero() -> None:
    head = Head(24, DINOConfig(outputs=12, head_width=16, bottleneck=8))
    assert all(not own.bias.any() and own.weight.std() > 0.005 for own in head.mlp if isinstance(own, nn.Linear))
    out = head(F.normalize(torch.randn(50, 24), dim=-1))
    assert out.std(0).min() > 0.05


def test_the_loss_is_as_precise_as_its_logits_under_autocast() -> None:
    torch.manual_seed(1)
    targets, logits = torch.randn(2, 5, 64).softmax(-1), 10 * torch.randn(4, 5, 64)
    config = make(outputs=64).config
    head, features = Head(24, config), torch.randn(5, config.bottleneck)
    with torch.no_grad():
        alone = cross_view_entropy(targets, logits)
        head.mlp = torch.nn.Sequential()  # what comes before may be rounded
        plain = head(features)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(cross_view_entropy(targets, logits), alone)
            assert torch.equal(head(features), plain)
    assert plain.dtype == torch.float32


def test_global_views_of_two_sizes_are_encoded_one_by_one() -> None:
    """By a backbone that takes any; a ViT says which size it takes."""
    config = {"name": "dino", "outputs": 8, "head_width": 8, "bottleneck": 4, "local_views": 0, "ibot": 0.0}
    encoder = EncoderConfig(name="test_resnet", image_size=32, channels=1, positions="learned", init="timm")
    objective = build_objective(
        parse_objective(config), build_encoder(encoder, preprocessing_of(DataConfig(train="x"), encoder), 0)
    )
    views = tuple(torch.randn(4, 1, side, side, generator=torch.Generator().manual_seed(side)) for side in (32, 24))
    found = objective(Batch(views, torch.arange(4), 0))
    assert found.total.isfinite()
    # Views of other images than the first's: what is taught of it must not change with the second.
    other = objective(Batch((views[0], views[1].flip(0)), torch.arange(4), 0))
    assert torch.allclose(found.watched["teacher"], other.watched["teacher"], atol=1e-6)
    assert found.watched["teacher"].std(0).amax() > 1e-4
    small = EncoderConfig(name="vit_tiny_patch16_224", image_size=32, channels=1, patch=8, width=16, depth=1, heads=2)
    vit = build_objective(
        parse_objective(config), build_encoder(small, preprocessing_of(DataConfig(train="x"), small), 0)
    )
    with pytest.raises(UsageError, match="images of shape"):
        vit(Batch(views, torch.arange(4), 0))
