"""Evaluators against outside references, and the honesty of the protocol.

Mutations that these tests caught when they were tried: temperature dropped from the vote, k chosen on test, the probe's bias
decayed, the mean of all tokens instead of the patches', labels read in shard order for features in another.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from webfault import Plan, Server

from selfsight import cli
from selfsight.data.build import write_shards
from selfsight.data.decode import Form, decode
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, NumericError, UsageError
from selfsight.eval.evaluate import evaluate
from selfsight.eval.features import extract, pixels_of
from selfsight.eval.health import rankme
from selfsight.eval.knn import knn
from selfsight.eval.online import OnlineKNN
from selfsight.recipe import DataConfig, EncoderConfig, EvalConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0).eval()


# -- features


def test_features_are_embed_of_timms_transform_in_order(encoder: Encoder) -> None:
    shards = Shards("digits:test")
    ids = np.array([300, 5, 17])
    features = extract(encoder, shards, CPU, ("mean", "cls", "cls+mean"), ids)
    made = encoder.preprocessing
    transform = create_transform((1, 8, 8), mean=made.mean, std=made.std, crop_pct=1.0, interpolation="bicubic")
    images = torch.stack([transform(Image.fromarray(decode(shards.read(i), Form(1))[0])) for i in ids.tolist()])  # type: ignore[misc]
    with torch.inference_mode():
        for pool, vectors in features.vectors.items():
            assert torch.allclose(vectors, encoder.embed(images, pool), atol=1e-5)
    assert features.labels.tolist() == shards.labels[ids].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_counted_once(encoder: Encoder, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.features.BATCH", 100)
    monkeypatch.setattr("selfsight.eval.features.FEW_BATCHES", 0)
    shards = Shards("digits:test")
    seen: list[int] = []
    features = extract(encoder, shards, CPU, workers=workers, advance=seen.append)
    assert seen == [100, 100, 100, 59] or workers
    assert len(features.labels) == sum(seen) == 359
    monkeypatch.setattr("selfsight.eval.features.BATCH", 359)
    assert torch.allclose(features.vectors["mean"], extract(encoder, shards, CPU).vectors["mean"], atol=1e-5)


def test_extraction_leaves_the_encoder_as_it_was(encoder: Encoder) -> None:
    encoder.train()
    extract(encoder, Shards("digits:test"), CPU, ids=np.arange(20))
    assert encoder.training
    encoder.eval()


def test_pixels_are_pixels(encoder: Encoder) -> None:
    shards = Shards("digits:test")
    found = pixels_of(shards, encoder.preprocessing).vectors["pixels"]
    assert torch.equal(
        (found[7, :-1].view(8, 8) * 255).round().byte(), torch.from_numpy(decode(shards.read(7), Form(1))[0].copy())
    )


def test_a_black_image_has_a_place_among_the_pixels(encoder: Encoder, tmp_path: Path) -> None:
    samples = pictures(40)
    samples[5] = (Image.new("L", (8, 8), 0), 1)
    write_shards(iter(samples), tmp_path, "s")
    found = evaluate(encoder, str(tmp_path), str(tmp_path), evaluators=("knn",), k=(5,))["scores"]
    assert len(found) == 4


def test_scores_name_their_sets_without_what_opens_them(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    write_shards(iter(pictures(40)), tmp_path, "s")
    with Server({f"/{file.name}": Plan(file.read_bytes()) for file in tmp_path.glob("*.tar*")}) as server:
        far = f"{server.address}/s-{{000000..000000}}.tar"
        signed = far.replace("://", "://me:hunter2@") + "?X-Sig=hunter2"
        found = evaluate(encoder, signed, [signed], evaluators=("knn",), k=(5,))
    assert "hunter2" not in json.dumps(found)
    assert {score["train"] for score in found["scores"]} == {far.replace("://", "://***@") + "?***"}


def test_unlabelled_one_class_and_broken_images_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    write_shards(((image, None) for image, _ in pictures(30)), tmp_path / _made(tmp_path, "none"), "s")
    write_shards(iter(pictures(30, classes=1)), tmp_path / _made(tmp_path, "one"), "s")
    write_shards(iter(pictures(30)), tmp_path / _made(tmp_path, "rot"), "s")
    with pytest.raises(UsageError, match="30 of 30 samples have no label; scores need labels"):
        evaluate(encoder, str(tmp_path / "none"), str(tmp_path / "rot"))
    with pytest.raises(UsageError, match="all 30 samples have the label 0; scores need two classes"):
        evaluate(encoder, str(tmp_path / "one"), str(tmp_path / "rot"))
    with pytest.raises(UsageError, match="have no label"):
        OnlineKNN(EvalConfig(train=str(tmp_path / "none")))
    shards = Shards(str(tmp_path / "rot"))
    with shards.paths[0].open("r+b") as file:
        file.seek(int(shards._locate(3)[1]["offset"]) + 40)
        file.write(b"rot")
    with pytest.raises(DataError, match=r"s-000000.tar@\d+: "):  # a score never rests on a substitute
        extract(encoder, shards, CPU)


def _made(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name


def test_features_that_are_not_finite_are_refused() -> None:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    broken = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    broken.backbone.norm.bias.data[0] = float("nan")
    with pytest.raises(NumericError, match="not finite"):
        extract(broken, Shards("digits:test"), CPU)


# -- the whole


def test_scores_stand_beside_their_floors(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 50)
    monkeypatch.setattr("selfsight.eval.linear.EPOCHS", 1)
    asked = ("knn", "linear")
    found = evaluate(encoder, "digits:train", "digits:test", k=(10, 20), evaluators=asked)["scores"]
    assert [(s["encoder"], s["evaluator"]) for s in found] == [
        ("pretrained", "knn"), ("pretrained", "linear"), ("random-init", "knn"), ("random-init", "linear"),
        ("pixels", "knn"), ("pixels", "linear"), ("majority", "knn"), ("majority", "linear"),
    ]  # fmt: skip
    assert all(set(s) >= {"encoder", "evaluator", "train", "test", "value", "std", "n", "protocol"} for s in found)
    assert all(0 <= s["value"] <= 100 for s in found)
    by = {(s["encoder"], s["evaluator"]): s for s in found}
    assert (by["pretrained", "linear"]["n"], by["random-init", "knn"]["n"], by["pixels", "knn"]["n"]) == (3, 3, 1)
    assert by["pixels", "knn"]["value"] > 95
    labels = Shards("digits:train").labels
    common = np.bincount(labels).argmax()
    assert by["majority", "linear"]["value"] == pytest.approx(100 * (Shards("digits:test").labels == common).mean())
    assert "chosen from (10, 20) on a held-out tenth of train" in by["pretrained", "knn"]["protocol"]
    json.dumps(found)
    with pytest.raises(UsageError, match="no evaluator knm; there are knn, linear"):
        evaluate(encoder, "digits:train", "digits:test", evaluators=("knm",))


def test_an_untrained_encoder_scores_like_its_twins(encoder: Encoder) -> None:
    """The encoder here is the twin of seed 0: its score is one of the three that the floor is the mean of."""
    twins = [build_encoder(encoder.config, encoder.preprocessing, seed) for seed in range(3)]
    sets = [Shards("digits:train"), Shards("digits:test")]
    values = []
    for twin in twins:
        fit, held = (extract(twin, shards, CPU) for shards in sets)
        values.append(knn(fit.vectors["mean"], fit.labels, held.vectors["mean"], held.labels).accuracy)
    found = evaluate(encoder, "digits:train", "digits:test", evaluators=("knn",))["scores"]
    assert found[0]["value"] == pytest.approx(values[0])
    assert found[1]["value"] == pytest.approx(np.mean(values))
    assert found[1]["std"] == pytest.approx(np.std(values, ddof=1))


def test_the_online_score_never_reads_the_test_set(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    online = OnlineKNN(EvalConfig(train="digits:train", test="/nowhere", online_samples=300))
    assert len(online.ids) <= 300
    assert not set(online.bank.tolist()) & set(online.queries.tolist())
    found = online(encoder, CPU)
    assert set(found) == {"knn", "rankme", "alpha"}
    assert 0 < found["knn"] <= 100
    assert online(encoder, CPU) == found


@settings(max_examples=20)
@given(st.integers(2, 30), st.integers(2, 10), st.integers(0, 10))
def test_rankme_is_the_papers_formula(samples: int, width: int, seed: int) -> None:
    z = np.random.default_rng(seed).normal(size=(samples, width))
    singular = np.linalg.svd(z, compute_uv=False)
    p = singular / np.abs(singular).sum() + 1e-7
    assert rankme(torch.from_numpy(z)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_rankme_sees_collapse() -> None:
    line = torch.randn(50, 1) @ torch.randn(1, 8)
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(8).repeat(10, 1)) == pytest.approx(8, abs=1e-3)


def test_eval_from_the_command_line(
    encoder: Encoder,
    tmp_path: Path,
    selfsight: Callable[..., Any],
    unchecked_export: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from selfsight.exports.export import export

    export(encoder, tmp_path / "enc", {})
    done = selfsight(
        "eval", tmp_path / "enc", "--train", "digits:train", "--test", "digits:test", "--with", "knn", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer == evaluate(tmp_path / "enc", "digits:train", "digits:test", evaluators=("knn",))
    sets = ["--train", "digits:train", "--test", "digits:test"]
    assert cli.main(["eval", str(tmp_path / "enc"), *sets, "--with", "knn"]) == 0
    shown = capsys.readouterr()
    assert "random-init" in shown.out
    assert "pixels" in shown.out
    assert "kNN: cosine" in shown.err


def test_test_images_in_train_are_told(encoder: Encoder) -> None:
    told: list[str] = []
    evaluate(encoder, "digits:test", "digits:test", evaluators=["knn"], say=told.append)
    assert "warning: 359 of the 359 test images are in train, too; their score is worth little" in told
    told.clear()
    evaluate(encoder, "digits:train", "digits:test", evaluators=["knn"], say=told.append)
    assert not any("warning" in line for line in told)
