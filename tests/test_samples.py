"""What belongs together in a tar: images, clips of frames, labels and groups."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_tar import make_tar

from selfsight.data.decode import BadSample, Form
from selfsight.data.index import build_index, read_index
from selfsight.data.picture import Picture
from selfsight.data.samples import is_image, key_and_field, split_clip
from selfsight.data.shards import Shards
from selfsight.errors import DataError

LONG = "folder-of-a-name/" * 12  # 204 letters: a header of its own in a tar


def indexed(folder: Path, files: list[tuple[str, bytes]], form: str = "pax") -> Shards:
    (folder / "x.tar").write_bytes(make_tar(files, form))
    build_index(folder / "x.tar")
    return Shards(str(folder))


@pytest.mark.parametrize("form", ["pax", "gnu", "ustar"])
@pytest.mark.parametrize("prefix", ["", LONG])
def test_a_clip_is_one_read_and_its_frames_come_in_order(tmp_path: Path, form: str, prefix: str) -> None:
    if prefix and form == "ustar":
        prefix = "folder/" * 18 + "x" * 30 + "/"
    files = [(f"{prefix}a.{number}.jpg", f"frame {number}".encode() * 90) for number in ("2", "000", "10", "1")]
    others = [
        (f"{prefix}b.cls", b"3"),
        (f"{prefix}b.jpg", b"alone"),
        (f"{prefix}a.cls", b"7"),
        (f"{prefix}a.json", b"{}"),
    ]
    mixed = [others[0], files[0], others[1], files[1], others[2], files[2], others[3], files[3]]
    shards = indexed(tmp_path, mixed, form)
    clip = shards.frames.tolist().index(4)
    assert sorted(shards.frames.tolist()) == [0, 4]
    assert shards.labels.tolist()[clip] == 7
    calls, real = [], os.pread
    os.pread = lambda *a: calls.append(a) or real(*a)  # type: ignore[func-returns-value]
    try:
        body = shards.read(clip)
    finally:
        os.pread = real
    assert len(calls) == 1
    assert shards.images(clip, body) == [files[i][1] for i in (1, 3, 0, 2)]
    assert shards.images(1 - clip, shards.read(1 - clip)) == [b"alone"]


def test_frames_may_be_packed_volumes(tmp_path: Path) -> None:
    shards = indexed(tmp_path, [(f"a.{number}.nii.gz", b"%d" % number) for number in (10, 9)])
    assert shards.frames.tolist() == [2]
    assert shards.images(0, shards.read(0)) == [b"9", b"10"]
    with pytest.raises(DataError, match="holds 2 images"):
        indexed(tmp_path, [("a.0.x.jpg", b"x"), ("a.1.x.jpg", b"x")])


def test_frames_make_a_picture(tmp_path: Path) -> None:
    files = []
    for i in range(3):
        out = BytesIO()
        Image.new("L", (6, 5), 10 * i).save(out, "PNG")
        files.append((f"clip.{i:03}.png", out.getvalue()))
    shards = indexed(tmp_path, files)
    assert len(shards) == 1
    window = Picture(shards.images(0, shards.read(0)), Form(1, frames=3)).window(0)
    assert window.shape == (1, 3, 5, 6)
    assert window[0, :, 0, 0].tolist() == [0, 10, 20]


def test_one_numbered_frame_is_an_image(tmp_path: Path) -> None:
    shards = indexed(tmp_path, [("a.000.jpg", b"x"), ("b.jpg", b"y")])
    assert shards.frames.tolist() == [0, 0]
    assert shards.read(0) == b"x"


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.jpg", "a.png"], "'a' holds 2 images; one is read, or the frames of a clip"),
        (["a.jpg", "a.000.jpg"], "holds 2 images"),
        (["a.left.jpg", "a.right.jpg"], "holds 2 images"),
        (["a.00.jpg", "a.000.jpg"], "holds 2 images"),
        (["a.1.jpg", "a.1.png"], "holds 2 images"),
        (["a.1.jpg", "a.x1.jpg", "a.2.jpg"], "holds 3 images"),
        (["a.1.jpg", "a.1.JPG"], "stands twice"),
        (["a.nii", "a.nii.gz"], "holds 2 images"),
    ],
)
def test_other_images_of_one_sample_are_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        indexed(tmp_path, [(name, b"x") for name in names])


def test_an_empty_frame_leaves_the_clip_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([("a.0.jpg", b"x"), ("a.1.jpg", b""), ("b.jpg", b"x")]))
    with pytest.raises(DataError, match="1 of 2 samples have an image of zero bytes, first 'a'"):
        build_index(tmp_path / "x.tar")
    assert len(build_index(tmp_path / "x.tar", missing="exclude")) == 1


def test_groups_are_in_the_index(tmp_path: Path) -> None:
    files = [
        ("a.jpg", b"x"),
        ("a.group", b"12\n"),
        ("b.jpg", b"x"),
        ("c.0.jpg", b"x"),
        ("c.1.jpg", b"y"),
        ("c.group", b"0"),
    ]
    shards = indexed(tmp_path, files)
    assert shards.groups.tolist() == [12, -1, 0]
    assert shards.frames.tolist() == [0, 0, 2]
    for text in (b"-1", b"p7", b"", b"2147483648"):
        with pytest.raises(DataError, match=r"group b'.*' of sample 'a' is not an integer of 0 or more"):
            indexed(tmp_path, [("a.jpg", b"x"), ("a.group", text)])


def test_groups_do_not_change_the_data_id(tmp_path: Path) -> None:
    made = []
    for group in (b"1", b"2"):
        made.append(indexed(tmp_path, [("a.jpg", b"x"), ("a.group", group)]).id)
    assert made[0] == made[1]


@pytest.mark.parametrize("suffix", ["tif", "TIFF", "npy", "dcm", "nii", "nii.gz", "jpg"])
def test_scientific_files_are_images(tmp_path: Path, suffix: str) -> None:
    shards = indexed(tmp_path, [(f"scan.{suffix}", b"x"), ("scan.cls", b"2")])
    assert shards.read(0) == b"x"
    assert shards.labels.tolist() == [2]
    assert is_image(f"a/b.{suffix}")
    assert not is_image(f"a/{suffix}")


def test_keys_are_webdatasets() -> None:
    for name, expected in {
        "a/b.c.jpg": ("a/b", "c.jpg"), "img.v1.JPG": ("img", "v1.jpg"), "x/y.z/k.nii.gz": ("x/y.z/k", "nii.gz"), "bare": ("bare", ""),
    }.items():  # fmt: skip
        assert key_and_field(name) == expected


def test_a_clip_that_is_not_what_the_index_knew_is_a_bad_sample(tmp_path: Path) -> None:
    shards = indexed(tmp_path, [("a.0.jpg", b"x" * 600), ("a.1.jpg", b"y" * 600), ("a.2.jpg", b"z" * 600)])
    body = shards.read(0)
    assert split_clip(body, 3) == [b"x" * 600, b"y" * 600, b"z" * 600]
    with pytest.raises(BadSample, match="a clip of 3 images, which the index knew as 4"):
        split_clip(body, 4)
    for size in (0, 1, 600, 1500, len(body) - 1):
        with pytest.raises(BadSample):
            split_clip(body[:size], 3)
    rng = np.random.default_rng(0)
    for _ in range(100):
        raw = bytearray(body)
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        try:
            assert len(split_clip(bytes(raw), 3)) == 3
        except BadSample:
            continue


def test_pngs_of_one_size_have_fingerprints_of_their_own(tmp_path: Path) -> None:
    """Of their CRC-32 only 16 bits tell them apart."""
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 8, 8), np.uint8)
    members = []
    for number, image in enumerate(pixels):
        out = BytesIO()
        Image.fromarray(image).save(out, "PNG", compress_level=0)
        members.append((f"{number}.png", out.getvalue()))
    indexed(tmp_path, [*members, ("copy.png", members[7][1])])
    records = read_index(tmp_path / "x.tar")
    assert len(np.unique(records["size"])) == 1
    assert len(np.unique(records["crc"])) < 1990
    assert len(np.unique(Shards(str(tmp_path / "x.tar")).prints)) == len(np.unique(records["print"])) == 2000
