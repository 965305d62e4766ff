"""Distillation, live and stored, against slow float64 loops, PIL and timm.

Mutations that these tests caught when they were tried: cosine with the wrong sign or swapped with l2, l2 summed,
cosine where l2 was asked, similarities not normalised or in l1, T for T^2, the student or the teacher without
temperature, the rest spread over all classes or taken from kept ones too, probabilities above 1 not clamped,
resampling bicubic, not antialiased or transposed, weights dropped, a term's features detached, an always linear
projector, the classifier on another pool, the student's or the teacher's normalisation left out, pixels resized
bilinearly or not antialiased, grey for an RGB student, no check of the grid, a teacher that trains, drops, is stored,
stays behind or passes gradients on, the shipped folder before the person's own; stored rows in reverse, classes as
int16 or floats, one augmentation for all, every single key of `origin` left out, no comparison, no check of finite
values, no draft, a teacher that runs again.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import pictures
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight import checkpoint, cli
from selfsight.assemble import Parts, assemble
from selfsight.data.build import write_shards
from selfsight.data.decode import Form, decode
from selfsight.data.order import sample_ids
from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, Tokens, build_encoder, preprocessing_of
from selfsight.errors import NumericError, StorageError, UsageError
from selfsight.exports.export import export, seal
from selfsight.ledger import weights_hash
from selfsight.objectives import build_objective
from selfsight.objectives.configs import DistillConfig
from selfsight.objectives.distill import Distill, resample, soft_cross_entropy
from selfsight.objectives.teacher import StoredTeacher, Teacher, load_teacher, square, write_outputs
from selfsight.recipe import DataConfig, EncoderConfig, Recipe, load
from selfsight.teach import store_teacher

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}
SMALL: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 16, "depth": 1, "heads": 2}
GREY: dict[str, Any] = {"image_size": 8, "patch": 2, "width": 16, "depth": 1, "heads": 2, "channels": 1}
CPU = torch.device("cpu")
Fields = dict[str, Any]
Write = Callable[..., str]


def encode(fields: Fields, seed: int = 0, **data: Any) -> Encoder:
    """An encoder whose images give different features, as trained ones do."""
    config = EncoderConfig(**fields)
    made = build_encoder(config, preprocessing_of(DataConfig(train="x", **data), config), seed)
    generator = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Write]:
    """Exports an encoder to a new folder, without the check in another process that tests/test_export.py is about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)

        def write(fields: Fields, seed: int = 1, **data: Any) -> str:
            folder = tmp_path_factory.mktemp("teacher") / "encoder"
            export(encode(fields, seed, **data), folder, {})
            return str(folder)

        yield write


@pytest.fixture(scope="module")
def plain(written: Write) -> str:
    """A teacher of 16 dimensions on a grid of 4 x 4, with the preprocessing of the student."""
    return written(SMALL)


def make(teacher: str, student: Fields | None = None, **fields: Any) -> Distill:
    built = encode(TINY | (student or {}))
    torch.manual_seed(0)
    objective = build_objective(DistillConfig(teacher=teacher, **fields), built)
    assert isinstance(objective, Distill)
    return objective


def classifying(
    monkeypatch: pytest.MonkeyPatch, student: Fields | None = None, classes: int = 6, pool: str = "mean", **fields: Any
) -> tuple[Distill, Any]:
    """A student of a teacher that was built here, and the whole timm model that the teacher is."""
    fields = {"embedding": 0.0, "logits": 1.0} | fields
    encoder = encode(SMALL | {"pool": pool}, 1)
    torch.manual_seed(5)
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=classes,
        global_pool="avg" if pool == "mean" else "token", fc_norm=False,
    ).eval()  # fmt: skip
    model.load_state_dict(encoder.backbone.state_dict(), strict=False)
    nn.init.normal_(model.head.weight)
    made = lambda config, _: Teacher(encoder, config, model.head)  # noqa: E731
    monkeypatch.setattr("selfsight.objectives.distill.load_teacher", made)
    return make("built here", student, **fields), model


def make_batch(count: int = 4, channels: int = 3, size: int = 16, seed: int = 3) -> Batch:
    images = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return Batch((images,), torch.arange(100, 100 + count), seed=7)


def live(objective: Distill) -> Teacher:
    assert isinstance(objective.teacher, Teacher)
    return objective.teacher


def array(x: Tensor) -> Any:
    return x.detach().double().numpy()


def through(layer: nn.Module, vectors: Any) -> Any:
    """A linear layer, or none, in float64."""
    if isinstance(layer, nn.Identity):
        return vectors
    assert isinstance(layer, nn.Linear)
    return vectors @ array(layer.weight).T + array(layer.bias)


def slow_distance(ours: Any, theirs: Any, kind: str) -> float:
    """Mean over vectors, one after the other."""
    found = []
    for a, b in zip(ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1]), strict=True):
        if kind == "cosine":
            found.append(1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
        else:
            found.append(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)) / len(a))
    return float(np.mean(found))


def pil_resized(channel: Any, side: int, how: Image.Resampling) -> Any:
    """One channel (h, w), resized by Pillow, which is antialiased."""
    return np.asarray(Image.fromarray(np.asarray(channel, np.float32)).resize((side, side), how), np.float64)


# --- the distances ---


@pytest.mark.parametrize("kind", ["cosine", "l2"])
@pytest.mark.parametrize("student", [{}, {"width": 16}, {"pool": "cls"}, {"width": 8, "pool": "cls+mean"}])
def test_embeddings_are_a_slow_loop(plain: str, kind: str, student: Fields) -> None:
    objective, batch = make(plain, student, distance=kind), make_batch()
    same = objective.encoder.feature_width == 16
    assert isinstance(objective.project, nn.Identity if same else nn.Linear)
    with torch.no_grad():
        ours = array(objective.encoder.embed(batch.views[0]))
        theirs = array(live(objective).encoder.embed(batch.views[0]))
    loss = objective(batch)
    expected = slow_distance(through(objective.project, ours), theirs, kind)
    assert expected > 0.1
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert set(loss.terms) == {"embedding"}
    assert np.allclose(array(loss.watched["feature"]), ours, atol=1e-5)
    assert not loss.watched["feature"].requires_grad
    assert not loss.terms["embedding"].requires_grad


@pytest.mark.parametrize("kind", ["cosine", "l2"])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("width", [16, 24])
def test_patch_tokens_are_resampled_to_the_students_grid(written: Write, kind: str, patch: int, width: int) -> None:
    teacher = written(SMALL | {"patch": patch})
    objective, batch = make(teacher, {"width": width}, embedding=0.0, patches=1.0, distance=kind), make_batch(3)
    with torch.no_grad():
        ours = array(objective.encoder(batch.views[0]).patches)
        theirs = array(live(objective).encoder(batch.views[0]).patches)
    side = 16 // patch
    resized = np.empty((3, 16, 16))
    for image in range(3):
        for dimension in range(16):
            grid = theirs[image, :, dimension].reshape(side, side)
            resized[image, :, dimension] = pil_resized(grid, 4, Image.Resampling.BILINEAR).ravel()
    if side == 4:
        assert np.array_equal(resized, theirs.astype(np.float32))
    expected = slow_distance(through(objective.project_patches, ours), resized, kind)
    loss = objective(batch)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert set(loss.terms) == {"patches"}


@pytest.mark.parametrize(("old", "new"), [(2, 4), (3, 7), (8, 4), (7, 2)])
def test_resampling_keeps_rows_rows_and_columns_columns(old: int, new: int) -> None:
    """A map that holds its own coordinates, as shares of the side, still does."""
    places = (torch.arange(old) + 0.5) / old
    tokens = torch.stack([places.repeat_interleave(old), places.repeat(old), torch.ones(old * old)], 1)[None]
    rows, columns, ones = resample(tokens, new)[0].view(new, new, 3).unbind(2)
    assert torch.allclose(ones, torch.ones(new, new))
    assert torch.allclose(rows, rows[:, :1].expand(new, new), atol=1e-6)
    assert torch.allclose(columns, columns[:1].expand(new, new), atol=1e-6)
    assert (rows[1:, 0] > rows[:-1, 0]).all()
    assert (columns[0, 1:] > columns[0, :-1]).all()
    wanted = pil_resized(np.tile(places.numpy()[:, None], (1, old)), new, Image.Resampling.BILINEAR)
    assert np.allclose(array(rows), wanted, atol=1e-6)


def test_an_equal_grid_is_left_alone() -> None:
    tokens = torch.randn(2, 9, 5)
    assert torch.equal(resample(tokens, 3), tokens)


def test_similarities_are_a_slow_double_loop(plain: str) -> None:
    objective, batch = make(plain, embedding=0.0, similarity=1.0), make_batch(5)
    with torch.no_grad():
        ours = array(objective.encoder.embed(batch.views[0]))
        theirs = array(live(objective).encoder.embed(batch.views[0]))

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    errors = [(cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2 for i in range(5) for j in range(5)]
    loss = objective(batch)
    assert loss.total.item() == pytest.approx(np.mean(errors), rel=1e-4)
    assert np.mean(errors) > 1e-4
    assert set(loss.terms) == {"similarity"}
    assert [name for name, _ in objective.named_children()] == ["encoder"]  # widths may differ: nothing to project


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_class_probabilities_are_hintons(monkeypatch: pytest.MonkeyPatch, temperature: float, pool: str) -> None:
    objective, model = classifying(monkeypatch, pool=pool, temperature=temperature)
    batch = make_batch()
    with torch.no_grad():
        theirs = model(batch.views[0]).double() / temperature
        feature = array(objective.encoder.embed(batch.views[0]))
    ours = torch.from_numpy(through(objective.classify, feature)) / temperature
    entropy = -(theirs.softmax(1) * theirs.log_softmax(1)).sum(1).mean()
    divergence = F.kl_div(ours.log_softmax(1), theirs.softmax(1), reduction="batchmean")
    expected = temperature**2 * (divergence + entropy)
    assert divergence > 0.05
    loss = objective(batch)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(loss.terms) == {"logits"}


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_largest_probabilities_leave_the_rest_spread_evenly(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    objective, model = classifying(monkeypatch, top_k=top_k, temperature=2.0)
    batch = make_batch()
    with torch.no_grad():
        teacher = (model(batch.views[0]).double() / 2).softmax(1).tolist()
        student = through(objective.classify, array(objective.encoder.embed(batch.views[0]))) / 2
    losses = []
    for probabilities, logits in zip(teacher, student.tolist(), strict=True):
        kept = sorted(range(6), key=lambda i: -probabilities[i])[:top_k]
        rest = 1 - sum(probabilities[i] for i in kept)
        target = [probabilities[i] if i in kept else rest / (6 - top_k) for i in range(6)]
        normaliser = math.log(sum(math.exp(value) for value in logits))
        losses.append(-sum(t * (value - normaliser) for t, value in zip(target, logits, strict=True)))
    assert objective(batch).total.item() == pytest.approx(4 * np.mean(losses), rel=1e-5)


def test_rounded_probabilities_above_one_give_the_others_nothing() -> None:
    logits = torch.randn(1, 4)
    above = soft_cross_entropy(logits, torch.tensor([[0.75, 0.2505]]), torch.tensor([[2, 0]]), 1.0)
    logs = logits.double().log_softmax(1)[0]
    assert above.item() == pytest.approx(-(0.75 * logs[2] + 0.2505 * logs[0]).item(), rel=1e-5)


def test_the_total_is_the_weighted_sum_of_the_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"embedding": 0.5, "patches": 2.0, "similarity": 3.0, "logits": 0.25}
    objective, _ = classifying(monkeypatch, **weights)
    loss = objective(make_batch())
    assert set(loss.terms) == set(weights)
    assert loss.total.item() == pytest.approx(sum(w * loss.terms[name].item() for name, w in weights.items()), rel=1e-5)
    for name, value in loss.terms.items():
        alone, _ = classifying(monkeypatch, **dict.fromkeys(weights, 0.0) | {name: 1.0})
        state = {key: tensor for key, tensor in objective.state_dict().items() if key in alone.state_dict()}
        alone.load_state_dict(state)
        assert alone(make_batch()).total.item() == pytest.approx(value.item(), rel=1e-5)


def test_the_image_is_encoded_once_for_all_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, _ = classifying(monkeypatch, embedding=1.0, patches=1.0, similarity=1.0)
    calls: list[int] = []
    objective.encoder.register_forward_hook(lambda *_: calls.append(1))
    objective(make_batch())
    assert len(calls) == 1


def test_every_trained_parameter_gets_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, _ = classifying(
        monkeypatch, {"registers": 2, "pool": "cls+mean"}, embedding=1.0, patches=1.0, similarity=1.0
    )
    objective(make_batch()).total.backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert {name.partition(".")[0] for name in trained} == {"encoder", "project", "project_patches", "classify"}


@pytest.mark.parametrize("term", ["embedding", "patches", "similarity", "logits"])
def test_every_term_alone_trains_the_whole_encoder(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    objective, _ = classifying(monkeypatch, **{"logits": 0.0, term: 1.0})
    objective(make_batch()).total.backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []


def test_it_learns_one_batch(plain: str) -> None:
    objective = make(plain, patches=1.0, similarity=1.0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = objective(make_batch())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.2 * losses[0]


# --- what the teacher sees, and what it is ---


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (GREY, SMALL),
        (GREY, SMALL | {"channels": 1}),
        (TINY, SMALL),
        (TINY, SMALL | {"image_size": 8, "patch": 2}),
        (GREY, GREY),
    ],
)
def test_the_teacher_sees_the_students_pixels_in_its_own_way(written: Write, student: Fields, teacher: Fields) -> None:
    channels, size = student.get("channels", 3), student["image_size"]
    mean, std = (0.2, 0.5, 0.6)[: teacher.get("channels", 3)], (0.4, 0.3, 0.2)[: teacher.get("channels", 3)]
    encoder = encode(student, mean=(0.3, 0.4, 0.1)[:channels], std=(0.5, 0.2, 0.25)[:channels])
    config = DistillConfig(teacher=written(teacher, mean=mean, std=std), patches=1.0)
    objective = build_objective(config, encoder)
    assert isinstance(objective, Distill)
    pixels = np.random.default_rng(0).random((2, channels, size, size))
    shown = [
        [(pixels[i, c] - encoder.preprocessing.mean[c]) / encoder.preprocessing.std[c] for c in range(channels)]
        for i in range(2)
    ]
    batch = Batch((torch.tensor(np.array(shown), dtype=torch.float32),), torch.arange(2), 0)
    seen: list[Tensor] = []
    live(objective).encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    objective(batch)
    assert len(seen) >= 1
    for image in range(2):
        for channel in range(len(mean)):
            source = pixels[image, channel if channels == 3 else 0]
            resized = pil_resized(source, teacher["image_size"], Image.Resampling.BICUBIC)
            for images in seen:
                assert images.shape == (2, len(mean), teacher["image_size"], teacher["image_size"])
                assert np.allclose(array(images[image, channel]), (resized - mean[channel]) / std[channel], atol=1e-4)


def test_volumes_are_taught_plane_by_plane_in_the_teachers_way(written: Write) -> None:
    planes = {"frames": 4, "tube": 2}
    teacher = written(SMALL | {"image_size": 8} | planes, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    objective, drawn = make(teacher, {"channels": 1} | planes), torch.Generator().manual_seed(0)
    volumes, own = torch.randn(3, 1, 4, 16, 16, generator=drawn), live(objective).encoder.preprocessing
    seen = live(objective).as_input(volumes, objective.encoder.preprocessing)
    assert seen.shape == (3, 3, 4, 8, 8)
    for plane in range(4):
        pixels = volumes[:, :, plane] * 0.5 + 0.5
        small = F.interpolate(pixels, (8, 8), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
        expected = (small - torch.tensor(own.mean).view(3, 1, 1)) / torch.tensor(own.std).view(3, 1, 1)
        assert torch.allclose(seen[:, :, plane], expected, atol=1e-5)
    batch = Batch((volumes,), torch.arange(3), 0)
    theirs = live(objective).encoder.embed(seen)
    expected_loss = slow_distance(array(objective.project(objective.encoder.embed(volumes))), array(theirs), "cosine")
    assert objective(batch).total.item() == pytest.approx(expected_loss, rel=1e-4)


def test_planes_that_have_no_counterpart_are_refused(written: Write, plain: str) -> None:
    deep = written(SMALL | {"frames": 2})
    with pytest.raises(UsageError, match=r"objective.teacher: .* takes 1 planes, the student 2"):
        make(plain, {"frames": 2})
    with pytest.raises(UsageError, match=r"takes 2 planes, the student 1"):
        make(deep)
    with pytest.raises(UsageError, match=r"objective.patches: the patch tokens of .*encoder lie in planes"):
        make(deep, {"frames": 2}, patches=1.0)
    with pytest.raises(UsageError, match=r"objective.patches: the patch tokens of vit_tiny_patch16_224 lie in planes"):
        make(plain, {"channel_tokens": True}, patches=1.0)
    assert make(plain, {"channel_tokens": True}).eval()(make_batch()).total.isfinite()


def test_the_teacher_is_frozen_and_not_part_of_the_model(plain: str) -> None:
    teacher = encode(SMALL | {"drop_path": 0.9, "depth": 2}, 1)
    frozen = Teacher(teacher.train(), DistillConfig(teacher="x"))
    assert not frozen.encoder.training
    objective = make(plain)
    objective.train()
    assert objective.encoder.training
    assert not live(objective).training
    assert not any(module.training for module in live(objective).modules())
    assert not any(parameter.requires_grad for parameter in live(objective).parameters())
    theirs = {id(parameter) for parameter in live(objective).parameters()}
    assert not theirs & {id(parameter) for parameter in objective.parameters()}
    assert not any(module is live(objective) for module in objective.modules())
    assert {name.partition(".")[0] for name in objective.state_dict()} == {"encoder", "project"}
    before = copy.deepcopy(live(objective).state_dict())
    loss = objective(make_batch())
    loss.total.backward()
    torch.optim.SGD(objective.parameters(), lr=1.0).step()
    assert all(parameter.grad is None for parameter in live(objective).parameters())
    assert all(torch.equal(before[name], value) for name, value in live(objective).state_dict().items())
    images = make_batch().views[0].requires_grad_()
    taught = objective.taught(Batch((images,), torch.arange(4), 0))
    assert not any(value.requires_grad for value in taught.values())


def test_the_teacher_follows_the_model(plain: str) -> None:
    objective, batch = make(plain, patches=1.0), make_batch()
    expected = objective(batch).total.item()
    objective.double()
    assert {parameter.dtype for parameter in live(objective).parameters()} == {torch.float64}
    again = objective(Batch((batch.views[0].double(),), batch.positions, batch.seed)).total.item()
    assert again == pytest.approx(expected, rel=1e-5)
    objective.to("meta")
    assert {parameter.device.type for parameter in live(objective).parameters()} == {"meta"}


def test_runs_checkpoints_exports_and_shipped_folders_teach(
    small_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)
    run = Path(small_fields["run_dir"])
    parts = assemble(load("digits/mae", small_fields | {"objective.decoder_depth": 1}), CPU)
    with torch.no_grad():
        for parameter in parts.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    step = checkpoint.save(run / "checkpoints", 3, parts.state(), parts.tensors(), keep=2)
    export(parts.encoder, tmp_path / "shipped" / "digits" / "teacher", {})
    monkeypatch.setattr("selfsight.objectives.teacher.packaged", lambda: tmp_path / "shipped")
    images = make_batch(2, 1, 8).views[0]
    with torch.no_grad():
        expected = parts.encoder.eval().embed(images)
    for source in (run, step, tmp_path / "shipped" / "digits" / "teacher", "digits/teacher"):
        teacher = load_teacher(DistillConfig(teacher=str(source)), parts.encoder.preprocessing)
        found = teacher(images, parts.encoder.preprocessing)["embedding"]
        assert torch.allclose(found, expected, atol=1e-5), source
    other = tmp_path / "digits" / "teacher"  # a folder of this name where the person stands comes first
    export(encode(GREY, 9), other, {})
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher(DistillConfig(teacher="digits/teacher"), parts.encoder.preprocessing)
    assert not torch.allclose(teacher(images, parts.encoder.preprocessing)["embedding"], expected, atol=1e-2)


def test_a_timm_folder_teaches_with_its_classifier(tmp_path: Path) -> None:
    model: Any = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=6
    ).eval()
    nn.init.normal_(model.head.weight)
    statistics = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "input_size": (3, 16, 16)}
    save_for_hf(
        model, str(tmp_path / "timm"), model_args={
            "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2,
        }, model_config={"num_classes": 6, "pretrained_cfg": {**statistics, "num_classes": 6}}, safe_serialization=True,
    )  # fmt: skip
    objective, batch = make(str(tmp_path / "timm"), logits=1.0), make_batch()
    taught = objective.taught(batch)
    with torch.no_grad():
        expected = model(batch.views[0]).softmax(1)
    found = torch.zeros(4, 6).scatter(1, taught["classes"], taught["probabilities"])
    assert torch.allclose(found, expected, atol=1e-5)


# --- what cannot be, said before the first step ---


def test_teachers_that_cannot_be_are_refused(written: Write, plain: str, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    one, grey = written(SMALL | {"patch": 16}), written(SMALL | {"channels": 1})
    cases: list[tuple[str, Fields, Fields, str]] = [
        (one, {}, {"patches": 1.0}, r"objective.patches: the 1 patch tokens of .* are no grid"),
        (plain, {"patch": 16}, {"patches": 1.0}, r"objective.patches: the 1 patch tokens of vit_tiny_patch16_224"),
        (grey, {}, {}, "objective.teacher: .* takes 1 channels, the student 3"),
        (plain, {"channels": 5}, {}, "objective.teacher: .* takes 3 channels, the student 5"),
        (plain, {}, {"logits": 1.0}, "objective.logits: .* has no classifier; distil its embedding, patches or simil"),
        ("no/such", {}, {}, "no/such: neither a run, nor an exported encoder, nor a checkpoint, nor a model"),
        (str(tmp_path / "thesis"), {}, {}, "holds neither an export"),
        (str(tmp_path / "none"), {}, {"stored": str(tmp_path), "augmentations": 1}, "holds no stored teacher"),
    ]
    for teacher, student, fields, message in cases:
        with pytest.raises(UsageError, match=message):
            make(teacher, student, **fields)
    make(one)  # an embedding needs no grid


@pytest.mark.parametrize("tokens", [0, 1, 2, 12, 15])
def test_patch_tokens_without_a_square_grid_are_refused(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=f"the {tokens} patch tokens of it are no grid"):
        square(tokens, "it")
    odd = encode(SMALL, 1)
    monkeypatch.setattr(odd, "forward", lambda images, **_: Tokens(images[:, :0, 0], torch.zeros(1, tokens, 16)))
    monkeypatch.setattr("selfsight.loading.load_encoder", lambda source: odd)
    with pytest.raises(UsageError, match=f"the {tokens} patch tokens of odd are no grid"):
        make("odd", patches=1.0)


def test_square_grids_have_a_side() -> None:
    assert [square(tokens, "it") for tokens in (4, 9, 196)] == [2, 3, 14]


def test_more_probabilities_than_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="top_k"):
        classifying(monkeypatch, top_k=7)[0](make_batch())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective.embedding": 0}, "one of embedding, patches, similarity, logits must be above 0"),
        ({"objective.stored": "x"}, "stored: needs augmentations"),
        ({"objective.teacher": None}, "objective.teacher"),
        ({"objective.augmentations": 0}, "objective.augmentations"),
    ],
)
def test_recipes_that_cannot_be_are_refused(fields: Fields, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("digits/mae", {"objective.name": "distill", "objective.teacher": "x"} | fields)


# --- the stored teacher ---

VIEW: Fields = {"crop_scale": [0.3, 1.0], "flip": 0.5, "jitter": 0.8, "blur": 0.5, "solarize": 0.3}
TERMS: Fields = {"embedding": 1.0, "patches": 0.5, "similarity": 2.0}


@pytest.fixture
def teaching(small_fields: Fields, written: Write, tmp_path: Path) -> Fields:
    """Fields of a recipe whose teacher, of other size, channels and grid, is stored; batches end in mid-epoch."""
    teacher = shutil.copytree(written(SMALL), tmp_path / "teacher")
    del small_fields["objective.decoder_width"]
    named = {"objective.name": "distill", "objective.teacher": str(teacher), "objective.augmentations": 2}
    named |= {"objective.stored": str(tmp_path / "stored"), "train.batch_size": 48, "objective.view": VIEW}
    return named | small_fields | {"train.batch_size": 48} | {f"objective.{name}": w for name, w in TERMS.items()}


def recipe_of(fields: Fields, **more: Any) -> Recipe:
    return load("digits/mae", copy.deepcopy(fields) | {name.replace("__", "."): value for name, value in more.items()})


def batches_of(parts: Parts, steps: int) -> Iterator[Batch]:
    batches, place = parts.batches(), parts.placer(CPU)
    for step in range(steps):
        yield place(batches[step], step / steps)


def learn(recipe: Recipe, steps: int = 8) -> list[dict[str, float]]:
    """The losses of the first steps of a run."""
    parts = assemble(recipe, CPU)
    found = []
    for batch in batches_of(parts, steps):
        loss = parts.objective(batch)
        parts.optimizer.zero_grad()
        loss.total.backward()
        parts.optimizer.step()
        found.append({"total": loss.total.item()} | {name: term.item() for name, term in loss.terms.items()})
    return found


def test_a_stored_teacher_teaches_as_the_live_one(teaching: Fields, tmp_path: Path) -> None:
    expected = learn(recipe_of(teaching, objective__stored=None))
    assert store_teacher(recipe_of(teaching)) == tmp_path / "stored"
    shutil.rmtree(tmp_path / "teacher")
    found = learn(recipe_of(teaching))
    assert len(found) * 48 > 3 * 120  # epoch 0, 1, then both augmentations again
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert found[0]["total"] != pytest.approx(found[-1]["total"], rel=1e-2)
    assert sorted(path.name for path in (tmp_path / "stored").iterdir()) == [
        "embedding.npy",
        "patches.npy",
        "teacher.json",
    ]


def test_stored_rows_are_those_of_the_batch(teaching: Fields) -> None:
    """Every row is compared, and differs from the row of any other sample and of the other augmentation."""
    store_teacher(recipe_of(teaching))
    alive = assemble(recipe_of(teaching, objective__stored=None), CPU)
    stored = assemble(recipe_of(teaching), CPU)
    assert isinstance(alive.objective, Distill)
    assert isinstance(stored.objective, Distill)
    seen: dict[int, Tensor] = {}
    for step, batch in enumerate(batches_of(stored, 8)):
        positions = np.arange(step * 48, (step + 1) * 48)
        ids = sample_ids(positions, 120, 0)
        assert batch.keys is not None
        assert batch.keys.tolist() == (positions // 120 % 2 * 120 + ids).tolist()
        with torch.no_grad():
            ours, theirs = stored.objective.taught(batch), alive.objective.taught(batch)
        assert ours.keys() == theirs.keys() == {"embedding", "patches"}
        for name, value in theirs.items():
            assert ours[name].dtype == torch.float32
            assert torch.allclose(ours[name], value, rtol=1e-3, atol=2e-3)
        seen |= dict(zip(batch.keys.tolist(), theirs["embedding"], strict=True))
    assert sorted(seen) == list(range(240))
    vectors = torch.stack([seen[row] for row in range(240)])
    apart = torch.cdist(vectors, vectors).fill_diagonal_(torch.inf)
    assert apart.min() > 0.01


def test_rows_are_augmentation_by_augmentation(teaching: Fields, tmp_path: Path) -> None:
    """Without augmentation, both halves of the file are the samples in the order of the shards."""
    recipe = recipe_of(teaching | {"objective.view": {"crop_scale": None, "flip": 0.0}})
    parts = assemble(recipe_of(teaching, objective__stored=None), CPU)
    store_teacher(recipe)
    stored = np.load(tmp_path / "stored" / "embedding.npy")
    assert (stored.shape, stored.dtype) == ((240, 16), np.float16)
    assert np.load(tmp_path / "stored" / "patches.npy").shape == (240, 16, 16)
    encoder = encode(SMALL, 1).eval()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for sample in (0, 1, 49, 50, 119):
        pixels = decode(parts.shards.read(sample), Form(1))[0].astype(np.float64) / 255
        enlarged = pil_resized(pixels, 16, Image.Resampling.BICUBIC)
        images = torch.tensor((enlarged - mean[:, None, None]) / std[:, None, None], dtype=torch.float32)[None]
        with torch.no_grad():
            expected = encoder.embed(images)[0].numpy()
        assert np.allclose(stored[sample], expected, atol=5e-3)
        assert np.array_equal(stored[120 + sample], stored[sample])
        assert not np.allclose(stored[(sample + 1) % 120], expected, atol=5e-3)


def test_probabilities_are_stored_too(teaching: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifying(monkeypatch)  # from here on every teacher is this one
    more = {"objective.logits": 1.0, "objective.top_k": 3, "objective.temperature": 2.0}
    expected = learn(recipe_of(teaching | more, objective__stored=None), 4)
    store_teacher(recipe_of(teaching | more))
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "teacher")
    found = learn(recipe_of(teaching | more), 4)
    assert all("logits" in line for line in found)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    classes = np.load(tmp_path / "stored" / "classes.npy")
    assert (classes.shape, classes.dtype) == ((240, 3), np.int32)
    for name, value in {"temperature": 1.0, "top_k": 2}.items():
        with pytest.raises(UsageError, match=rf"another recipe: {name} \(was"):
            assemble(recipe_of(teaching | more | {f"objective.{name}": value}), CPU)


def test_what_is_stored_beside_what_is_wanted_does_no_harm(teaching: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    classifying(monkeypatch)
    more = {"objective.logits": 1.0, "objective.temperature": 2.0}
    store_teacher(recipe_of(teaching | more))
    assert set(learn(recipe_of(teaching | {"objective.patches": 0.0}), 1)[0]) == {"total", "embedding", "similarity"}


def test_outputs_of_another_recipe_are_refused(teaching: Fields, tmp_path: Path) -> None:
    store_teacher(recipe_of(teaching))
    (tmp_path / "others").mkdir()
    write_shards(iter(pictures(120, seed=5)), tmp_path / "others", "other", per_shard=50)
    different: list[tuple[Fields, str]] = [
        ({"data.train": str(tmp_path / "others")}, "data"),
        ({"objective.augmentations": 3}, r"augmentations \(was 2, is 3\)"),
        ({"objective.view.flip": 0.25}, r"view.flip \(was 0.5, is 0.25\)"),
        ({"objective.view.crop_scale": [0.4, 1.0]}, "view.crop_scale"),
        ({"seed": 1}, r"seed \(was 0, is 1\)"),
        ({"data.interpolation": "bilinear"}, "interpolation"),
        ({"encoder.image_size": 16}, r"image_size \(was 8, is 16\)"),
        ({"encoder.channels": 3}, r"channels \(was 1, is 3\)"),
        ({"objective.teacher": str(shutil.copytree(tmp_path / "teacher", tmp_path / "t2"))}, "teacher"),
    ]
    before = (tmp_path / "stored" / "embedding.npy").read_bytes()
    for fields, message in different:
        for use in (lambda recipe: assemble(recipe, CPU), store_teacher):
            with pytest.raises(UsageError, match=rf"objective.stored: .*stored: holds .* another recipe: {message}"):
                use(recipe_of(teaching | fields))
    assert (tmp_path / "stored" / "embedding.npy").read_bytes() == before
    # What the outputs do not depend on may change: the student, the weights of the terms, the optimizer.
    free = {"encoder.depth": 2, "objective.embedding": 0.1, "optim.lr": 1e-4, "train.batch_size": 24}
    assemble(recipe_of(teaching | free | {"objective.distance": "l2", "data.mean": [0.1]}), CPU)


@pytest.mark.parametrize("lacking", ["embedding", "similarity", "patches"])
def test_an_output_that_was_not_stored_is_named(teaching: Fields, lacking: str) -> None:
    had = {"objective.embedding": float(lacking == "patches"), "objective.patches": float(lacking != "patches")}
    store_teacher(recipe_of(teaching | {"objective.similarity": 0.0} | had))
    output = "patches" if lacking == "patches" else "embedding"
    with pytest.raises(UsageError, match=rf"objective.{lacking}: .*stored: holds .*, no {output}"):
        assemble(recipe_of(teaching | {"objective.similarity": 0.0} | had | {f"objective.{lacking}": 1.0}), CPU)
    with pytest.raises(UsageError, match=r"objective.logits: .*, no probabilities"):
        assemble(recipe_of(teaching | {"objective.similarity": 0.0} | had | {"objective.logits": 1.0}), CPU)


def test_a_folder_that_holds_no_stored_teacher_is_said_and_left_alone(teaching: Fields, tmp_path: Path) -> None:
    folder = tmp_path / "stored"
    with pytest.raises(UsageError, match=r"holds no stored teacher .*; `selfsight teacher RECIPE` writes it"):
        assemble(recipe_of(teaching), CPU)
    folder.mkdir()
    (folder / "thesis.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds no stored teacher"):
        store_teacher(recipe_of(teaching))
    assert (folder / "thesis.txt").read_text() == "dear"
    for text in ("{}", "not json", '{"of": {}, "widths": {}, "outputs": ["embedding"]}'):
        (folder / "teacher.json").write_text(text)
        with pytest.raises(UsageError, match="holds no stored teacher"):
            assemble(recipe_of(teaching), CPU)


@pytest.mark.parametrize("text", ["[]", "3", '{"of": {}, "widths": {}, "outputs": 3}'])
def test_a_manifest_of_another_shape_is_said(teaching: Fields, tmp_path: Path, text: str) -> None:
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "teacher.json").write_text(text)
    with pytest.raises(UsageError, match="holds no stored teacher"):
        assemble(recipe_of(teaching), CPU)


def test_a_folder_that_cannot_be_written_is_said(teaching: Fields, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        store_teacher(recipe_of(teaching, objective__stored=str(tmp_path / "file" / "stored")))


def test_storing_twice_does_nothing(teaching: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_teacher(recipe_of(teaching))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stored").iterdir()}

    def fail(*_: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "forward", fail)
    assert store_teacher(recipe_of(teaching)) == tmp_path / "stored"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stored").iterdir()} == before


def test_a_teacher_that_was_trained_on_is_stored_anew_or_refused(teaching: Fields, tmp_path: Path) -> None:
    store_teacher(recipe_of(teaching))
    weights = tmp_path / "teacher" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    seal(weights.parent)  # by its maker; without this it is damage
    with pytest.raises(UsageError, match="teacher"):
        store_teacher(recipe_of(teaching))


@pytest.mark.parametrize(
    "fields",
    [
        {"objective.stored": None},
        {"objective.stored": None, "objective.augmentations": None},
        {"objective.name": "rotation"},
    ],
)
def test_what_cannot_be_stored_is_refused(teaching: Fields, fields: Fields) -> None:
    if "objective.name" in fields:
        teaching = {name: value for name, value in teaching.items() if not name.startswith("objective.")}
    with pytest.raises(UsageError, match=r"name: distill, with stored .* and augmentations"):
        store_teacher(recipe_of(teaching | fields))


def test_the_command_writes_it(
    teaching: Fields, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of(teaching, objective__stored=None).to_yaml())
    folder = tmp_path / "elsewhere" / "outputs"
    assert cli.main(["teacher", str(path), "--objective.stored", str(folder)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(folder)
    assert "240 rows, 2 augmentations of 120 samples" in " ".join(told.err.split())
    assert sorted(name.name for name in (tmp_path / "elsewhere").iterdir()) == ["outputs"]
    assemble(recipe_of(teaching, objective__stored=str(folder)), CPU)
    assert cli.main(["teacher", str(path), "--objective.stored", str(folder), "--seed=4"]) == 2
    assert "seed (was 0, is 4)" in capsys.readouterr().err
    assert cli.main(["teacher", str(path)]) == 2
    assert "with stored" in capsys.readouterr().err


def test_an_interrupted_writer_leaves_no_folder(tmp_path: Path) -> None:
    def outputs(last: Tensor | None) -> Iterator[dict[str, Tensor]]:
        classes = {"probabilities": torch.ones(3, 1), "classes": torch.tensor([[5], [70_000], [2]])}
        yield {"embedding": torch.arange(6.0).view(3, 2)} | classes
        if last is None:
            raise KeyboardInterrupt
        yield {"embedding": last, "probabilities": torch.ones(2, 1), "classes": torch.tensor([[1], [0]])}

    folder, of = tmp_path / "a" / "stored", {"seed": 3}
    about = {"weights": "0123", "widths": {"embedding": 2, "classes": 80_000}}
    with pytest.raises(KeyboardInterrupt):
        write_outputs(folder, of, about, 5, outputs(None))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericError, match=r"embedding are not finite in float16 \(row 3\)"):
            write_outputs(folder, of, about, 5, outputs(torch.tensor([[1.0, 2.0], [bad, 0.0]])))
    assert not folder.exists()
    write_outputs(folder, of, about, 5, outputs(torch.tensor([[7.0, 8.0], [9.0, 10.0]])))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["stored"]
    assert json.loads((folder / "teacher.json").read_text())["of"] == of
    teacher = StoredTeacher(folder, DistillConfig(teacher="x", logits=1.0))
    teacher.require({"seed": 3})
    with pytest.raises(UsageError, match=r"another recipe: seed \(was 3, is 4\)"):
        teacher.require({"seed": 4})
    teacher.require({"seed": 3, "depth": 8})  # what older outputs do not say was so
    for key, value, was in (("range", [0, 4000], None), ("plain_pixels", False, True), ("frames", 8, 1)):
        with pytest.raises(UsageError, match=rf"another recipe: {key}\S* \(was {was}"):
            teacher.require({"seed": 3, key: value})
    teacher.of["frames"] = 8
    with pytest.raises(UsageError, match=r"another recipe: frames \(was 8, is 1\)"):
        teacher.require({"seed": 3})
    del teacher.of["frames"]
    found = teacher(torch.tensor([4, 0, 1]), CPU)
    assert found["embedding"].tolist() == [[9.0, 10.0], [0.0, 1.0], [2.0, 3.0]]
    assert (found["classes"].tolist(), found["classes"].dtype) == ([[0], [5], [70_000]], torch.int64)


def test_outputs_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NumericError, match=r"embedding are not finite in float16 \(row 0\)"):
        write_outputs(tmp_path / "stored", {}, {"embedding": 1}, 1, iter([{"embedding": torch.tensor([[1e6]])}]))
    assert not (tmp_path / "stored").exists()


def test_a_resumed_run_is_given_the_same_teacher(teaching: Fields) -> None:
    parts = assemble(recipe_of(teaching, objective__stored=None), CPU)
    assert isinstance(parts.objective, Distill) and isinstance(parts.objective.teacher, Teacher)
    teacher = parts.objective.teacher
    assert parts.fingerprint()["given to the objective"] == teacher.weights == weights_hash(teacher)[:16]
    with torch.no_grad():
        next(teacher.parameters()).add_(1e-3)
    assert weights_hash(teacher)[:16] != teacher.weights
    store_teacher(recipe_of(teaching))
    stored = assemble(recipe_of(teaching), CPU)
    assert stored.fingerprint()["given to the objective"] == teacher.weights
