"""Dense probes against outside references, the masks' way through the crop, and the honesty of the protocol.

Mutations that these tests caught when they were tried: confusions transposed, 255 counted, absent classes counted as 0, the
union without its intersection taken off, patches labelled by their first pixel, a mask cropped at another place, tokens
transposed, rate chosen on test, seeds that are all the same.
"""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from test_samples import indexed
from torch import Tensor
from torch.nn import functional as F

from selfsight.data.packing import Sample, write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, NumericError, UsageError
from selfsight.eval import dense as module
from selfsight.eval.dense import (
    HEADS,
    classes_of,
    counts_of,
    dense,
    index_of,
    iou,
    mean_iou,
    neighbours,
    patch_labels,
    pixel_accuracy,
    run_dense,
    upsampled,
)
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.features import CentralCrops, Features
from selfsight.eval.knn import held_out, predict, unit
from selfsight.eval.masked import MaskedCrops, patch_tokens, pixel_tokens, tokens_and_masks
from selfsight.eval.quality import confusion
from selfsight.eval.subject import Options, Subject
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")


def png(array: np.ndarray[Any, Any]) -> bytes:
    out = BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def torch_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TRUTH = st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(TRUTH)
def test_scores_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = (torch.tensor(column) for column in zip(*pairs, strict=True))
    table = confusion(predicted, truth, 4)
    counted = truth >= 0
    if not counted.any():
        assert not table.any()
        return
    yes, said = truth[counted].numpy(), predicted[counted].numpy()
    assert np.array_equal(table.numpy(), confusion_matrix(yes, said, labels=range(4)))
    there = sorted({*yes.tolist(), *said.tolist()})
    each = jaccard_score(yes, said, labels=there, average=None)
    assert np.allclose(iou(table)[there], each)
    assert iou(table).isnan().nonzero().flatten().tolist() == sorted({0, 1, 2, 3} - {*there})
    assert mean_iou(table) == pytest.approx(each.mean())
    assert pixel_accuracy(table) == pytest.approx(accuracy_score(yes, said))


def test_the_mean_is_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.classification")
    truth = torch.randint(0, 4, (3, 9, 9), generator=torch_of(0))
    truth[0, :3] = 255
    predicted = torch.where(torch.rand(3, 9, 9, generator=torch_of(1)) < 0.5, truth.clamp(max=3), 1)
    theirs = metrics.MulticlassJaccardIndex(6, ignore_index=255)(predicted, truth)  # of 6 classes 4 are there
    ours = mean_iou(confusion(predicted, index_of(truth, range(6)), 6))
    assert ours == pytest.approx(theirs.item())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_patch_has_the_commonest_class_of_its_pixels(h: int, w: int, p: int, q: int, seed: int) -> None:
    truth = torch.randint(-1, 3, (2, h * p, w * q), generator=torch_of(seed))
    found = patch_labels(truth, 3, h, w)
    for n in range(2):
        for i in range(h):
            for j in range(w):
                pixels = truth[n, i * p : (i + 1) * p, j * q : (j + 1) * q].flatten()
                counts = [int((pixels == c).sum()) for c in range(3)]
                assert found[n, i, j] == (counts.index(max(counts)) if max(counts) else -1)


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    truth = torch.randint(-1, 5, (7, 6, 8), generator=torch_of(0))
    scores = torch.randn(7, 3, 4, 5, generator=torch_of(1))
    whole = patch_labels(truth, 5, 3, 4), upsampled(scores, 6, 8)
    monkeypatch.setattr(module, "LOGITS_MOST", 500)
    assert torch.equal(patch_labels(truth, 5, 3, 4), whole[0])
    assert torch.equal(upsampled(scores, 6, 8), whole[1])
    for n in range(7):
        each = F.interpolate(scores[n].permute(2, 0, 1)[None], size=(6, 8), mode="bilinear", align_corners=False)
        assert torch.equal(whole[1][n], each[0].argmax(0))


def test_masks_that_are_no_whole_patches_are_refused() -> None:
    with pytest.raises(DataError, match="masks of 7 x 8 pixels on 2 x 2 patches"):
        patch_labels(torch.zeros(1, 7, 8, dtype=torch.int64), 2, 2, 2)


def test_values_may_be_any() -> None:
    masks = torch.tensor([[[7, 255, 300]]])
    assert classes_of(counts_of(masks)) == [7, 300]
    assert index_of(masks, [7, 300]).tolist() == [[[0, -1, 1]]]
    for bad, told in (
        ([[[3, 255]]], "have 1 classes"),
        ([[[255]]], "have 0 classes"),
        ([[[*range(1300)]]], "1,299 classes"),
    ):
        with pytest.raises(UsageError, match=told):
            classes_of(counts_of(torch.tensor(bad)))


def scenes(count: int, seed: int, noise: float = 0.7) -> tuple[Tensor, Tensor]:
    """Tokens (N, 4, 4, 8) that tell the class of their 2 x 2 pixels, and the masks (N, 8, 8)."""
    labels = torch.randint(0, 3, (count, 4, 4), generator=torch_of(seed))
    centres = torch.randn(3, 8, generator=torch_of(99)) * 2
    tokens = centres[labels] + noise * torch.randn(count, 4, 4, 8, generator=torch_of(seed + 1000))
    masks = labels.repeat_interleave(2, 1).repeat_interleave(2, 2) * 10 + 4
    masks[:, 0, 0] = 255
    return tokens, masks


def test_what_tokens_tell_is_found_and_what_they_do_not_is_not() -> None:
    train, test = scenes(60, 0), scenes(20, 1)
    found = dense(train, [test], seeds=2)
    assert found.classes == (4, 14, 24)
    assert found.trained == 3
    assert (found.rate, found.decay) in HEADS
    assert all(int(table.sum()) == 20 * 63 for table in (*found.linear, found.neighbours, found.majority))
    assert min(mean_iou(table) for table in (*found.linear, found.neighbours)) > 0.6  # bilinear borders cost something
    blind = dense((train[0].flip(0), train[1]), [test], seeds=1)
    assert mean_iou(blind.linear[0]) < 0.35
    common = int((train[1].flatten()[:, None] == torch.tensor(found.classes)).sum(0).argmax())
    assert (found.majority.sum(0) > 0).nonzero().flatten().tolist() == [common]


def test_the_linear_probe_is_a_logistic_regression_on_patches() -> None:
    (tokens, masks), (other, truth) = scenes(60, 0, 2.0), scenes(30, 1, 2.0)
    fine = masks[:, 1::2, 1::2], truth[:, 1::2, 1::2]  # a pixel a patch: nothing is upsampled
    found = dense((tokens, fine[0]), [(other, fine[1])], seeds=1)
    theirs = LogisticRegression(C=1e3, max_iter=500).fit(tokens.flatten(0, 2).numpy(), fine[0].flatten().numpy())
    said = theirs.predict(other.flatten(0, 2).numpy())
    expected = jaccard_score(fine[1].flatten().numpy(), said, average="macro")
    assert mean_iou(found.linear[0]) == pytest.approx(expected, abs=0.02)


def test_neighbours_vote_as_knn_does() -> None:
    tokens, masks = scenes(40, 0, 2.0)
    labels = patch_labels(index_of(masks, [4, 14, 24]), 3, 4, 4)
    labels[0] = -1  # left out of the bank
    other = scenes(5, 1, 2.0)[0]
    bank = tokens[1:].flatten(0, 2)
    for k in (1, 30):
        votes = neighbours(tokens, labels, 3, k)(other)
        expected = predict(unit(bank), labels[1:].flatten(), unit(other.flatten(0, 2)), (k,))[:, 0]
        assert votes.argmax(-1).flatten().tolist() == expected.tolist()
        assert torch.allclose(votes.sum(-1), torch.ones(5, 4, 4))
    few = neighbours(tokens, labels, 3, 1, bank=16)(tokens[1:])
    assert (few.argmax(-1) != labels[1:]).any()  # of the bank of all, each patch would find itself
    assert torch.equal(neighbours(tokens, labels, 3, 1)(tokens[1:]).argmax(-1), labels[1:])


def test_nothing_is_chosen_on_test(monkeypatch: pytest.MonkeyPatch) -> None:
    train, (tokens, masks) = scenes(40, 3, 3.0), scenes(20, 4, 3.0)
    honest, lying = dense(train, [(tokens, masks)], 2), dense(train, [(tokens, masks.flip(0))], 2)
    assert (honest.rate, honest.decay) == (lying.rate, lying.decay)
    seeds: list[int] = []
    real = module.fit_heads

    def spied(features: Tensor, labels: Tensor, classes: int, heads: Any, seed: int) -> Tensor:
        seeds.append(seed)
        return real(features, labels, classes, heads, seed)

    monkeypatch.setattr(module, "fit_heads", spied)
    batches = [(tokens[:7], masks[:7]), (tokens[7:], masks[7:])]
    again = dense(train, batches, 2)
    assert all(torch.equal(one, two) for one, two in zip(again.linear, honest.linear, strict=True))
    assert seeds == [0, 0, 1]  # the choice, then one fit a seed


def test_the_best_on_the_held_out_tenth_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Tensor, list[float]]] = []
    real = module.score

    def spied(probes: Any, batches: Any, classes: Any) -> Any:
        found = real(probes, batches, classes)
        asked.append((batches[0][0], [mean_iou(table) for table in found[0]]))
        return found

    monkeypatch.setattr(module, "score", spied)
    tokens, masks = scenes(40, 3, 3.0)
    found = dense((tokens, masks), [scenes(3, 4)], 1)
    assert torch.equal(asked[0][0], tokens[held_out(40)[1]])
    assert len({*asked[0][1]}) > 1
    assert asked[0][1][HEADS.index((found.rate, found.decay))] == max(asked[0][1])


def test_groups_are_held_out_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = module.held_out

    def spied(size: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen.append(torch.empty(0) if groups is None else groups)
        return real(size, groups=groups)

    monkeypatch.setattr(module, "held_out", spied)
    dense(scenes(20, 0), [scenes(3, 1)], 1, torch.arange(20) // 5)
    assert seen[0].tolist() == (torch.arange(20) // 5).tolist()


def test_a_class_that_train_lacks_counts_as_missed() -> None:
    train, (tokens, masks) = scenes(40, 0), scenes(20, 1)
    masks[0] = 99
    found = dense(train, [(tokens, masks)], 1)
    assert (found.classes, found.trained) == ((4, 14, 24, 99), 3)
    assert iou(found.linear[0])[3] == 0
    assert mean_iou(found.linear[0]) == pytest.approx(float(iou(found.linear[0]).sum()) / 4)
    masks[:] = 255
    with pytest.raises(UsageError, match="test's masks have no pixel of a class"):
        dense(train, [(tokens, masks)], 1)


SIZES = [(61, 97), (97, 61), (40, 40), (16, 16), (20, 90)]


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_mask_goes_where_its_image_goes(tmp_path: Path, height: int, width: int, crop_pct: float) -> None:
    """An image whose brightness is its row (or column), and a mask that is the same: after resize and crop they agree to half
    a stored pixel, wherever no border is near."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    write_shards([Sample(png(2 * ramp), mask=png(ramp)) for ramp in (rows, columns)], tmp_path, "s")
    shards = Shards(str(tmp_path))
    made = preprocessing_of(
        DataConfig(train="none", crop_pct=crop_pct, interpolation="bilinear"), config(image_size=16)
    )
    images, masks = MaskedCrops(CentralCrops.of(shards, np.arange(2), made), shards)[0]
    assert images.shape == (2, 1, 16, 16)
    assert masks.dtype == torch.int32
    apart = (images[:, 0].float() / 2 - masks)[:, 2:-2, 2:-2]
    assert apart.abs().max() <= 0.76  # half a pixel, and a quarter that 8 bits round
    assert apart.mean().abs() < 0.3
    assert masks[0].diff(dim=0).min() >= 0
    assert masks[1].diff(dim=1).min() >= 0
    assert int(masks[0, 8].unique().numel()) == 1


def config(**changes: Any) -> EncoderConfig:
    own = {
        "name": "vit_tiny_patch16_224",
        "image_size": 16,
        "channels": 1,
        "patch": 4,
        "width": 16,
        "depth": 1,
        "heads": 2,
    }
    return EncoderConfig(**(own | changes))


def built(**changes: Any) -> Encoder:
    own = config(**changes)
    return build_encoder(own, preprocessing_of(DataConfig(train="none", mean=None, std=None), own), 0)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, Shards]:
    """Grey images of 24 x 16 pixels, dark on one side and bright on the other, with masks that say which."""
    made = []
    for side, count in (("train", 24), ("test", 8)):
        rng = np.random.default_rng(len(side))
        samples = []
        for i in range(count):
            mask = np.zeros((16, 24), np.uint8)
            mask[:, : int(rng.integers(6, 18))] = 5
            mask[:4] = mask[:4] if i % 2 else 255
            image = rng.integers(0, 90, mask.shape) + 120 * (mask == 5)
            samples.append(Sample(png(image.astype(np.uint8)), mask=png(mask)))
        folder = tmp_path_factory.mktemp(side)
        write_shards(samples, folder, "s", per_shard=30)
        made.append(Shards(str(folder)))
    return made[0], made[1]


def subject(sets: tuple[Shards, Shards], encoder: Encoder | None, **changes: Any) -> Subject:
    features = [Features({}, torch.full((len(one),), -1), torch.from_numpy(one.groups).long()) for one in sets]
    made = (encoder or built()).preprocessing
    given = {
        "options": Options(seeds=2),
        "device": CPU,
        "encoder": encoder,
        "preprocessing": made,
        "sets": sets,
    } | changes
    return Subject("it", "mean", features[0], features[1], **given)


def test_an_encoder_and_raw_pixels_of_shards(halves: tuple[Shards, Shards]) -> None:
    for encoder in (built(), None):
        outcomes = run_dense(subject(halves, encoder))
        assert [(one.metric, len(one.values), one.unit) for one in outcomes] == [
            ("mIoU", 2, "%"),
            ("pixel accuracy", 2, "%"),
            ("kNN mIoU", 1, "%"),
        ]
        linear, accuracy, near = outcomes
        assert min(*linear.values, *near.values) > 60
        assert min(accuracy.values) > 80
        assert linear.detail["classes"] == [0, 5]
        floor = linear.detail["majority"]
        assert floor["mIoU"] < 50 < min(linear.values)
        assert np.trace(linear.detail["confusion"]) / np.sum(linear.detail["confusion"]) == pytest.approx(
            accuracy.values[0] / 100
        )
        assert np.mean(linear.detail["each"]) == pytest.approx(np.mean(linear.values), abs=0.01)
        grid = "patch tokens, 4 x 4" if encoder else "raw pixels, 16 x 16"
        for part in (
            grid,
            "mIoU over 2 classes",
            "255 left out",
            f"rate {linear.chosen['rate']:g}",
            "held-out tenth of train",
        ):
            assert part in linear.protocol
        assert near.protocol.startswith("dense: vote of 30 neighbours")
        assert "rate" not in near.protocol


@pytest.mark.parametrize(("bound", "most"), [("VALUES_MOST", 16 * 16 * 20), ("PIXELS_MOST", 16 * 16 * 20)])
def test_memory_is_bounded_by_taking_fewer_images(
    halves: tuple[Shards, Shards], monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setattr(module, bound, most)
    outcomes = run_dense(subject(halves, built()))
    assert "20 of 24 training images, evenly spaced" in outcomes[0].protocol
    assert "train that lacks" not in outcomes[0].protocol


def test_masks_are_looked_at_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only train's masks themselves grow with the pixels: no table of 64 bits is made of all of them."""
    masks = torch.randint(0, 3, (10, 8, 8), dtype=torch.int32)
    masks[0, 0, 0] = 255
    tokens = torch.randn(10, 4, 4, 6)
    seen: list[int] = []
    real = module.index_of
    monkeypatch.setattr(module, "index_of", lambda part, classes: seen.append(len(part)) or real(part, classes))
    monkeypatch.setattr(module, "HEADS", ((0.1, 0.0),))
    whole = dense((tokens, masks), [(tokens, masks)], 1)
    monkeypatch.setattr(module, "PART", 3)
    seen.clear()
    parts = dense((tokens, masks), [(tokens, masks)], 1)
    assert seen[:4] == [3, 3, 3, 1]
    assert torch.equal(parts.linear[0], whole.linear[0]) and torch.equal(parts.majority, whole.majority)
    counts = counts_of(masks)
    assert counts[:4].tolist() == [int((masks == value).sum()) for value in range(3)] + [0] and counts[255] == 0


def test_tokens_lie_where_their_patches_are(halves: tuple[Shards, Shards]) -> None:
    encoder = built(class_token=True, registers=2)
    (tokens, masks), *_ = tokens_and_masks(encoder, encoder.preprocessing, halves[0], np.arange(3), CPU)
    assert tokens.shape == (3, 4, 4, 16)
    assert masks.shape == (3, 16, 16)
    raw = torch.zeros(1, 1, 16, 16)
    raw[..., 4:8, 8:12] = 1
    pixels = pixel_tokens(raw)
    assert pixels.shape == (1, 16, 16, 2)
    assert torch.equal(pixels[0, ..., 0], raw[0, 0])
    stem = encoder.backbone.patch_embed.proj
    with torch.no_grad():
        moved = (patch_tokens(encoder, raw) - patch_tokens(encoder, torch.zeros_like(raw))).norm(dim=-1)[0]
    assert int(moved.argmax()) == 1 * 4 + 2
    assert stem.kernel_size == (4, 4)
    assert encoder.training  # as it was


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (96, 6), (32, 2), (8, 1), (17, 1)])
def test_raw_pixels_are_cut_as_finely_as_a_vits(size: int, patch: int) -> None:
    assert pixel_tokens(torch.rand(1, 3, size, size)).shape == (1, size // patch, size // patch, 3 * patch**2 + 1)


def test_channel_tokens_are_averaged_and_planes_refused(halves: tuple[Shards, Shards]) -> None:
    encoder = built(channels=3, channel_tokens=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = patch_tokens(encoder, images)
        expected = encoder.eval()(images).patches.view(2, 3, 4, 4, 16).mean(1)
    assert torch.allclose(tokens, expected)
    volumes = built(frames=2)
    with pytest.raises(UsageError, match="dense: masks are of plain images; this encoder takes planes"):
        run_dense(subject(halves, volumes))
    with pytest.raises(UsageError, match="for encoders of plain images"):
        patch_tokens(volumes, torch.randn(1, 1, 2, 16, 16))


def test_hierarchical_encoders_have_their_own_grid() -> None:
    encoder = built(name="swin_tiny_patch4_window7_224", image_size=64, patch=None, width=None, depth=None, heads=None)
    with torch.no_grad():
        assert patch_tokens(encoder, torch.randn(1, 1, 64, 64)).shape[1:3] == (2, 2)


def test_what_cannot_be_scored_is_said(halves: tuple[Shards, Shards], tmp_path: Path) -> None:
    stored = replace(subject(halves, None), preprocessing=None, sets=None)
    assert run_dense(stored) == []
    grey = np.zeros((16, 24), np.uint8)
    small = [("a.png", png(grey)), ("a.mask.png", png(np.zeros((8, 8), np.uint8)))]  # of somebody else's making
    for name, files in (("none", small[:1]), ("small", small)):
        (tmp_path / name).mkdir()
        indexed(tmp_path / name, [*files, *((f"b{member[1:]}", body) for member, body in files)])
    with pytest.raises(UsageError, match=r"2 of 2 samples have no mask.*shards build FOLDER TARGET --masks FOLDER"):
        run_dense(subject((halves[0], Shards(str(tmp_path / "none"))), built()))
    with pytest.raises(DataError, match=r"x.tar@\d+: mask of 8 x 8 pixels, of an image of 24 x 16; store them"):
        run_dense(subject((halves[0], Shards(str(tmp_path / "small"))), built()))
    broken = built()
    with torch.no_grad():
        broken.backbone.norm.weight.fill_(torch.nan)
    with pytest.raises(NumericError, match="patch tokens that are not finite"):
        run_dense(subject(halves, broken))
    entry = EVALUATORS["dense"]
    assert (entry.labels, entry.masks, entry.twins) == (False, True, 1)
