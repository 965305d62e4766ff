"""What is watched during training: kNN where there are labels, health where there are none, and neither ends a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures

from selfsight.data.build import write_shards
from selfsight.data.mixture import Mixture
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import NumericError
from selfsight.eval import health, online
from selfsight.eval.features import extract, prepared
from selfsight.eval.health import rankme
from selfsight.eval.online import OnlineHealth, OnlineKNN, watcher
from selfsight.recipe import DataConfig, EncoderConfig, EvalConfig
from selfsight.run_folder import read_lines
from selfsight.train import pretrain

CPU = torch.device("cpu")


@pytest.fixture
def encoder() -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)


@pytest.fixture
def unlabelled(tmp_path: Path) -> Shards:
    (tmp_path / "none").mkdir()
    write_shards(((image, None) for image, _ in pictures(50)), tmp_path / "none", "s")
    return Shards(str(tmp_path / "none"))


def test_health_needs_no_labels(encoder: Encoder, unlabelled: Shards) -> None:
    watch = watcher(EvalConfig(online_samples=25), unlabelled)
    assert isinstance(watch, OnlineHealth)
    assert watch.ids.tolist() == list(range(0, 50, 2))
    vectors = extract(encoder, unlabelled, CPU, ids=np.arange(0, 50, 2)).vectors["mean"]
    assert watch(encoder, CPU)["rankme"] == round(rankme(vectors), 2)
    assert encoder.training  # as it was
    both = watcher(EvalConfig(), Mixture([unlabelled, Shards("digits:test")], [None, None]))
    assert both(encoder, CPU)["rankme"] > 1
    assert isinstance(watcher(EvalConfig(train="digits:train"), unlabelled), OnlineKNN)


def test_images_that_cannot_be_read_are_left_out(encoder: Encoder, unlabelled: Shards) -> None:
    path = Path(str(unlabelled.paths[0]))
    body = bytearray(path.read_bytes())
    offset = int(unlabelled._locate(3)[1]["offset"])
    body[offset + 40 : offset + 43] = b"rot"
    path.write_bytes(body)
    shards = Shards(str(path.parent))
    (images,) = prepared(encoder.preprocessing, shards, CPU, lenient=True)
    assert len(images) == 49
    assert watcher(EvalConfig(), shards).score(encoder, CPU)["rankme"] > 1
    assert list(prepared(encoder.preprocessing, shards, CPU, np.array([3]), lenient=True)) == []


def test_what_cannot_be_told_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        health, "alpha_req", lambda vectors: float("nan") if len(vectors) < 6 else 1.23456, raising=False
    )
    assert set(online.healthy(torch.randn(5, 3))) == {"rankme"}
    assert online.healthy(torch.randn(9, 3))["alpha"] == 1.235
    assert online.healthy(torch.full((9, 3), float("nan"))) == {"alpha": 1.235}


def test_a_score_that_fails_is_told_and_ends_nothing(
    encoder: Encoder, unlabelled: Shards, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = watcher(EvalConfig(), unlabelled)
    encoder.embed = lambda images: (_ for _ in ()).throw(NumericError("no numbers"))  # type: ignore[assignment]
    assert watch.score(encoder, CPU) == {}
    assert "warning: the online score is left out: no numbers" in capsys.readouterr().err
    assert encoder.training  # and goes on with stochastic depth
    encoder.embed_pools = lambda *given: encoder.embed(None)  # type: ignore[assignment,method-assign,arg-type]
    assert OnlineKNN(EvalConfig(train="digits:train", online_samples=50)).score(encoder, CPU) == {}
    assert encoder.training


def test_a_run_without_labels_tells_its_health(
    small_fields: dict[str, Any], unchecked_export: None, tmp_path: Path
) -> None:
    found = pretrain("digits/mae", small_fields | {"eval.every": 3})
    assert found["scores"] == []
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "rankme" in line] == [3, 6]
    assert not any("knn" in line for line in lines)
