"""Test images that were seen before: the same, nearly the same, or in pretraining."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from PIL import Image
from scipy.fft import dctn
from sklearn.datasets import load_sample_images

from selfsight.data.build import write_shards
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.eval.evaluate import evaluate
from selfsight.eval.leaks import alike_in_train, pretraining_of, pretraining_warnings, same_in_train
from selfsight.eval.phash import near, phash
from selfsight.recipe import DataConfig, EncoderConfig

SIDE = 61  # of the tiles that photographs are cut in


@pytest.fixture(scope="module")
def tiles() -> list[Image.Image]:
    """140 pieces of scikit-learn's two photographs that show something; grey."""
    photos = [Image.fromarray(photo).convert("L") for photo in load_sample_images().images]
    corners = [(x, y) for y in range(0, 427 - SIDE, SIDE) for x in range(0, 640 - SIDE, SIDE)]
    cut = [photo.crop((x, y, x + SIDE, y + SIDE)) for photo in photos for x, y in corners]
    return [tile for tile in cut if np.asarray(tile).std() > 12]


def inputs(images: list[Image.Image], size: int = 64) -> torch.Tensor:
    """As an encoder sees them: (N, 1, S, S), normalised."""
    pixels = [np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float32) for image in images]
    return (torch.from_numpy(np.stack(pixels))[:, None] / 255 - 0.5) / 0.25


def encoded(image: Image.Image, quality: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_the_bits_are_those_of_scipys_transform(tiles: list[Image.Image]) -> None:
    images = inputs(tiles, 32)
    made = np.unpackbits(phash(images)[:, :8].numpy(), axis=1)
    for image, bits in zip(images[:, 0].numpy(), made, strict=True):
        lowest = dctn(image, type=2)[:8, :8].flatten()[1:]
        assert bits[0] == 0
        assert (bits[1:] == (lowest > np.median(lowest))).mean() > 0.98  # unnormalised; rounding near the median


@pytest.mark.parametrize("copy", ["jpeg", "smaller", "darker", "noise"])
def test_copies_are_found_and_neighbours_are_not(tiles: list[Image.Image], copy: str) -> None:
    rng = np.random.default_rng(0)
    change = {
        "jpeg": lambda tile: encoded(tile, 40),
        "smaller": lambda tile: tile.resize((40, 40), Image.Resampling.LANCZOS),
        "darker": lambda tile: tile.point(lambda value: int(0.8 * value)),
        "noise": lambda tile: Image.fromarray(
            (np.asarray(tile) + rng.normal(0, 2, (SIDE, SIDE))).clip(0, 255).astype(np.uint8)
        ),
    }[copy]
    hashes, copies = phash(inputs(tiles)), phash(inputs([change(tile) for tile in tiles]))
    assert near(hashes, copies).mean() > 0.9
    half = len(tiles) // 2
    assert near(hashes[:half], copies[half:]).sum() <= 2  # other places of the same photographs


def test_flat_images_are_no_duplicates_of_each_other() -> None:
    flat = torch.full((5, 1, 16, 16), 0.7)
    flat[3] += 1e-4 * torch.randn(1, 16, 16)
    hashes = phash(flat)
    assert not hashes.any()
    assert not near(hashes, hashes).any()
    some = torch.cat([hashes, phash(torch.randn(3, 1, 16, 16))])
    assert near(some, some).tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 224, 224), (1, 4, 32, 32), (5, 17, 17)])
def test_every_kind_of_input_has_a_hash(shape: tuple[int, ...]) -> None:
    coarse = torch.randn(4, *shape[:-2], 7, 7)
    hashes = phash(torch.nn.functional.interpolate(coarse.flatten(1, -3), shape[-2:]).view(4, *shape))
    assert (hashes.shape, hashes.dtype) == ((4, 72), torch.uint8)
    assert near(hashes, hashes).all()
    assert not near(hashes[:2], hashes[2:]).any()
    assert near(hashes[:0], hashes).tolist() == [False] * 4
    assert near(hashes, hashes[:0]).tolist() == []


def test_digits_of_different_people_are_no_duplicates() -> None:
    """64 bits alone take 19 of the 359 test digits for one of train."""
    encoder = _encoder()
    found = evaluate(encoder, "digits:train", "digits:test", evaluators=("knn",))
    assert found["warnings"] == []


def _encoder() -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0).eval()


def _shards(folder: Path, samples: list[Any]) -> str:
    folder.mkdir()
    write_shards(iter(samples), folder, "s")
    return str(folder)


def test_the_same_and_the_nearly_same_are_counted_apart(tmp_path: Path) -> None:
    train, test = pictures(60), pictures(30, seed=1)
    test[4] = train[11]
    for place in (7, 8):
        pixels = np.asarray(train[place][0]).astype(int)
        test[place] = (Image.fromarray((pixels // 2 * 2).astype(np.uint8)), 0)
    told: list[str] = []
    specs = _shards(tmp_path / "train", train), _shards(tmp_path / "test", test)
    found = evaluate(_encoder(), *specs, evaluators=("knn",), k=(5,), say=told.append)
    assert found["warnings"] == [
        "1 of the 30 test images are in train, too; their score is worth little",
        "2 of the 30 test images look nearly the same as one of train (perceptual hash); their score is worth little if "
        "they are the same scene",
    ]
    assert [line for line in told if "warning" in line] == [f"warning: {line}" for line in found["warnings"]]


def test_what_is_not_known_is_not_told() -> None:
    prints = np.arange(4, dtype=np.uint64)
    assert list(same_in_train(None, prints)) == list(same_in_train(prints, prints + 10)) == []
    assert list(alike_in_train(prints, prints, None, torch.zeros(4, 72, dtype=torch.uint8))) == []


def _export(folder: Path, data: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"selfsight": {"recipe": {"data": data}}}))
    return folder


def test_pretraining_on_test_is_told_and_on_train_is_not(tmp_path: Path) -> None:
    train, test = Shards("digits:train"), Shards("digits:test")
    same = _export(tmp_path / "a", {"train": "digits:test"})
    (told,) = pretraining_warnings(same, [test])
    assert told.startswith("359 of the 359 images of digits:test were used for pretraining (without labels)")
    assert list(pretraining_warnings(same, [train])) == []
    assert list(pretraining_warnings(_export(tmp_path / "b", {"train": "digits:train"}), [test])) == []
    mixed = {"train": None, "mix": [{"train": "digits:train"}, {"train": ["digits:test"]}]}
    assert len(list(pretraining_warnings(_export(tmp_path / "c", mixed), [test, train]))) == 2


def test_pretraining_data_that_cannot_be_read_are_told_in_one_line(tmp_path: Path) -> None:
    (told,) = pretraining_warnings(_export(tmp_path / "a", {"train": "/gone/x.tar"}), [Shards("digits:test")])
    assert told.startswith("whether test images were used for pretraining is not known: /gone/x.tar cannot be read (")
    signed = {"train": "https://***@far.example/{000..003}.tar?***"}
    (told,) = pretraining_warnings(_export(tmp_path / "b", signed), [Shards("digits:test")])
    assert "its address was stored without what opens it" in told


@pytest.mark.parametrize("text", ["", "[]", "{", '{"selfsight": {}}', '{"selfsight": {"recipe": {"data": {"mix": 3}}}}',
    '{"selfsight": {"recipe": {"data": {"train": 7}}}}', '{"selfsight": {"recipe": {"data": {"train": [7]}}}}'])  # fmt: skip
def test_an_encoder_that_does_not_say_what_it_saw(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert pretraining_of(tmp_path) is None
    assert list(pretraining_warnings(tmp_path, [Shards("digits:test")])) == []


def test_a_run_and_a_checkpoint_say_what_they_saw(tmp_path: Path) -> None:
    for step in (3, 12):
        folder = tmp_path / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"recipe": {"data": {"train": f"at {step}"}}}))
    assert pretraining_of(tmp_path) == ["at 12"]
    assert pretraining_of(tmp_path / "checkpoints" / "step-00000003") == ["at 3"]
    _export(tmp_path / "encoder", {"train": ["x", "y"]})
    assert pretraining_of(tmp_path) == [["x", "y"]]
