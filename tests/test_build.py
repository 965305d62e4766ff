"""Packing images from every kind of source."""

import gzip
import json
import lzma
import os
import struct
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, pictures
from PIL import Image
from test_tar import make_tar

from selfsight import cli
from selfsight.data.build import Encoding, build
from selfsight.data.check import Measure, check
from selfsight.data.decode import open_image
from selfsight.data.folders import Reading
from selfsight.data.index import build_index, write_index
from selfsight.data.shards import Shards
from selfsight.errors import DataError, UsageError

CIFAR = ROOT.parent / "shared" / "data" / "cifar10"


def fill(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), size: tuple[int, int] = (40, 30)) -> None:
    for i, (image, _) in enumerate(pictures(6, size, mode="RGB")):
        target = folder / classes[i % len(classes)] if classes else folder
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{i}.{'jpg' if i % 2 else 'png'}")


def test_a_folder_of_classes(tmp_path: Path) -> None:
    fill(tmp_path / "src")
    built = build(str(tmp_path / "src"), tmp_path / "out")
    assert (built.samples, built.classes, built.shards) == (6, 2, 1)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    shards = Shards(str(tmp_path / "out"))
    assert shards.labels.tolist() == [0, 0, 0, 1, 1, 1]
    originals = [path.read_bytes() for path in sorted((tmp_path / "src").rglob("*.*"))]
    assert [shards.read(i) for i in range(6)] == originals
    with tarfile.open(shards.paths[0]) as tar:  # any other tool reads it
        assert sorted(tar.getnames())[:2] == ["000000000.cls", "000000000.png"]


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    fill(tmp_path / "src", classes=())
    assert build(str(tmp_path / "src"), tmp_path / "out").classes == 0
    assert Shards(str(tmp_path / "out")).labels.tolist() == [-1] * 6
    fill(tmp_path / "src2")
    assert build(str(tmp_path / "src2"), tmp_path / "out2", reading=Reading(unlabelled=True)).classes == 0


def test_short_side_and_format(tmp_path: Path) -> None:
    fill(tmp_path / "src")
    build(str(tmp_path / "src"), tmp_path / "out", encoding=Encoding(short_side=15, format="webp", quality=80))
    shards = Shards(str(tmp_path / "out"))
    images = [open_image(shards.read(i)) for i in range(6)]
    assert {(image.format, image.size) for image in images} == {("WEBP", (20, 15))}


def test_small_images_are_not_enlarged_and_orientation_is_applied(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10, 20), "red").save(tmp_path / "src" / "a.jpg", exif=exif)
    build(str(tmp_path / "src"), tmp_path / "out", encoding=Encoding(short_side=64))
    assert open_image(Shards(str(tmp_path / "out")).read(0)).size == (20, 10)


@pytest.mark.parametrize(("suffix", "pack"), [(".tar", bytes), (".tar.gz", gzip.compress), (".tar.xz", lzma.compress)])
def test_tars_are_unpacked_and_not_rewritten(tmp_path: Path, suffix: str, pack: type) -> None:
    raw = make_tar([("x.png", _png()), ("x.cls", b"4"), ("y.png", _png()), ("y.cls", b"5")])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / f"set{suffix}").write_bytes(pack(raw))
    for source in (tmp_path / "src", tmp_path / "src" / f"set{suffix}", f"{tmp_path}/src/set*{suffix}"):
        out = tmp_path / f"out-{len(os.listdir(tmp_path))}"
        assert build(str(source), out).samples == 2
        assert (out / "set.tar").read_bytes() == raw
    build(str(tmp_path / "src"), tmp_path / "again", encoding=Encoding(format="jpeg"))
    assert Shards(str(tmp_path / "again")).labels.tolist() == [4, 5]


def test_a_torchvision_dataset_by_name(tmp_path: Path) -> None:
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    for part, count in (("train", 7), ("t10k", 3)):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + pixels[:count].tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + bytes(range(count)))
    assert build("FashionMNIST", tmp_path / "train", root=tmp_path / "root").samples == 7
    built = build("FashionMNIST", tmp_path / "test", root=tmp_path / "root", split="test")
    shards = Shards(str(built.folder))
    assert shards.labels.tolist() == [0, 1, 2]
    assert np.array_equal(np.asarray(open_image(shards.read(2))), pixels[2])
    assert json.loads((tmp_path / "test" / "classes.json").read_text())[0] == "T-shirt/top"
    with pytest.raises(DataError, match="--download lets torchvision fetch it"):
        build("CIFAR10", tmp_path / "none", root=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="did you mean CIFAR10"):
        build("CIFAR-10", tmp_path / "none")


def test_nothing_half_built_remains(tmp_path: Path) -> None:
    fill(tmp_path / "src")
    (tmp_path / "src" / "cat" / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"bad.jpg: not an image"):
        build(str(tmp_path / "src"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["src"]
    with pytest.raises(UsageError, match="exists already"):
        build("digits:train", tmp_path / "src")
    with pytest.raises(DataError, match="no images below"):
        (tmp_path / "empty").mkdir()
        build(str(tmp_path / "empty"), tmp_path / "out")


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    build("digits:test", tmp_path / "out")
    shards = Shards(str(tmp_path / "out"))
    pixels, labels = load_digits(return_X_y=True)
    assert shards.labels.tolist() == labels[4::5].tolist()
    stored = np.stack([np.asarray(open_image(shards.read(i))) for i in range(len(shards))])
    assert np.array_equal(np.rint(stored.astype(float) * 16 / 255), pixels[4::5].reshape(-1, 8, 8))


def test_what_cameras_write(tmp_path: Path) -> None:
    """A JPEG with a second picture (MPO), 16 bits in grey, a truncated file, and a name with a percent sign."""
    (tmp_path / "src").mkdir()
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "src" / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / "src" / "b.png")
    build(str(tmp_path / "src"), tmp_path / "100% kept")
    shards = Shards(str(tmp_path / "100% kept"))
    assert shards.read(0) == (tmp_path / "src" / "a.jpg").read_bytes()
    build(str(tmp_path / "src"), tmp_path / "again", encoding=Encoding(format="webp", quality=100))
    ramp = np.asarray(open_image(Shards(str(tmp_path / "again")).read(1)).convert("L")).ravel().astype(int)
    assert np.abs(ramp - np.linspace(0, 255, 64)).max() < 16  # scaled, not clipped
    out = BytesIO()
    pictures(1, (64, 64), mode="RGB")[0][0].save(out, "JPEG", quality=100)
    (tmp_path / "src" / "c.jpg").write_bytes(out.getvalue()[:-2000])
    with pytest.raises(DataError, match="image 3 of the source: damaged image"):
        build(str(tmp_path / "src"), tmp_path / "none", encoding=Encoding(short_side=8))


def test_tars_of_the_same_name_are_not_merged_in_silence(tmp_path: Path) -> None:
    for folder in ("d1", "d2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.tar").write_bytes(make_tar([("x.png", _png())]))
    with pytest.raises(UsageError, match=r"a second shard of the name s.tar"):
        build(f"{tmp_path}/d{{1,2}}/s.tar", tmp_path / "out")


def test_check_sees_labels_that_changed_behind_the_index(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([("a.png", _png()), ("a.cls", b"1")]))
    assert cli.main(["shards", "index", str(tmp_path / "x.tar")]) == 0
    assert check(Shards(str(tmp_path)))["bad"] == []
    (tmp_path / "x.tar").write_bytes(make_tar([("a.png", _png()), ("a.cls", b"2")]))
    assert [bad["sample"] for bad in check(Shards(str(tmp_path)))["bad"]] == ["x.tar"]


def test_check_takes_an_index_from_before_there_were_fingerprints(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([("a.png", _png()), ("a.cls", b"1"), ("b.png", _png())]))
    records = build_index(tmp_path / "x.tar").copy()
    records["print"] = 0
    size = (tmp_path / "x.tar").stat().st_size
    write_index(tmp_path / "x.tar.idx", records, size)
    assert check(Shards(str(tmp_path)))["bad"] == []
    records["print"][1] = 7
    write_index(tmp_path / "x.tar.idx", records, size)
    assert [bad["sample"] for bad in check(Shards(str(tmp_path)))["bad"]] == ["x.tar"]


def test_a_folder_of_tars_may_hold_what_was_made_of_them(tmp_path: Path) -> None:
    """An index, statistics, and copies that are being written."""
    raw = make_tar([("x.png", _png())])
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "s.tar").write_bytes(raw)
    build_index(tmp_path / "src" / "s.tar")
    check(Shards(str(tmp_path / "src")), measure=Measure())
    (tmp_path / "src" / "s.tar.123.tmp").write_bytes(b"half")
    assert build(str(tmp_path / "src"), tmp_path / "out").samples == 1
    (tmp_path / "src" / "s.tar.123.tmp").unlink()
    assert build(f"{tmp_path}/src/*.tar*", tmp_path / "again", encoding=Encoding(format="png")).samples == 1
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(_png())
    (tmp_path / "images" / "a.tar.sha256").write_text("x")
    assert build(str(tmp_path / "images"), tmp_path / "of-images").samples == 1


def test_check_finds_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [("a.png", _png()), ("a.cls", b"1"), ("b.png", _png()), ("b.cls", b"2"), ("c.jpg", b"\xff\xd8\xff broken")]
    (tmp_path / "x.tar").write_bytes(make_tar(files))
    assert cli.main(["shards", "index", str(tmp_path / "x.tar")]) == 0
    assert capsys.readouterr().out == "3 samples in 1 shards indexed\n"
    found = check(Shards(str(tmp_path)))
    assert (found["samples"], found["labels"], found["unlabelled"], found["duplicates"]) == (3, {1: 1, 2: 1}, 1, 1)
    assert found["kinds"] == {"PNG RGB": 2}
    assert [bad["sample"] for bad in found["bad"]] == ["x.tar@4608"]
    assert cli.main(["shards", "check", str(tmp_path)]) == 65
    shown = capsys.readouterr()
    assert "exact duplicates" in shown.out
    assert "x.tar@4608: " in shown.err


@pytest.mark.skipif(not CIFAR.is_dir(), reason="the packed CIFAR-10 shards are not on this machine")
def test_real_cifar10_shards_unpack_and_read(tmp_path: Path) -> None:
    built = build(str(CIFAR / "cifar10-test-000000.tar.xz"), tmp_path / "out")
    assert (built.samples, built.classes) == (5000, 10)
    shards = Shards(str(tmp_path / "out"))
    pixels = np.stack([np.asarray(open_image(shards.read(i))) for i in range(0, 5000, 5)]) / 255
    assert np.allclose(pixels.mean((0, 1, 2)), [0.494, 0.485, 0.450], atol=0.02)


def _png() -> bytes:
    out = BytesIO()
    Image.new("RGB", (4, 4), "blue").save(out, "PNG")
    return out.getvalue()
