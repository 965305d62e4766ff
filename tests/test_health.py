"""Health of features against each formula written out, and against what it is for: collapse must show.

Mutations that these tests caught when they were tried: see the end of each section.
"""

from io import BytesIO
from math import exp, log, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tar import make_tar

from selfsight.attention import attention_distance
from selfsight.data.build import write_shards
from selfsight.data.index import build_index
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, NumericError, UsageError
from selfsight.eval import health
from selfsight.eval.evaluators import EVALUATORS
from selfsight.eval.features import Features, extract, prepared
from selfsight.eval.health import (
    alignment,
    alpha_req,
    attention_reach,
    dimension_std,
    effective_rank,
    eigenvalues,
    mean_cosine,
    rankme,
    run_health,
    spread,
    two_views,
    uniformity,
)
from selfsight.eval.subject import Options, Subject
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")
SIZES = given(st.integers(2, 30), st.integers(2, 10), st.integers(0, 10))


def make(seed: int = 0, **fields: Any) -> Encoder:
    config = EncoderConfig(
        **({"image_size": 8, "channels": 1, "patch": 2, "width": 16, "depth": 2, "heads": 2} | fields)
    )
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()


def subject_of(encoder: Encoder | None, test: Shards, vectors: torch.Tensor | None = None) -> Subject:
    """Test features as both sets, as the core has it where there is no train."""
    if encoder is not None:
        held = extract(encoder, test, CPU)
        return Subject("x", encoder.pool, held, held, Options(), CPU, 0, encoder, encoder.preprocessing, (test, test))
    assert vectors is not None
    nothing = torch.full((len(vectors),), -1)
    held = Features({"stored": vectors}, nothing, nothing)
    return Subject("x", "stored", held, held, Options(), CPU)


def npy(array: np.ndarray) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()


def noise(samples: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(samples, width)) + 0.3


@settings(max_examples=20, deadline=None)
@SIZES
def test_effective_rank_is_the_papers_formula(samples: int, width: int, seed: int) -> None:
    z = noise(samples, width, seed)
    values = np.linalg.svd(np.cov(z.T), compute_uv=False)
    p = values / values.sum()
    p = p[p > 1e-14]
    assert effective_rank(torch.from_numpy(z)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


@settings(max_examples=20, deadline=None)
@SIZES
def test_eigenvalues_are_numpys(samples: int, width: int, seed: int) -> None:
    z = noise(samples, width, seed)
    theirs = np.linalg.eigvalsh(np.cov(z.T))[::-1][: min(samples, width)]
    assert eigenvalues(torch.from_numpy(z)).numpy() == pytest.approx(theirs, abs=1e-9)


def test_a_power_law_is_found_again() -> None:
    """Features whose covariance has exactly the spectrum i^-alpha."""
    directions = np.linalg.qr(noise(400, 120, 0) - noise(400, 120, 0).mean(0))[0]
    for alpha in (0.5, 1.0, 2.5):
        z = directions * np.arange(1, 121) ** (-alpha / 2)
        assert alpha_req(torch.from_numpy(z - z.mean(0))) == pytest.approx(alpha, abs=0.02)


def test_alpha_is_the_authors_weighted_fit() -> None:
    """numpy's weighted least squares over ranks 4 to 100, which takes the roots of the weights 1 / i."""
    z = noise(500, 150, 3) * np.random.default_rng(1).uniform(0.1, 3, 150)
    values = np.sort(np.linalg.eigvalsh(np.cov(z.T)))[::-1]
    ranks = np.arange(4, 101)
    slope = np.polyfit(np.log(ranks), np.log(values[3:100]), 1, w=np.sqrt(1 / ranks))[0]
    assert alpha_req(torch.from_numpy(z)) == pytest.approx(-slope, rel=1e-6)
    assert np.isnan(alpha_req(torch.from_numpy(z[:, :5])))  # too few ranks for a line
    assert np.isnan(alpha_req(torch.full((20, 8), torch.nan)))
    assert np.isnan(alpha_req(torch.ones(20, 8)))


@settings(max_examples=20, deadline=None)
@SIZES
def test_numbers_of_pairs_are_their_formulas(samples: int, width: int, seed: int) -> None:
    z = noise(samples, width, seed)
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    given_ = torch.from_numpy(z)
    pairs = [(i, j) for i in range(samples) for j in range(i)]
    assert dimension_std(given_) == pytest.approx(u.std(0).mean())
    assert mean_cosine(given_) == pytest.approx(np.mean([u[i] @ u[j] for i, j in pairs]))
    potentials = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i, j in pairs]
    assert uniformity(given_) == pytest.approx(np.log(np.mean(potentials)))
    other = noise(samples, width, seed + 50)
    v = other / np.linalg.norm(other, axis=1, keepdims=True)
    assert alignment(given_, torch.from_numpy(other)) == pytest.approx(((u - v) ** 2).sum(1).mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 40), st.integers(3, 8), st.integers(0, 10), st.floats(0.01, 100))
def test_scale_and_rotation_change_nothing(samples: int, width: int, seed: int, scale: float) -> None:
    z = torch.from_numpy(noise(samples, width, seed))
    turned = z @ torch.linalg.qr(torch.from_numpy(noise(width, width, seed + 1)))[0] * scale
    for number in (rankme, effective_rank, mean_cosine, uniformity):
        assert number(turned) == pytest.approx(number(z), rel=1e-6, abs=1e-9)


def test_what_evenly_spread_features_give() -> None:
    z = torch.randn(3000, 256, generator=torch.Generator().manual_seed(0))
    assert effective_rank(z) > 200
    assert dimension_std(z) == pytest.approx(1 / 16, rel=0.02)
    assert mean_cosine(z) == pytest.approx(0, abs=1e-3)
    assert uniformity(z) == pytest.approx(-4, abs=0.05)
    assert alignment(z, z.flip(0)) == pytest.approx(2, abs=0.05)
    assert alignment(z, 3 * z) == pytest.approx(0, abs=1e-12)


def test_what_collapsed_features_give() -> None:
    z = torch.ones(50, 8)
    assert effective_rank(z) == pytest.approx(1)
    assert rankme(z) == pytest.approx(1, abs=1e-3)
    assert dimension_std(z) == pytest.approx(0, abs=1e-7)
    assert mean_cosine(z) == pytest.approx(1)
    assert uniformity(z) == pytest.approx(0, abs=1e-6)


def test_pairs_of_many_samples_are_those_of_some() -> None:
    z = torch.from_numpy(noise(300, 6, 0))
    assert uniformity(z, most=300) == uniformity(z)
    assert uniformity(z, most=100) == uniformity(z[::3])
    assert uniformity(z, t=1) > uniformity(z, t=2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300))
def test_some_of_many_lie_evenly_among_them(size: int, most: int) -> None:
    chosen = spread(size, most)
    assert len(chosen) == min(size, most)
    assert chosen[0] == 0
    gaps = np.diff([*chosen.tolist(), size])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("number", [dimension_std, mean_cosine, uniformity, lambda z: alignment(z, z)])
def test_features_without_direction_are_refused(number: Any) -> None:
    for bad in (0.0, float("nan"), float("inf")):
        z = torch.ones(5, 3)
        z[2] = bad
        with pytest.raises(NumericError, match="1 features are not finite or have length zero"):
            number(z)


# -- of an encoder


def test_an_encoder_has_every_number(tmp_path: Any) -> None:
    write_shards(((image, None) for image, _ in pictures(40)), tmp_path, "s")  # nobody labelled them
    found = {outcome.metric: outcome for outcome in run_health(subject_of(make(), Shards(str(tmp_path))))}
    assert list(found) == ["RankMe", "alpha-ReQ", "effective rank", "std", "cosine", "uniformity", "alignment", "attention distance"]  # fmt: skip
    assert all(outcome.unit == ("px" if "distance" in name else "") for name, outcome in found.items())
    assert all(f"{name}: " in outcome.protocol for name, outcome in found.items())
    assert all("features: mean" in outcome.protocol for outcome in found.values())
    assert "40 test images, 16 dimensions; features: mean, fp32; no labels" in found["RankMe"].protocol
    layers = found["attention distance"].detail["attention_distance"]
    assert np.shape(layers) == (2, 2)
    assert found["attention distance"].values[0] == pytest.approx(np.mean(layers), abs=1e-3)
    assert not EVALUATORS["health"].labels
    assert not EVALUATORS["health"].train


def test_what_cannot_be_had_has_no_row(tmp_path: Any) -> None:
    write_shards(iter(pictures(20, (32, 32), mode="RGB")), tmp_path, "s")
    other = make(
        name="convnext_atto", image_size=32, pool="head", channels=3, patch=None, width=None, depth=None, heads=None
    )
    names = {outcome.metric for outcome in run_health(subject_of(other, Shards(str(tmp_path))))}
    assert "attention distance" not in names
    assert "alignment" in names
    stored = subject_of(None, Shards(str(tmp_path)), torch.randn(20, 5))
    assert [outcome.metric for outcome in run_health(stored)] == [
        "RankMe",
        "effective rank",
        "std",
        "cosine",
        "uniformity",
    ]
    for number in (uniformity, mean_cosine):
        with pytest.raises(UsageError, match="compares images with each other; test has 1"):
            number(torch.ones(1, 4))
    with pytest.raises(UsageError, match="compares images with each other; test has 1"):
        run_health(subject_of(None, Shards(str(tmp_path)), torch.randn(1, 5)))


@pytest.mark.parametrize("fields", [{"frames": 4, "tube": 2}, {"channels": 3, "channel_tokens": True}])
def test_planes_have_every_number_too(fields: dict[str, Any], tmp_path: Any) -> None:
    if "frames" in fields:
        drawn = np.random.default_rng(0)
        files = [(f"{i:02d}.npy", npy(drawn.integers(0, 255, (1, 6, 10, 10)).astype(np.uint8))) for i in range(12)]
        (tmp_path / "x.tar").write_bytes(make_tar(files))
        build_index(tmp_path / "x.tar")
    else:
        write_shards(iter(pictures(12, mode="RGB")), tmp_path, "s")
    assert len(run_health(subject_of(make(**fields), Shards(str(tmp_path))))) == 8


def test_views_are_two_of_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = (Shards("digits:train"), Shards("digits:test"))
    subject = Subject(**{**vars(subject_of(make(), sets[1])), "sets": sets})
    first, second = two_views(subject, 40)
    again = two_views(subject, 40)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert first.shape == (40, 16)
    plain = subject.held[spread(len(subject.held), 40)]
    centre = subject.held.mean(0)  # views of an image are nearer to it than to another
    near, far = (first - plain).norm(dim=1), (first - plain.roll(1, 0)).norm(dim=1)
    assert near.mean() < far.mean() < 3 * (plain - centre).norm(dim=1).mean()
    monkeypatch.setattr(health, "VIEW", health.VIEW.model_copy(update={"crop_scale": None, "flip": 0.0}))
    assert torch.allclose(two_views(subject, 40)[0], plain, atol=1e-5)
    assert torch.equal(*two_views(subject, 40))


def test_attention_is_looked_at_on_some_test_images() -> None:
    sets, encoder = (Shards("digits:train"), Shards("digits:test")), make()
    subject = Subject(**{**vars(subject_of(encoder, sets[1])), "sets": sets})
    [images] = prepared(encoder.preprocessing, sets[1], CPU, spread(len(sets[1]), 12).numpy())
    expected = torch.stack([attention_distance(encoder, image[None]) for image in images]).mean(0)
    found = attention_reach(subject, 12)
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-5)


def test_each_image_has_views_of_its_own(tmp_path: Any) -> None:
    [(image, _)] = pictures(1)
    write_shards(iter([(image, None)] * 12), tmp_path, "s")
    first, second = two_views(subject_of(make(), Shards(str(tmp_path))))
    assert len(torch.cat([first, second]).round(decimals=5).unique(dim=0)) > 20


def test_a_score_never_rests_on_a_substitute(tmp_path: Any) -> None:
    write_shards(iter(pictures(30)), tmp_path, "s")
    shards = Shards(str(tmp_path))
    subject = subject_of(make(), shards)
    with shards.paths[0].open("r+b") as file:
        file.seek(int(shards._locate(3)[1]["offset"]) + 40)
        file.write(b"rot")
    with pytest.raises(DataError, match=r"s-000000.tar@\d+: "):
        two_views(Subject(**{**vars(subject), "sets": (Shards(str(tmp_path)),) * 2}))


def test_health_tells_a_collapsed_encoder_from_a_trained_one() -> None:
    """Checkpoints are chosen by this: three numbers of them, each the way that docs/evaluation.md says."""
    torch.manual_seed(0)  # of the head
    shards = Shards("digits:test")
    trained = make(width=32, depth=1).train()
    images = torch.cat(list(prepared(trained.preprocessing, shards, CPU)))
    labels, head = torch.from_numpy(shards.labels.astype(np.int64)), torch.nn.Linear(32, 10)
    optimizer = torch.optim.Adam([*trained.parameters(), *head.parameters()], lr=0.01)
    for step in range(40):
        chosen = torch.arange(step * 64, step * 64 + 64) % len(images)
        loss = torch.nn.functional.cross_entropy(head(trained.embed(images[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained.eval()
    collapsed = make(width=32, depth=1)
    collapsed.load_state_dict(trained.state_dict())
    collapsed.backbone.norm.weight.data.mul_(1e-3)
    collapsed.backbone.norm.bias.data.fill_(1)
    good, bad = (
        {row.metric: row.values[0] for row in run_health(subject_of(encoder, shards))}
        for encoder in (trained, collapsed)
    )
    assert good["RankMe"] > 2 * bad["RankMe"]
    assert good["std"] > 10 * bad["std"]
    assert good["uniformity"] < bad["uniformity"] - 0.1
    assert good["cosine"] < bad["cosine"]
    assert bad["cosine"] == pytest.approx(1, abs=1e-3)


def test_numbers_of_a_known_spectrum() -> None:
    """A covariance of eigenvalues 1/2, 1/4, 1/4 has entropy 1.5 log 2."""
    z = torch.tensor(
        [[1, 0, 0], [-1, 0, 0], [0, sqrt(0.5), 0], [0, -sqrt(0.5), 0], [0, 0, sqrt(0.5)], [0, 0, -sqrt(0.5)]]
    )
    assert effective_rank(z) == pytest.approx(exp(1.5 * log(2)), rel=1e-6)
