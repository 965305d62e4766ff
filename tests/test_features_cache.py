"""Kept features: the same score as fresh ones, and another file as soon as anything that decides a number changes."""

import os
from pathlib import Path

import pytest
import torch
from conftest import pictures
from safetensors.torch import load_file, save_file

from selfsight.data.build import write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.eval import extracted
from selfsight.eval.cache import Cache, default_folder, opened
from selfsight.eval.evaluate import evaluate
from selfsight.eval.extracted import Extractor
from selfsight.eval.features import Extraction, Features
from selfsight.recipe import DataConfig, EncoderConfig

CPU = torch.device("cpu")


def made(seed: int = 0, size: int = 8, **fields: object) -> Encoder:
    config = EncoderConfig(image_size=size, channels=1, patch=2, width=16, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x", **fields), config), seed).eval()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for every set that is encoded."""
    seen: list[str] = []
    real = extracted.extract

    def counted(encoder: Encoder, shards: Shards, *args: object, **more: object) -> Features:
        seen.append(shards.spec)
        return real(encoder, shards, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(extracted, "extract", counted)
    return seen


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    (tmp_path / "s").mkdir()
    write_shards(iter(pictures(40)), tmp_path / "s", "s")
    return Shards(str(tmp_path / "s"))


def test_a_kept_score_is_a_fresh_one(tmp_path: Path, runs: list[str]) -> None:
    encoder = made(7)
    call = lambda **more: evaluate(encoder, "digits:train", "digits:test", evaluators=["knn"], k=(10,), **more)  # noqa: E731
    fresh = call()
    assert len(runs) == 8
    assert call(cache=tmp_path) == fresh
    assert len(runs) == 16
    assert call(cache=tmp_path) == fresh
    assert len(runs) == 16
    assert len(list(tmp_path.iterdir())) == 10  # four encoders and the pixels, of two sets


def test_whatever_decides_a_number_makes_another_file(tmp_path: Path, shards: Shards, runs: list[str]) -> None:
    extractor, encoder = Extractor(CPU, cache=Cache(tmp_path / "kept")), made()

    def misses(encoder: Encoder, shards: Shards, pools: tuple[str, ...] = ("mean",), by: Extractor = extractor) -> bool:
        before = len(runs)
        by.features(encoder, pools, shards)
        by.features(encoder, pools, shards)
        assert len(runs) - before < 2  # at the second time it is there
        return len(runs) > before

    assert misses(encoder, shards)
    assert not misses(made(), shards)  # the same weights, made again
    changed = made()
    changed.backbone.norm.bias.data[3] += 1e-6
    assert misses(changed, shards)
    assert misses(made(size=16), shards)
    assert misses(made(mean=(0.4,)), shards)
    assert misses(made(crop_pct=0.9), shards)
    assert misses(encoder, shards, ("mean", "cls"))
    other = pictures(40)
    other[7] = pictures(40, seed=1)[7]
    (tmp_path / "o").mkdir()
    write_shards(iter(other), tmp_path / "o", "s")
    assert misses(encoder, Shards(str(tmp_path / "o")))
    keys = {
        extractor.key("w", ("mean",), shards, Extraction(scales, merge))
        for scales in ((1,), (1, 2))
        for merge in (0, 4)
    }
    assert len(keys) == 4


def test_other_labels_of_the_same_images_are_taken_from_the_index(
    tmp_path: Path, shards: Shards, runs: list[str]
) -> None:
    extractor, encoder = Extractor(CPU, cache=Cache(tmp_path / "kept")), made()
    first = extractor.features(encoder, ("mean",), shards)
    (tmp_path / "o").mkdir()
    write_shards(((image, 5 - label) for image, label in pictures(40)), tmp_path / "o", "s")
    second = extractor.features(encoder, ("mean",), Shards(str(tmp_path / "o")))
    assert len(runs) == 1
    assert torch.equal(first.vectors["mean"], second.vectors["mean"])
    assert torch.equal(first.labels, 5 - second.labels)
    assert first.hashes is not None and second.hashes is not None
    assert torch.equal(first.hashes, second.hashes)


@pytest.mark.parametrize("harm", ["cut", "flip", "foreign", "rows", "text", "gone"])
def test_a_damaged_file_is_made_again(tmp_path: Path, shards: Shards, runs: list[str], harm: str) -> None:
    extractor, encoder = Extractor(CPU, cache=Cache(tmp_path / "kept")), made()
    whole = extractor.features(encoder, ("mean",), shards)
    (file,) = (tmp_path / "kept").iterdir()
    body = file.read_bytes()
    if harm == "cut":
        file.write_bytes(body[:-100])
    elif harm == "flip":
        file.write_bytes(body[:-5] + bytes([body[-5] ^ 1]) + body[-4:])
    elif harm == "foreign":
        save_file(load_file(file), file)
    elif harm == "rows":
        save_file({name: rows[:-1].clone() for name, rows in load_file(file).items()}, file)
    elif harm == "text":
        file.write_text("no tensors here")
    else:
        file.unlink()
    again = extractor.features(encoder, ("mean",), shards)
    assert len(runs) == 2
    assert torch.equal(whole.vectors["mean"], again.vectors["mean"])
    extractor.features(encoder, ("mean",), shards)
    assert len(runs) == 2


def test_a_file_of_fewer_samples_is_not_taken(tmp_path: Path) -> None:
    Cache(tmp_path).put("a" * 64, {"mean": torch.zeros(5, 3), "hashes": torch.zeros(4, 72)})
    assert Cache(tmp_path).get("a" * 64, 5) is None
    Cache(tmp_path).put("a" * 64, {"mean": torch.zeros(5, 3)})
    assert Cache(tmp_path).get("a" * 64, 4) is None
    assert Cache(tmp_path).get("b" * 64, 5) is None
    assert Cache(tmp_path).get("a" * 64, 5) is not None


def test_the_files_not_used_for_longest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"mean": torch.zeros(1000, 25)}  # 100 kB
    monkeypatch.setenv("SELFSIGHT_FEATURES_GB", str(350_000 / 2**30))
    cache = opened(tmp_path)
    for n, key in enumerate("abc"):
        cache.put(key * 64, rows)
        os.utime(cache._path(tmp_path, key * 64), (n, n))
    assert cache.get("a" * 64, 1000) is not None  # used just now
    cache.put("d" * 64, rows)
    left = {path.name[0] for path in tmp_path.iterdir()}
    assert left == {"a", "c", "d"}
    cache.put("e" * 64, {"mean": torch.zeros(1000, 100)})  # more than the bound alone
    assert {path.name[0] for path in tmp_path.iterdir()} == left
    monkeypatch.setenv("SELFSIGHT_FEATURES_GB", "plenty")
    with pytest.raises(UsageError, match="SELFSIGHT_FEATURES_GB: 'plenty' is not a number of GiB"):
        opened(tmp_path)  # before anything is extracted
    assert opened(None).folder is None  # who keeps nothing is not asked


def test_drafts_of_killed_processes_go(tmp_path: Path) -> None:
    old, new = tmp_path / ".a.safetensors.1.tmp", tmp_path / ".b.safetensors.2.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (1, 1))
    Cache(tmp_path).put("a" * 64, {"mean": torch.zeros(2, 2)})
    assert new.exists() and not old.exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    Cache(tmp_path / "file" / "below").put("a" * 64, {"mean": torch.zeros(2, 2)})
    assert "warning: features are not kept in" in capsys.readouterr().err
    assert Cache(tmp_path / "file" / "below").get("a" * 64, 2) is None


def test_where_features_are_kept(tmp_path: Path) -> None:
    assert opened(None).folder is None and opened(False).folder is None
    assert opened(True).folder == default_folder() == Path(os.environ["SELFSIGHT_CACHE"]) / "features"
    assert opened(str(tmp_path)).folder == tmp_path
    assert opened(Cache(tmp_path)) == Cache(tmp_path)
