"""Perturbations against written-out references, and what the bank says of them.

Mutations that these tests caught when they were tried: the share of patches taken for what stays, tiles put back where they
were, a shift to the other side, wrapped borders, noise of another image, contrast about 0 instead of the mean, blur along one axis, the
bank asked for itself, answers compared with the truth for "same".
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import Tensor

from selfsight.data.build import write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import NumericError, UsageError
from selfsight.eval import robust as module
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.features import Extraction, Features, extract, prepared
from selfsight.eval.knn import knn, predict, unit
from selfsight.eval.masked import pixel_patch
from selfsight.eval.perturb import (
    BLUR,
    CONTRAST,
    NOISE,
    blurred,
    corrupt,
    dropped,
    kept,
    occlude,
    permute_patches,
    severities,
    shift,
)
from selfsight.eval.robust import CLEAN, Answers, curve, features, grids, judge, leaves_out, occluded_patch, run_robust
from selfsight.eval.subject import Options, Outcome, Subject
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_severities_are_imagenet_cs() -> None:
    assert (NOISE, BLUR, CONTRAST) == ((0.08, 0.12, 0.18, 0.26, 0.38), (1, 2, 3, 4, 6), (0.4, 0.3, 0.2, 0.1, 0.05))


@pytest.mark.parametrize("shape", [(2, 3, 9, 12), (2, 3, 4, 9, 12)])
def test_corruptions_are_their_formulas(shape: tuple[int, ...]) -> None:
    images = noise(*shape)
    pixels = images.numpy()
    axes = tuple(range(2, len(shape)))
    for share in CONTRAST:
        mean = pixels.mean(axes, keepdims=True)
        expected = np.clip((pixels - mean) * share + mean, 0, 1)
        assert np.allclose(corrupt(images, "contrast", share), expected, atol=1e-6)
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(corrupt(images, "noise", 0.26, draws), (images + 0.26 * draws).clamp(0, 1))
    for sigma in (0.8, 2.0):
        filtered = gaussian_filter(pixels, sigma, mode="nearest", truncate=4.0, axes=(-2, -1))
        assert np.allclose(blurred(images, sigma), filtered, atol=1e-5)
    assert torch.equal(corrupt(images, "blur", 56.0), blurred(images, 56 * 12 / 224).clamp(0, 1))
    assert torch.equal(blurred(images, 0.1), images)
    with pytest.raises(KeyError):
        corrupt(images, "fog", 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_dropped_and_kept_are_all_patches(count: int, share: float, seed: int) -> None:
    draws = noise(3, count, seed=seed)
    gone, stay = dropped(draws, share), kept(draws, share)
    assert gone.sum(1).tolist() == [min(round(share * count), count - 1)] * 3
    for row in range(3):
        assert sorted([*stay[row].tolist(), *gone[row].nonzero().flatten().tolist()]) == [*range(count)]
        if gone[row].any():
            assert draws[row][gone[row]].max() < draws[row][~gone[row]].min()


@pytest.mark.parametrize("planes", [(), (2,)])
def test_occluded_patches_are_grey_and_no_others(planes: tuple[int, ...]) -> None:
    images = noise(2, 3, *planes, 4, 6) + 1
    draws = noise(2, 6)
    made = occlude(images, 0.5, 2, draws, -1.0)
    gone = dropped(draws, 0.5)
    for n in range(2):
        for patch in range(6):
            i, j = divmod(patch, 3)
            tile = (n, ..., slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
            assert torch.equal(made[tile], torch.full_like(made[tile], -1) if gone[n, patch] else images[tile])
    assert torch.equal(occlude(images, 0.0, 2, draws), images)


@pytest.mark.parametrize("planes", [(), (2,)])
def test_tiles_come_where_the_order_says(planes: tuple[int, ...]) -> None:
    images = noise(2, 3, *planes, 4, 6)
    order = torch.tensor([[1, 2, 3, 0], [0, 1, 2, 3]])
    made = permute_patches(images, 2, order)
    assert torch.equal(made[1], images[1])
    places = [
        (slice(0, 2), slice(0, 3)),
        (slice(0, 2), slice(3, 6)),
        (slice(2, 4), slice(0, 3)),
        (slice(2, 4), slice(3, 6)),
    ]
    for to, source in enumerate(order[0].tolist()):
        assert torch.equal(made[(0, ..., *places[to])], images[(0, ..., *places[source])])
    assert torch.equal(permute_patches(made, 2, order.argsort(1)), images)
    with pytest.raises(ValueError, match="4 x 6 pixels do not divide into 3 x 3 tiles"):
        permute_patches(images, 3, order)


@settings(max_examples=40, deadline=None)
@given(st.integers(-4, 4), st.integers(-5, 5), st.booleans())
def test_a_shift_moves_and_mirrors(down: int, right: int, volume: bool) -> None:
    images = noise(2, 2, *([3] if volume else []), 5, 6)
    made = shift(images, torch.tensor([down, 0]), torch.tensor([right, 0])).numpy()
    assert np.array_equal(made[1], images[1].numpy())
    pad = [(0, 0)] * (images.ndim - 3) + [(4, 4), (5, 5)]
    wide = np.pad(images[0].numpy(), pad, mode="reflect")
    assert np.array_equal(made[0], wide[..., 4 - down : 9 - down, 5 - right : 11 - right])


def test_a_shift_of_the_whole_image_is_refused() -> None:
    with pytest.raises(ValueError, match="shifts of up to 5 pixels, of images of 5"):
        shift(noise(1, 1, 5, 6), torch.tensor([5]), torch.tensor([0]))


def built(**changes: Any) -> Encoder:
    own = {
        "name": "vit_tiny_patch16_224",
        "image_size": 8,
        "channels": 1,
        "patch": 2,
        "width": 16,
        "depth": 1,
        "heads": 2,
    }
    config = EncoderConfig(**(own | changes))
    return build_encoder(config, preprocessing_of(DataConfig(train="none", mean=None, std=None), config), 0)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, Shards]:
    made = []
    for seed, count in enumerate((60, 30)):
        folder = tmp_path_factory.mktemp("half")
        write_shards(iter(pictures(count, seed=seed)), folder, "s")
        made.append(Shards(str(folder)))
    return made[0], made[1]


def subject(sets: tuple[Shards, Shards], encoder: Encoder, **options: Any) -> Subject:
    fit, held = (extract(encoder, one, CPU, (encoder.pool,)) for one in sets)
    chosen = Options(k=(3, 5), **options)
    return Subject("it", encoder.pool, fit, held, chosen, CPU, 0, encoder, encoder.preprocessing, sets)


def by_metric(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {one.metric: one for one in outcomes}


def test_every_perturbation_has_a_row(halves: tuple[Shards, Shards]) -> None:
    it = subject(halves, built())
    found = by_metric(run_robust(it))
    assert list(found) == [
        "clean",
        "occlusion 50 %",
        "permutation 4x4",
        "shift, same answer",
        "shift, cosine",
        "noise",
        "contrast",
    ]  # no blur: the strongest is a fifth of a pixel, of 8
    clean = knn(it.fit, it.train.labels, it.held, it.test.labels, (3, 5))
    assert found["clean"].values == (pytest.approx(clean.accuracy),)
    assert f"k={clean.k}, mean) on all 30 test images" in found["clean"].protocol
    for name, one in found.items():
        assert one.protocol.startswith("robust: clean kNN (weights exp(s/0.07)")
        if one.unit == "%":
            assert one.each is not None
            assert one.each.shape == (30,)
            assert one.values[0] == pytest.approx(100 * one.each.double().mean().item())
        if name != "clean":
            assert all(0 <= y <= 100 for _, y in one.detail["curve"])
    occlusion = found["occlusion 50 %"]
    assert [x for x, _ in occlusion.detail["curve"]] == [0, 0.25, 0.5, 0.75, 0.9]
    assert occlusion.detail["curve"][0][1] == pytest.approx(clean.accuracy)
    assert occlusion.detail["curve"][2][1] == occlusion.values[0]
    assert [x for x, _ in found["permutation 4x4"].detail["curve"]] == [1, 2, 4]
    assert [x for x, _ in found["shift, same answer"].detail["curve"]] == [1 / 8, 1 / 4]
    assert "shifts of 1/8, 1/4 of the side" in found["shift, cosine"].protocol
    assert -1 <= found["shift, cosine"].values[0] < 1
    assert [x for x, _ in found["noise"].detail["curve"]] == [0, *NOISE]
    assert [x for x, _ in found["contrast"].detail["curve"]] == [1, *CONTRAST]
    assert found["noise"].values[0] == pytest.approx(np.mean([y for _, y in found["noise"].detail["curve"][1:]]))


def test_features_are_of_the_images_that_the_names_say(halves: tuple[Shards, Shards]) -> None:
    encoder = built(channels=3).eval()
    made = encoder.preprocessing
    ids = np.arange(4)
    with torch.no_grad():
        (images,) = prepared(made, halves[1], CPU, ids)
        found = dict(features(encoder, images, ids, "mean"))
        assert torch.equal(found[CLEAN], encoder.embed(images, "mean"))
        for grey, value in enumerate(images.mean((0, 2, 3)).tolist()):
            changed = images.clone()
            changed[:, grey] = 0
            assert torch.equal(found["missing channel", grey], encoder.embed(changed, "mean")), value
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in (made.mean, made.std))
        faded = (corrupt(images * std + mean, "contrast", 0.1) - mean) / std
        assert torch.allclose(found["contrast", 0.1], encoder.embed(faded, "mean"), atol=1e-6)
        # Alone or beside others, a sample is perturbed the same way: what is drawn belongs to its number.
        alone = dict(features(encoder, images[2:3], ids[2:3], "mean"))
    assert list(alone) == list(found)
    for key, feature in alone.items():
        assert torch.allclose(feature[0], found[key][2], atol=1e-5), key
    kinds = {kind for kind, _ in found}
    assert kinds == {"clean", "occlusion", "permutation", "shift", "missing channel", "noise", "contrast"}


def test_what_is_drawn_is_each_samples_own(halves: tuple[Shards, Shards], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = built(drop_path=0.9).train()
    same = torch.randn(1, 1, 8, 8).expand(6, 1, 8, 8)
    with torch.no_grad():
        for key, feature in features(built(), same, np.arange(6), "mean"):
            drawn = key[0] in {"occlusion", "permutation", "noise"}
            assert bool((feature[0] - feature[1:]).norm(dim=1).gt(1e-4).all()) == drawn, key
    whole = run_robust(subject(halves, encoder))
    monkeypatch.setattr(module, "PART", 4)
    parts = run_robust(subject(halves, encoder))
    assert [one.values for one in parts] == [pytest.approx(one.values, abs=1e-4) for one in whole]
    assert encoder.training  # as it was, and without its dropping meanwhile


def test_small_images_are_blurred_by_what_blurs_them(halves: tuple[Shards, Shards]) -> None:
    assert [severities("blur", size) for size in (8, 32, 224)] == [[], [2, 3, 4, 6], [*BLUR]]
    assert severities("noise", 8) == [*NOISE]
    found = by_metric(run_robust(subject(halves, built(image_size=32, patch=8))))
    assert [x for x, _ in found["blur"].detail["curve"]] == [0, 2, 3, 4, 6]
    assert "severities of ImageNet-C (2, 3, 4, 6)" in found["blur"].protocol


def test_noise_is_normal_and_each_samples_own() -> None:
    draws = module._normal("noise", np.arange(40), torch.empty(40, 1, 50, 50)).flatten(1)
    assert abs(float(draws.mean())) < 0.02
    assert float(draws.std()) == pytest.approx(1, abs=0.02)
    assert float((draws.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    assert draws.corrcoef().fill_diagonal_(0).abs().max() < 0.1


def test_patches_are_left_out_where_they_can_be() -> None:
    plain = built(class_token=True).eval()
    assert [leaves_out(plain, pool) for pool in ("cls", "cls+mean", "gem", "last4", "head")] == [True] * 3 + [False] * 2
    images, ids = torch.randn(3, 1, 8, 8), np.arange(3)
    with torch.no_grad():
        found = dict(features(plain, images, ids, "mean"))["occlusion", 0.75]
        draws = module._uniform("occlusion", ids, 16, images)
        expected = plain(images, keep=draws.argsort(1)[:, 12:].sort(1).values).patches.mean(1)
        assert torch.allclose(found, expected, atol=1e-5)
        grey = dict(features(plain, images, ids, "head"))["occlusion", 0.75]
        assert torch.allclose(grey, plain.embed(occlude(images, 0.75, 2, draws), "head"), atol=1e-5)


def test_volumes_channel_tokens_and_others_are_perturbed_too() -> None:
    with torch.no_grad():
        volume = built(frames=4, tube=2)
        found = dict(features(volume, torch.randn(2, 1, 4, 8, 8), np.arange(2), "mean"))
        assert all(one.shape == (2, 16) for one in found.values())
        assert len(found) == 1 + 4 + 2 + 2 + 10
        tokens = built(channels=3, channel_tokens=True).eval()
        images = torch.randn(2, 3, 8, 8)
        found = dict(features(tokens, images, np.arange(2), "mean"))
        assert torch.equal(found["missing channel", 1], tokens.embed(images[:, [0, 2]], "mean", channels=(0, 2)))
        keep = kept(module._uniform("occlusion", np.arange(2), 16, images), 0.5)
        places = torch.cat([keep, 16 + keep, 32 + keep], dim=1)
        assert torch.allclose(found["occlusion", 0.5], tokens(images, keep=places).patches.mean(1), atol=1e-5)


def test_a_backbone_without_patches_is_perturbed_in_tiles(halves: tuple[Shards, Shards]) -> None:
    encoder = built(name="resnet18", image_size=32, pool="head", patch=None, width=None, depth=None, heads=None)
    found = by_metric(run_robust(subject(halves, encoder)))
    assert "half of the patches in the mean colour" in found["occlusion 50 %"].protocol
    assert [occluded_patch(built()), occluded_patch(encoder)] == [2, 2]
    assert [pixel_patch(size) for size in (224, 32, 30, 8)] == [16, 2, 2, 1]


def test_the_text_is_of_the_pool_that_is_asked(halves: tuple[Shards, Shards]) -> None:
    """An encoder whose own pool is `head` leaves no patches out, but does so for `mean`."""
    it = subject(halves, built(pool="head"))
    vectors = [extract(it.encoder, one, CPU, ("mean", "head")) for one in halves]  # type: ignore[arg-type]
    for pool, how in (("mean", "left out"), ("head", "in the mean colour")):
        own = by_metric(run_robust(replace(it, pool=pool, train=vectors[0], test=vectors[1])))
        assert f"half of the patches {how}" in own["occlusion 50 %"].protocol


def test_grids_divide_the_side() -> None:
    assert [grids(size) for size in (224, 28, 8, 9, 2)] == [[2, 4, 8], [2, 4], [2, 4], [], []]


def test_the_bank_is_asked_for_each() -> None:
    bank, fit = unit(noise(40, 5) - 0.5), torch.arange(40) % 3
    clean, worse = noise(12, 5, seed=1) - 0.5, noise(12, 5, seed=2) - 0.5
    held = torch.arange(12) % 3
    found = judge({("noise", 1.0): worse, CLEAN: clean}, bank, fit, held, 3)
    said, before = (predict(bank, fit, unit(one), (3,))[:, 0] for one in (worse, clean))
    assert found.hits["noise", 1.0].tolist() == (said == held).float().tolist()
    assert found.same["noise", 1.0].tolist() == (said == before).float().tolist()
    assert torch.allclose(found.cosine["noise", 1.0], torch.cosine_similarity(worse, clean))
    assert bool(found.same[CLEAN].all())
    assert found.hits[CLEAN].tolist() == (before == held).float().tolist()
    assert curve({("a", 2.0): clean, ("b", 1.0): worse}, "a") == {2.0: clean}
    with pytest.raises(NumericError, match="not finite or have length zero"):
        judge({CLEAN: clean, ("blur", 1.0): worse * torch.nan}, bank, fit, held, 3)
    worse[4] = 0  # nothing is left of it
    lost = judge({("noise", 1.0): worse, CLEAN: clean}, bank, fit, held, 3)
    assert [lost.hits["noise", 1.0][4], lost.same["noise", 1.0][4], lost.cosine["noise", 1.0][4]] == [0, 0, 0]
    rest = torch.arange(12) != 4
    assert torch.equal(lost.hits["noise", 1.0][rest], found.hits["noise", 1.0][rest])
    with pytest.raises(NumericError, match="length zero"):
        judge({CLEAN: worse}, bank, fit, held, 3)
    assert Answers._fields == ("hits", "same", "cosine")


def test_few_test_images_are_said(halves: tuple[Shards, Shards], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES", 7)
    monkeypatch.setattr(module, "PART", 3)
    outcomes = run_robust(subject(halves, built()))
    assert "7 of 30 test images, evenly spaced" in outcomes[0].protocol
    assert {len(one.each) for one in outcomes if one.each is not None} == {7}


def test_the_bank_is_plain_where_features_are_not(halves: tuple[Shards, Shards]) -> None:
    encoder = built()
    it = subject(halves, encoder)
    wide = it.train._replace(vectors={"mean": torch.randn(60, 48)})
    other = replace(it, train=wide, options=Options(k=(3, 5), extraction=Extraction(scales=(1, 2))))
    one, two = by_metric(run_robust(it)), by_metric(run_robust(other))
    assert {name: row.values for name, row in one.items()} == {name: row.values for name, row in two.items()}


def test_who_has_no_images_or_lists_of_labels(halves: tuple[Shards, Shards]) -> None:
    it = subject(halves, built())
    assert run_robust(replace(it, encoder=None)) == []
    assert run_robust(replace(it, sets=None)) == []
    lists = it.train._replace(labels=torch.ones(60, 3, dtype=torch.bool))
    with pytest.raises(
        UsageError, match="robust: scores one label a sample; lists are for knn, linear, logistic and finetune"
    ):
        run_robust(replace(it, train=lists))
    unknown = Features(it.test.vectors, it.test.labels + 7, it.test.groups)
    with pytest.raises(UsageError, match="test has 2 classes that train lacks"):
        run_robust(replace(it, test=unknown))
    assert EVALUATORS["robust"].twins == 1
