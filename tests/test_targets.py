"""Lists of labels and masks: from files and tars through index, split and check to a table; hostile ones are refused."""

import json
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_samples import indexed
from test_tar import make_tar
from torch.nn import functional as F
from webfault import Plan, Server

from selfsight import cli
from selfsight.data.build import build
from selfsight.data.check import check
from selfsight.data.crops import nearest, resize_and_crop
from selfsight.data.decode import BadSample
from selfsight.data.folders import Reading
from selfsight.data.index import HEADER, build_index, read_index
from selfsight.data.labels import find_masks, read_labels
from selfsight.data.packing import Encoding, Sample, write_shards
from selfsight.data.samples import LISTED, NONE
from selfsight.data.shards import Shards
from selfsight.data.split import split
from selfsight.data.targets import MASK, Lists, Targets, checksum, decode_mask, pack, parse_list, read_targets, table
from selfsight.errors import DataError, UsageError
from selfsight.eval.features import labels_of, targets_of
from selfsight.eval.labels import same_classes


def png(array: np.ndarray[Any, Any], mode: str | None = None) -> bytes:
    out = BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(out, "PNG")
    return out.getvalue()


def npy(array: np.ndarray[Any, Any]) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()


GREY = png(np.arange(12, dtype=np.uint8).reshape(3, 4))
MASKS = {
    "png": png(np.array([[0, 1, 2, 255]] * 3, np.uint8)),
    "npy": npy(np.array([[0, 1, 300, 65535]] * 3, np.uint16)),
}
FILES = [
    ("a.png", GREY),
    ("a.cls", b"[3, 0, 3]"),
    ("a.mask.png", MASKS["png"]),
    ("b.mask.npy", MASKS["npy"]),
    ("b.png", GREY + b"b"),
    ("b.cls", b" []\n"),
    ("c.png", GREY + b"c"),
    ("c.cls", b"2"),
    ("d.png", GREY + b"d"),
]


def test_lists_and_masks_of_a_tar(tmp_path: Path) -> None:
    shards = indexed(tmp_path, FILES)
    assert shards.labels.tolist() == [LISTED, LISTED, 2, NONE]
    lists = shards.label_lists()
    assert lists is not None
    assert lists.tolist() == [[True, False, False, True], [False] * 4, [False, False, True, False], [False] * 4]
    assert shards.masks.tolist() == [True, True, False, False]
    assert shards.lists == Lists(samples=2, empty=1, labels={0: 1, 3: 1})
    for again in (shards, pickle.loads(pickle.dumps(shards))):  # noqa: S301 - as a worker gets it
        assert [again.read_mask(0), again.read_mask(1)] == [MASKS["png"], MASKS["npy"]]
        with pytest.raises(BadSample, match=r"x.tar@\d+: has no mask"):
            again.read_mask(2)
    assert [shards.read(i) for i in range(2)] == [GREY, GREY + b"b"]  # a mask is no image
    assert shards.neighbour(0, 1) == 0  # whose label is the same is not known


def test_others_read_the_same_tars(tmp_path: Path) -> None:
    indexed(tmp_path, FILES)
    with (tmp_path / "x.tar").open("rb") as file:  # wds.WebDataset leaves its file to the garbage collector
        members = wds.tariterators.tar_file_iterator(file)
        seen = list(wds.tariterators.group_by_keys({**member, "__url__": "x"} for member in members))
    assert json.loads(seen[0]["cls"]) == [3, 0, 3]
    assert seen[0]["mask.png"] == MASKS["png"]


def test_a_shard_without_either_is_indexed_as_before(tmp_path: Path) -> None:
    shards = indexed(tmp_path, [("a.png", GREY), ("a.cls", b"1")])
    assert not (tmp_path / "x.tar.targets").exists()
    head = np.fromfile(tmp_path / "x.tar.idx", HEADER, 1)
    assert head["targets_crc"][0] == 0
    assert shards.label_lists() is None
    assert shards.lists == Lists(0, 0, {})
    assert not shards.masks.any()
    assert shards.labels.tolist() == [1]


def test_a_file_that_is_not_needed_any_more_goes(tmp_path: Path) -> None:
    indexed(tmp_path, FILES)
    assert (tmp_path / "x.tar.targets").exists()
    indexed(tmp_path, [("a.png", GREY)])
    assert not (tmp_path / "x.tar.targets").exists()


@pytest.mark.parametrize(
    "other",
    [
        [("a.cls", b"[3, 1, 3]")],
        [("a.cls", b"[0, 3, 1]")],
        [("a.mask.png", png(np.zeros((3, 4), np.uint8)))],
        [("b.cls", b"[1]")],
        [("a.cls", b"[0]"), ("b.cls", b"[3]")],  # the same labels in the same order
    ],
)
def test_the_id_knows_lists_and_masks(tmp_path: Path, other: list[tuple[str, bytes]]) -> None:
    for name in ("one", "two", "moved"):
        (tmp_path / name).mkdir()
    one = indexed(tmp_path / "one", FILES)
    two = indexed(tmp_path / "two", [(name, dict(other).get(name, body)) for name, body in FILES])
    assert one.id != two.id
    assert one.id == indexed(tmp_path / "moved", FILES, "gnu").id


HOSTILE = {
    "negative": b"[-1]",
    "float": b"[1.0]",
    "bomb": b"[1000000000]",
    "one too many": b"[65536]",
    "string": b'["1"]',
    "nested": b"[[1]]",
    "deep": b"[" * 100_000,
    "truth": b"[true]",
    "null": b"[null]",
    "open": b"[1, 2",
    "more": b"[1] 2",
    "nan": b"[NaN]",
    "huge": b"[" + b"1," * 600_000 + b"1]",
    "digits": b"[" + b"9" * 5000 + b"]",
    "bytes": b"[\xff\xfe]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lists_are_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(
        DataError, match=r"x.tar: sample 'a': .* is no list of labels, which are integers from 0 to 65,535"
    ):
        indexed(tmp_path, [("a.png", GREY), ("a.cls", text)])


def test_the_largest_label_and_a_long_list_are_read(tmp_path: Path) -> None:
    shards = indexed(tmp_path, [("a.png", GREY), ("a.cls", json.dumps(list(range(65536))).encode())])
    assert targets_of(shards, np.arange(1)).shape == (1, 65536)


def test_a_table_beyond_all_bounds_is_refused() -> None:
    single = np.full(200_000, LISTED, np.int32)
    starts = np.arange(200_001, dtype=np.uint64)
    with pytest.raises(DataError, match="a table of 12 GiB; number the classes without gaps"):
        table([(single, Targets(starts, np.full(200_000, 65535, np.int32), np.empty(0, MASK)))])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=8), st.booleans())
def test_what_is_packed_comes_back(tmp_path_factory: Any, lists: list[list[int] | None], masked: bool) -> None:
    path = tmp_path_factory.mktemp("t") / "x.targets"
    given = [None if one is None else sorted(set(one)) for one in lists]
    body = pack(given, [(8, 4, 7) if masked else (0, 0, 0)] * len(lists))
    assert bool(body) == (masked or any(one is not None for one in lists))
    if not body:
        assert checksum(body) == 0
        return
    path.write_bytes(body)
    found = read_targets(path, "x", len(lists), 12, checksum(body))
    starts = found.starts.astype(int)
    assert [found.labels[a:b].tolist() for a, b in pairwise(starts)] == [one or [] for one in given]
    assert found.masks.tolist() == [(8, 4, 7)] * (len(lists) if masked else 0)
    single = np.full(len(lists), LISTED, np.int32)
    assert [np.flatnonzero(row).tolist() for row in table([(single, found)])] == [one or [] for one in given]
    with pytest.raises(DataError, match="do not fit its shard") if masked else nullcontext():
        read_targets(path, "x", len(lists), 11, checksum(body))
    with pytest.raises(DataError, match="is not what this release reads"):
        read_targets(path, "x", len(lists) + 1, 12, checksum(body))


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    indexed(tmp_path, FILES)
    path = tmp_path / "x.tar.targets"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"damaged, or belongs to another index .* selfsight shards index"):
            Shards(str(tmp_path)).label_lists()
    for cut in (0, 1, 31, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="damaged"):
            _ = Shards(str(tmp_path)).masks
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read .* selfsight shards index"):
        _ = Shards(str(tmp_path)).id


def test_the_file_of_an_older_state_is_refused(tmp_path: Path) -> None:
    indexed(tmp_path, FILES)
    old = (tmp_path / "x.tar.targets").read_bytes()
    indexed(tmp_path, [*FILES[:1], ("a.cls", b"[3, 1]"), *FILES[2:]])
    (tmp_path / "x.tar.targets").write_bytes(old)
    with pytest.raises(DataError, match="belongs to another index"):
        Shards(str(tmp_path)).label_lists()


def test_a_damaged_mask_is_found_when_it_is_read(tmp_path: Path) -> None:
    shards = indexed(tmp_path, FILES)
    raw = bytearray((tmp_path / "x.tar").read_bytes())
    raw[raw.index(MASKS["png"]) + 40] ^= 1
    with (tmp_path / "x.tar").open("r+b") as file:
        file.write(raw)
    assert shards.read(0) == GREY
    with pytest.raises(DataError, match="is another file than when the run started"):
        shards.read_mask(0)
    assert "CRC" in check(Shards(str(tmp_path)))["bad"][0]["reason"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([("a.png", GREY), ("a.mask.jpg", b"x")], "a mask is one file of png, tif, tiff, npy"),
        ([("a.png", GREY), ("a.mask.png", b"x"), ("a.mask.npy", b"y")], "a mask is one file"),
        ([("a.png", GREY), ("a.mask.png", b"")], "1 of 1 samples have a mask of zero bytes, first 'a'"),
        ([("a.mask.png", MASKS["png"])], "1 of 1 samples have no image, first 'a'"),
    ],
)
def test_masks_that_cannot_be_are_refused(tmp_path: Path, files: list[tuple[str, bytes]], told: str) -> None:
    with pytest.raises(DataError, match=told):
        indexed(tmp_path, files)


def pages(array: np.ndarray[Any, Any], count: int, form: str) -> bytes:
    out = BytesIO()
    more = [Image.fromarray(array + 1 + i) for i in range(count - 1)]
    Image.fromarray(array).save(out, form, save_all=True, append_images=more)
    return out.getvalue()


def white_is_zero(array: np.ndarray[Any, Any]) -> bytes:
    out = BytesIO()
    Image.fromarray(array).save(out, "TIFF", tiffinfo={262: 0})
    return out.getvalue()


def tif_of_bits(values: np.ndarray[Any, Any], bits: int, photometric: int = 1) -> bytes:
    """A TIFF of few bits, made by hand: Pillow writes none."""
    texts = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
    rows = b"".join(int(text.ljust(16, "0"), 2).to_bytes(2, "big")[: -(-len(text) // 8)] for text in texts)
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, values.shape[0]), (279, len(rows))]
    start = 8 + len(rows) + len(rows) % 2
    head = b"II*\0" + start.to_bytes(4, "little") + rows.ljust(start - 8, b"\0") + len(tags).to_bytes(2, "little")
    entries = b"".join(tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + told.to_bytes(4, "little") for tag, told in tags)
    return head + entries + bytes(4)


def bomb() -> bytes:
    image = png(np.zeros((1, 1), np.uint8))
    wide = (100_000).to_bytes(4, "big")
    import zlib

    head = b"IHDR" + wide + wide + image[24:29]
    return image[:12] + head + zlib.crc32(head).to_bytes(4, "big") + image[33:]


BAD_MASKS = {
    "no image": (b"no image", "not an image of a known format"),
    "colours": (png(np.zeros((2, 2, 3), np.uint8)), "mask of PNG RGB"),
    "bomb": (bomb(), "10000000000 pixels"),
    "npy bomb": (npy(np.zeros((2, 2), np.uint8)).replace(b"(2, 2)", b"(99999999, 99999999)"), "."),
    "floats": (npy(np.zeros((2, 2), np.float32)), "mask of float32"),
    "planes": (npy(np.zeros((3, 40, 40), np.uint8)), "3 x 40 x 40"),
    "negative": (npy(np.full((2, 2), -1, np.int16)), "from -1 to -1"),
    "wide": (npy(np.full((2, 2), 65536, np.int32)), "from 65,536"),
    "cut": (png(np.random.default_rng(0).integers(0, 9, (60, 60)).astype(np.uint8))[:200], "damaged mask"),
    "pages": (pages(np.zeros((2, 2), np.uint8), 2, "TIFF"), "mask of several pages"),
    "moving": (pages(np.zeros((2, 2), np.uint8), 2, "PNG"), "mask of several pages"),
    "white is zero": (white_is_zero(np.zeros((2, 2), np.uint8)), "0 is white"),
    "white is zero, 2 bits": (tif_of_bits(np.zeros((2, 2), np.uint8), 2, photometric=0), "0 is white"),
    "objects": (npy(np.zeros((2, 2), np.uint8)).replace(b"'|u1'", b"'|O' "), "."),
}


@pytest.mark.parametrize(("body", "told"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_hostile_masks_are_bad_samples(body: bytes, told: str) -> None:
    with pytest.raises(BadSample, match=told):
        decode_mask(body)


def palette(values: np.ndarray[Any, Any], **more: Any) -> bytes:
    image = Image.fromarray(values, "L").copy()
    made = Image.frombytes("P", image.size, image.tobytes())
    made.putpalette([channel for i in range(256) for channel in (i, 255 - i, 7)])
    out = BytesIO()
    made.save(out, "PNG", **more)
    return out.getvalue()


def grey_of_bits(values: np.ndarray[Any, Any], bits: int) -> bytes:
    """A PNG of 2 or 4 bits, made by hand: Pillow writes none."""
    import struct
    import zlib

    rows = b""
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        rows += b"\0" + int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def tif(array: np.ndarray[Any, Any]) -> bytes:
    out = BytesIO()
    Image.fromarray(array).save(out, "TIFF", compression="tiff_lzw")
    return out.getvalue()


FOUR = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], np.uint8)
KINDS = {
    "png": png(FOUR),
    "palette": palette(FOUR),
    "palette of 2 bits": palette(FOUR, bits=2),
    "2 bits": grey_of_bits(FOUR, 2),
    "4 bits": grey_of_bits(FOUR, 4),
    "16 bits": png(FOUR.astype(np.uint16)),
    "npy": npy(FOUR.astype(np.int64)),
    "tif": tif(FOUR),
    "tif of 2 bits": tif_of_bits(FOUR, 2),
    "tif of 4 bits": tif_of_bits(FOUR, 4),
    "16-bit tif": tif(FOUR.astype(np.uint16)),
}


@pytest.mark.parametrize("body", KINDS.values(), ids=KINDS)
def test_every_kind_of_mask_gives_its_classes(body: bytes) -> None:
    assert decode_mask(body).tolist() == FOUR.tolist()


def test_values_of_16_bits_and_the_ignored_one() -> None:
    assert decode_mask(png(np.array([[300, 65535, 255]], np.uint16))).tolist() == [[300, 255, 255]]
    assert decode_mask(png(np.array([[True, False]]))).tolist() == [[1, 0]]


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 4))
def test_nearest_is_torchs_nearest_exact(sizes: tuple[int, int, int, int]) -> None:
    height, width, new, wide = sizes
    pixels = np.arange(height * width, dtype=np.int32).reshape(1, height, width)
    expected = F.interpolate(torch.from_numpy(pixels)[None].double(), (new, wide), mode="nearest-exact")[0]
    # A centre on the border of two pixels belongs to the second; torch's 32 bits may say otherwise.
    sure = [(2 * np.arange(n) + 1) * old % (2 * n) != 0 for n, old in ((new, height), (wide, width))]
    assert np.array_equal(nearest(pixels, new, wide)[0][np.ix_(*sure)], expected.numpy()[0][np.ix_(*sure)])
    view = resize_and_crop(pixels[0], 5, 0.8, "nearest")
    assert view.shape == (5, 5)
    assert set(view.ravel().tolist()) <= set(range(height * width))


def folder_of(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(np.full((6, 8), i, np.uint8)))
    return root


NAMES = ["a/1.png", "a/2.png", "b/3.png"]


@pytest.mark.parametrize(
    ("name", "text", "labels"),
    [
        ("l.csv", "path,label\na/1.png,0;3\nb/3.png,\na/2.png,7;0;3\n", [[0, 3], [0, 3, 7], []]),
        ("l.csv", "a/1.png,4\r\n./a/2.png,2\r\n\r\nb/3.png,4\r\n", [4, 2, 4]),
        ("l.csv", "a/1.png,3;\nb/3.png,;\na/2.png,65535\n", [[3], [65535], []]),
        ("l.csv", "a/1.png,70000\nb/3.png,70000\na/2.png,1\n", [70000, 1, 70000]),  # single ones need no table
        ("l.csv", "\ufeffpath,label\n" + "a/1.png,1\na/2.png,0;1\nb/3.png,5;", [[1], [0, 1], [5]]),
        ("l.json", '{"a/1.png": 4, "a/2.png": 2, "b/3.png": 0}', [4, 2, 0]),
        ("l.JSON", '{"a/1.png": [4, 4], "a/2.png": [], "b/3.png": 0}', [[4], [], [0]]),
    ],
)
def test_labels_of_a_file(tmp_path: Path, name: str, text: str, labels: list[Any]) -> None:
    source = folder_of(tmp_path / "src", NAMES)
    (tmp_path / name).write_text(text, encoding="utf-8")
    built = build(str(source), tmp_path / "out", reading=Reading(labels=tmp_path / name))
    shards = Shards(str(tmp_path / "out"))
    if isinstance(labels[0], list):
        lists = shards.label_lists()
        assert lists is not None
        assert [np.flatnonzero(row).tolist() for row in lists] == labels
        assert built.classes == len({label for one in labels for label in one})
    else:
        assert shards.labels.tolist() == labels
        assert built.classes == len(set(labels))
    assert not (tmp_path / "out" / "classes.json").exists()  # the folders' names are not these labels'


BAD_LABELS = {
    "other kind": ("l.txt", "a/1.png,1", UsageError, "neither .csv"),
    "lacking": ("l.csv", "a/1.png,1\n", DataError, "2 of 3 images have no label, such as a/2.png, b/3.png"),
    "unknown": ("l.csv", "a/1.png,1\na/2.png,1\nb/3.png,1\nc,1\n", DataError, "1 of 4 labels have no image, such as c"),
    "twice": ("l.csv", "a/1.png,1\na/1.png,1\n", DataError, "a/1.png stands twice"),
    "negative": ("l.csv", "a/1.png,-1\n", DataError, "line 1: '-1' is no label"),
    "float": ("l.csv", "path,label\na/1.png,1.5\n", DataError, "line 2: '1.5' is no label"),
    "name": ("l.csv", "a/1.png,cat\n", DataError, "'cat' is no label"),
    "fields": ("l.csv", "a/1.png,1,2\n", DataError, "line 1 has 3 fields"),
    "bomb": ("l.csv", "a/1.png,0;1000000000\n", DataError, "is no list of labels"),
    "a blank among single ones": (
        "l.csv",
        "path,label\na/1.png,1\na/2.png, \nb/3.png,\n",
        DataError,
        r"line 3 has no label \(2 lines",
    ),
    "too large for a list": (
        "l.csv",
        "a/1.png,0;1\na/2.png,65536\nb/3.png,1\n",
        DataError,
        r"l.csv: a/2.png: b'\[65536\]' is no list of labels",
    ),
    "other digits": ("l.csv", "a/1.png,\u0663\n", DataError, "is no label"),
    "not utf-8": ("l.csv", b"\xff\xfe\x00", DataError, "is no csv of labels"),
    "quotes": ("l.csv", '"a/1.png,1\n', DataError, "is no csv of labels"),
    "no json": ("l.json", "{", DataError, "is no json of labels"),
    "deep": ("l.json", "[" * 100_000, DataError, "is no json of labels"),
    "a list": ("l.json", "[1]", DataError, "holds no object"),
    "truth": ("l.json", '{"a/1.png": true}', DataError, "'true' is no label"),
    "nested": ("l.json", '{"a/1.png": [[1]]}', DataError, "is no list of labels"),
    "json twice": ("l.json", '{"a/1.png": 1, "a/1.png": 2}', DataError, "stands twice"),
    "none": ("none.csv", None, UsageError, "cannot be read"),
}


@pytest.mark.parametrize(("name", "text", "error", "told"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_bad_labels_are_refused(tmp_path: Path, name: str, text: Any, error: type[Exception], told: str) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=told):
        read_labels(tmp_path / name, NAMES)


def with_masks(tmp_path: Path) -> tuple[Path, Path]:
    source = folder_of(tmp_path / "src", NAMES)
    for i, name in enumerate(("a/1.png", "a/2.npy", "b/3.tif")):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        array = np.full((6, 8), i, np.uint8)
        (tmp_path / "masks" / name).write_bytes({"png": png, "npy": npy, "tif": tif}[name[-3:]](array))
    return source, tmp_path / "masks"


def test_masks_of_a_folder_through_build_split_and_check(tmp_path: Path, capsys: Any) -> None:
    source, masks = with_masks(tmp_path)
    (tmp_path / "l.json").write_text('{"a/1.png": [4], "a/2.png": [2, 3], "b/3.png": []}')
    words = ["shards", "build", source, tmp_path / "out", "--masks", masks, "--labels", tmp_path / "l.json"]
    assert cli.main([*map(str, words), "--group-by", "stem"]) == 0
    assert "3 classes, 3 lists of labels (1 empty), 3 groups, 3 masks" in capsys.readouterr().out
    shards = Shards(str(tmp_path / "out"))
    assert shards.masks.all()
    assert [np.unique(decode_mask(shards.read_mask(i))).tolist() for i in range(3)] == [[0], [1], [2]]
    found = check(shards)
    assert found["lists"] == {"samples": 3, "empty": 1, "labels": {2: 1, 3: 1, 4: 1}}
    assert found["masks"] == {"samples": 3, "classes": [0, 1, 2]}
    assert (found["bad"], found["unlabelled"], found["labels"]) == ([], 0, {})
    assert cli.main(["shards", "check", str(tmp_path / "out")]) == 0
    assert "lists of labels" in capsys.readouterr().out
    halves = split(str(tmp_path / "out"), tmp_path / "train", tmp_path / "test", 0.4, 1)
    sides = [Shards(str(tmp_path / side)) for side in ("train", "test")]
    assert [(half.lists, half.masks) for half in halves] == [(len(side), len(side)) for side in sides]
    assert sum(len(side) for side in sides) == 3
    for side in sides:
        lists = side.label_lists()
        assert lists is not None
        for i in range(len(side)):
            value = int(decode_mask(side.read_mask(i))[0, 0])
            assert np.flatnonzero(lists[i]).tolist() == [[4], [2, 3], []][value]


def test_masks_that_are_not_the_images_are_refused(tmp_path: Path) -> None:
    source, masks = with_masks(tmp_path)
    (masks / "a/1.png").rename(masks / "a/x.png")
    with pytest.raises(
        DataError, match="1 of 3 images have no mask, such as a/1; 1 of 3 masks have no image, such as a/x"
    ):
        build(str(source), tmp_path / "out", reading=Reading(masks=masks))
    (masks / "a/x.png").rename(masks / "a/1.png")
    (masks / "a/1.npy").write_bytes(npy(FOUR))
    with pytest.raises(DataError, match="a/1 stands twice"):
        find_masks(masks, NAMES)
    (masks / "a/1.npy").unlink()
    (masks / "a/2.npy").write_bytes(b"none")
    with pytest.raises(DataError, match=r"a/2.npy: not an image .* remove or repair it"):
        build(str(source), tmp_path / "out", reading=Reading(masks=masks))
    for reading in (Reading(masks=masks, clips=True), Reading(masks=tmp_path / "none")):
        with pytest.raises(UsageError, match="--masks"):
            build(str(source), tmp_path / "out", reading=reading)
    with pytest.raises(UsageError, match="--labels and --unlabelled"):
        build(str(source), tmp_path / "out", reading=Reading(unlabelled=True, labels=tmp_path / "l.csv"))
    with pytest.raises(UsageError, match="are for a folder of images"):
        build("digits:train", tmp_path / "out", reading=Reading(labels=tmp_path / "l.csv"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(short_side=4)])
def test_a_mask_of_another_size_is_not_packed(tmp_path: Path, encoding: Encoding) -> None:
    source, masks = with_masks(tmp_path)
    (masks / "a/2.npy").write_bytes(npy(np.zeros((8, 6), np.uint8)))
    with pytest.raises(DataError, match=r"masks/a/2.npy: mask of 6 x 8 pixels, of an image of 8 x 6; remove or repair"):
        build(str(source), tmp_path / "out", reading=Reading(masks=masks), encoding=encoding)
    assert not (tmp_path / "out").exists()
    out, image = BytesIO(), Image.new("L", (8, 6))
    image.getexif()[0x0112] = 6
    image.save(out, "JPEG", exif=image.getexif())  # is seen upright, 6 wide and 8 high
    write_shards([Sample(out.getvalue(), mask=npy(np.zeros((8, 6), np.uint8)))], tmp_path, "turned", encoding)
    with pytest.raises(DataError, match="image 1 of the source: mask of 8 x 6 pixels, of an image of 6 x 8"):
        write_shards([Sample(out.getvalue(), mask=npy(np.zeros((6, 8), np.uint8)))], tmp_path, "lying", encoding)


def test_lists_are_counted_without_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_of(tmp_path / "src", NAMES)
    (tmp_path / "l.json").write_text('{"a/1.png": [4, 9], "a/2.png": [], "b/3.png": 9}')
    monkeypatch.setattr("selfsight.data.targets.TABLE_MOST", 1)
    built = build(str(source), tmp_path / "out", reading=Reading(labels=tmp_path / "l.json"))
    assert (built.classes, built.lists, built.empty) == (2, 3, 1)
    assert check(Shards(str(tmp_path / "out")))["lists"] == {"samples": 3, "empty": 1, "labels": {4: 1, 9: 2}}


def test_check_tells_a_mask_of_another_size(tmp_path: Path) -> None:
    indexed(
        tmp_path, [("a.png", GREY), ("a.mask.png", png(FOUR)), ("b.png", GREY + b"b"), ("b.mask.png", MASKS["png"])]
    )
    bad = check(Shards(str(tmp_path)))["bad"]
    assert [one["reason"] for one in bad] == ["mask of 4 x 2 pixels, of an image of 4 x 3"]


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(short_side=3), Encoding(format="jpeg")])
def test_a_tars_lists_and_masks_pass_through(tmp_path: Path, encoding: Encoding) -> None:
    image = png(np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3), 3, 0), 3, 1) * 40)
    mask = png(np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3), 3, 0), 3, 1))
    (tmp_path / "src").mkdir()
    indexed(
        tmp_path / "src",
        [("a.png", image), ("a.cls", b"[0, 5]"), ("a.mask.png", mask), ("b.png", image), ("b.cls", b"[]")],
    )
    build(
        str(tmp_path / "src" / "x.tar*"), tmp_path / "out", encoding=encoding
    )  # the glob finds what is beside it, too
    shards = Shards(str(tmp_path / "out"))
    lists = shards.label_lists()
    assert lists is not None
    assert [np.flatnonzero(row).tolist() for row in lists] == [[0, 5], []]
    assert shards.masks.tolist() == [True, False]
    assert not check(shards)["bad"]  # of the same size still
    found = decode_mask(shards.read_mask(0))
    size = (3, 4) if encoding.short_side else (6, 9)
    assert found.shape == size
    assert np.array_equal(found, nearest(decode_mask(mask), *size))
    build(str(tmp_path / "src" / "x.tar"), tmp_path / "bare", reading=Reading(unlabelled=True))
    bare = Shards(str(tmp_path / "bare"))
    assert bare.labels.tolist() == [NONE, NONE]
    assert not bare.masks.any()


def test_labels_for_scores(tmp_path: Path) -> None:
    def of(name: str, *labels: bytes) -> Shards:
        (tmp_path / name).mkdir()
        files = [
            (f"{i}.{kind}", body)
            for i, cls in enumerate(labels)
            for kind, body in (("png", GREY), ("cls", cls))
            if body
        ]
        return indexed(tmp_path / name, files)

    def asked(shards: Shards) -> torch.Tensor:
        return labels_of(shards, np.arange(len(shards)))

    lists = of("lists", b"[0, 2]", b"[]", b"[2]")
    assert asked(lists).tolist() == [[True, False, True], [False] * 3, [False, False, True]]
    assert asked(of("single", b"4", b"0")).tolist() == [4, 0]
    assert targets_of(lists, np.array([2, 0])).tolist() == [[False, False, True], [True, False, True]]
    with pytest.raises(
        UsageError, match=r"1 of 3 samples have a list of labels, the others a single one; .* \(\[3\] for 3\)"
    ):
        asked(of("mixed", b"[0, 2]", b"1", b"2"))
    with pytest.raises(UsageError, match=r"1 of 2 samples have no label; .* \(of a list that is empty"):
        asked(of("lacking", b"[0, 2]", b""))
    with pytest.raises(UsageError, match=r"all 2 samples have the labels \[0, 2\]; scores need two classes"):
        asked(of("alike", b"[0, 2]", b"[2, 0]"))
    with pytest.raises(UsageError, match="all 2 samples have the label 7; scores need two classes"):
        asked(of("one", b"7", b"7"))
    with pytest.raises(UsageError, match="2 of 2 samples have no label"):
        asked(of("none", b"", b""))


def test_both_sides_get_the_same_classes() -> None:
    fit, held = torch.tensor([[True, False, True]]), torch.tensor([[True], [False]])
    wide = same_classes(fit, held)
    assert wide[1].tolist() == [[True, False, False], [False] * 3]
    assert same_classes(held, torch.tensor([[True, False]]))[0].shape == (2, 2)
    with pytest.raises(UsageError, match="test has 1 classes that train lacks: 2"):
        same_classes(held, fit)
    with pytest.raises(UsageError, match="train has lists of labels, test has single labels"):
        same_classes(fit, torch.tensor([1]))
    with pytest.raises(UsageError, match="test has 1 classes that train lacks: 9"):
        same_classes(torch.tensor([1, 5]), torch.tensor([9]))
    single = torch.tensor([1, 5]), torch.tensor([5])
    assert same_classes(*single) == single


def test_lists_are_written_as_they_are_read(tmp_path: Path) -> None:
    write_shards(
        [Sample(GREY, [5, 1]), Sample(GREY, []), Sample(GREY, 3, mask=MASKS["png"])], tmp_path, "s", per_shard=2
    )
    shards = Shards(str(tmp_path))
    lists = shards.label_lists()
    assert lists is not None
    assert [np.flatnonzero(row).tolist() for row in lists] == [[1, 5], [], [3]]
    assert shards.masks.tolist() == [False, False, True]
    assert shards.read_mask(2) == MASKS["png"]
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="image 1 of the source: not an image"):
        write_shards([Sample(GREY, mask=b"no image")], tmp_path / "x", "s")


def test_an_index_that_was_replaced_meanwhile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed(tmp_path, FILES)
    real: Callable[..., Any] = read_index

    def and_then(shard: Any) -> Any:
        found = np.array(real(shard))
        (tmp_path / "x.tar").write_bytes(make_tar([("a.png", GREY)]))
        build_index(tmp_path / "x.tar")
        return found

    monkeypatch.setattr("selfsight.data.shards.read_index", and_then)
    with pytest.raises(DataError, match="changed while it was read; run the same command again"):
        Shards(str(tmp_path))


def test_a_list_by_itself() -> None:
    assert parse_list(b"[2, 0, 2]", "x") == [0, 2]
    with pytest.raises(DataError, match=r"^there: "):
        parse_list(b"3", "there")


def test_remote_shards_carry_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    near = indexed(tmp_path, FILES)
    plans = {f"/{file.name}": Plan(file.read_bytes(), etag=f'"{file.name}"') for file in tmp_path.glob("x.tar*")}
    for served in (plans, {"/x.tar": plans["/x.tar"]}, {name: plans[name] for name in ("/x.tar", "/x.tar.idx")}):
        monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / f"cache{len(served)}"))
        with Server(served) as server:
            far = Shards(f"{server.address}/x.tar")
            if len(served) == 2:  # an index that speaks of a file that is not there
                with pytest.raises(DataError, match=r"lists and masks .* cannot be read"):
                    far.label_lists()
                continue
            assert np.array_equal(far.label_lists(), near.label_lists())
            assert [far.read_mask(i) for i in (0, 1)] == [MASKS["png"], MASKS["npy"]]
            assert far.id == near.id
            far.close()
