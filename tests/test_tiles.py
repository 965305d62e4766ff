"""Tiles against slices of the array that was stored, and how folders become groups and clips."""

import gzip
import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_formats import _peak, circular, dicom, nifti, tiff

from selfsight import cli
from selfsight.data import tiles
from selfsight.data.build import build
from selfsight.data.decode import Form, decode
from selfsight.data.folders import Reading
from selfsight.data.formats import read_array
from selfsight.data.packing import Encoding
from selfsight.data.shards import Shards
from selfsight.data.tiles import Cut, Left, Tile, background, cut_tiles
from selfsight.errors import DataError, UsageError

RNG = np.random.default_rng(3)
BANDS = RNG.integers(1, 50000, (5, 70, 90)).astype(np.uint16)
RGB = RNG.integers(1, 200, (70, 90, 3)).astype(np.uint8)


def pixels(tile: Tile) -> Any:
    if isinstance(tile.image, bytes):
        return read_array(tile.image)
    found = np.asarray(tile.image)
    return found[None] if found.ndim == 2 else np.moveaxis(found, -1, 0)


def stored(folder: Path, body: bytes, name: str = "x.tif") -> Path:
    (folder / name).write_bytes(body)
    return folder / name


def png(array: Any) -> bytes:
    out = BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def npy(array: Any) -> bytes:
    out = BytesIO()
    np.save(out, array)
    return out.getvalue()


LAYOUTS = {
    "strips": (tiff(BANDS, rowsperstrip=7), BANDS),
    "one strip": (tiff(BANDS, rowsperstrip=70), BANDS),
    "tiles": (tiff(BANDS, tile=(16, 32), compression="zlib", predictor=True), BANDS),
    "planar": (tiff(BANDS, planarconfig="separate", tile=(32, 16)), BANDS),
    "planar strips": (tiff(BANDS, planarconfig="separate", rowsperstrip=11, compression="lzw"), BANDS),
    "pages": (tiff(BANDS, metadata=None, tile=(16, 16)), BANDS),
    "ome": (tiff(BANDS, ome=True, photometric="minisblack", metadata={"axes": "CYX"}), BANDS),
    "float": (tiff(BANDS / np.float32(3)), BANDS / np.float32(3)),
    "signed": (tiff(BANDS.astype(np.int16)), BANDS.astype(np.int16)),
    "colours": (tiff(RGB, tile=(16, 16)), np.moveaxis(RGB, -1, 0)),
    "grey": (tiff(RGB[..., 0]), RGB[None, ..., 0]),
    "miniswhite": (tiff(RGB[..., 0], photometric="miniswhite"), 255 - RGB[None, ..., 0]),
    "png": (png(RGB), np.moveaxis(RGB, -1, 0)),
    "grey png": (png(RGB[..., 0]), RGB[None, ..., 0]),
    "png of 16 bits": (png(BANDS[0]), BANDS[:1]),
    "npy": (npy(BANDS), BANDS),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "stride"), [(32, None), (20, 13), (70, 5)])
def test_tiles_are_slices(layout: str, size: int, stride: int | None, tmp_path: Path) -> None:
    body, whole = LAYOUTS[layout]
    tiles = list(cut_tiles(stored(tmp_path, body), Cut(size, stride)))
    step = stride or size
    places = [(left, top) for top in range(0, 70 - size + 1, step) for left in range(0, 90 - size + 1, step)]
    assert [(tile.left, tile.top) for tile in tiles] == places
    for tile in tiles:
        expected = whole[:, tile.top : tile.top + size, tile.left : tile.left + size]
        assert pixels(tile).dtype == expected.dtype
        np.testing.assert_array_equal(pixels(tile), expected)


def test_a_pyramid_of_jpegs_is_cut_at_its_full_resolution(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:128, :192]
    smooth = np.stack([rows + columns // 2, columns, 255 - rows], -1).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as writer:
        how: dict[str, Any] = {
            "tile": (64, 64),
            "compression": "jpeg",
            "compressionargs": {"level": 95},
            "photometric": "rgb",
        }
        writer.write(smooth, subifds=1, **how)
        writer.write(smooth[::2, ::2].copy(), subfiletype=1, **how)
    tiles = list(cut_tiles(tmp_path / "slide.tif", Cut(96)))
    assert [(tile.left, tile.top) for tile in tiles] == [(0, 0), (96, 0)]
    found = np.concatenate([np.asarray(tile.image) for tile in tiles], 1)
    assert np.abs(found.astype(int) - smooth[:96]).max() < 12


def test_a_large_image_is_never_whole_in_memory(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "x.tif", np.zeros((4096, 4096, 3), np.uint8), tile=(256, 256), compression="zlib", photometric="rgb"
    )
    before = _peak()
    assert sum(1 for _ in cut_tiles(tmp_path / "x.tif", Cut(256, background=1.0))) == 256
    assert _peak() - before < 20_000_000  # of 50 MB


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_strip_that_reaches_below_a_band_is_decoded_once(
    planar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = tiles.TiffRows._decoded
    monkeypatch.setattr(tiles.TiffRows, "_decoded", lambda *how: decoded.append(how[2]) or real(*how))  # type: ignore[func-returns-value]
    image = BANDS if planar == "separate" else np.moveaxis(BANDS, 0, -1).copy()
    for rows, strips in ((70, 1), (31, 3)):
        body = tiff(image, photometric="minisblack", planarconfig=planar, rowsperstrip=rows, compression="zlib")
        found = list(cut_tiles(stored(tmp_path, body), Cut(10)))
        assert np.array_equal(pixels(found[-1]), BANDS[:, 60:, 80:])
        assert sorted(decoded) == list(range(strips * (5 if planar == "separate" else 1)))
        decoded.clear()
    monkeypatch.setattr(tiles, "MOST_BYTES", 20_000)
    list(cut_tiles(stored(tmp_path, tiff(BANDS, tile=(16, 16))), Cut(10)))
    with pytest.raises(DataError, match="that are decoded at once; store an upright TIFF in tiles"):
        list(cut_tiles(stored(tmp_path, body), Cut(10)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image", [BANDS, RGB], ids=["bands", "colours"])
def test_tiles_stand_as_decoding_shows_them(image: Any, orientation: int, tmp_path: Path) -> None:
    body = tiff(image, extratags=[(0x0112, "H", 1, orientation, True)], rowsperstrip=9)
    depth = 16 if image is BANDS else 8
    whole = decode(body, Form(len(image) if image is BANDS else 3, depth))
    for tile in (found := list(cut_tiles(stored(tmp_path, body), Cut(30)))):
        assert np.array_equal(pixels(tile), whole[:, tile.top : tile.top + 30, tile.left : tile.left + 30])
    assert len(found) == 6


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slide = RGB.copy()
    slide[:, 30:] = 240
    for name, body in {"a.tif": tiff(slide), "b.png": png(RGB[:19]), "c.npy": npy(BANDS[:, :, :19])}.items():
        stored(tmp_path, body, name)
    left = Left()
    assert len(list(cut_tiles(tmp_path / "a.tif", Cut(20), left))) == 6
    assert left == Left(0, 6)
    build(str(tmp_path), tmp_path.with_name("out"), reading=Reading(cut=Cut(20)))
    told = f"{tmp_path}: 2 images smaller than 20 x 20 pixels; 6 tiles of background; left out"
    assert told in " ".join(capsys.readouterr().err.split())
    assert Left().text(20) == ""


def test_tiles_that_are_encoded_anew_keep_their_places(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    stored(tmp_path / "src", tiff(RGB), "x.tif")
    build(str(tmp_path / "src"), tmp_path / "out", reading=Reading(cut=Cut(40)))
    build(str(tmp_path / "out"), tmp_path / "again", encoding=Encoding(short_side=20, format="webp"))
    notes = []
    for folder in ("out", "again"):
        with tarfile.open(Shards(str(tmp_path / folder)).paths[0]) as tar:
            notes.append([tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".json")])  # type: ignore[union-attr]
    assert notes[0] == notes[1]
    assert json.loads(notes[1][1]) == {"source": "x.tif", "left": 40, "top": 0}


@pytest.mark.parametrize(
    ("tile", "nodata", "share"),
    [
        (np.full((3, 4, 4), 97, np.uint8), None, 1.0),
        (np.arange(16, dtype=np.uint8).reshape(1, 4, 4), None, 1 / 16),
        (np.arange(16, dtype=np.uint8).reshape(1, 4, 4) + 215, None, 11 / 16),
        (np.stack([np.arange(16).reshape(4, 4) + 215] * 2 + [np.full((4, 4), 219)]).astype(np.uint8), None, 0.0),
        (np.stack([np.arange(16).reshape(4, 4)] * 2 + [np.full((4, 4), 1)]).astype(np.uint8), None, 0.0),
        (np.arange(16, dtype=np.uint16).reshape(1, 4, 4) * 4095, None, 3 / 16),
        (np.arange(16, dtype=np.int16).reshape(1, 4, 4) - 3, None, 1 / 16),
        (np.arange(16, dtype=np.int16).reshape(1, 4, 4) - 3, -2.0, 2 / 16),
        (np.where(np.arange(16) < 5, np.nan, 1 + np.arange(16)).reshape(1, 4, 4), None, 5 / 16),
        (np.arange(16, dtype=np.float32).reshape(1, 4, 4) / 15, None, 1 / 16),
    ],
)
def test_background(tile: Any, nodata: float | None, share: float) -> None:
    assert background(tile, nodata) == pytest.approx(share)


def test_background_is_left_out(tmp_path: Path) -> None:
    slide = RGB.copy()
    slide[:, 30:] = 240
    slide[:30] = 0
    path = stored(tmp_path, tiff(slide))
    places = {
        share: [(tile.left, tile.top) for tile in cut_tiles(path, Cut(20, background=share))]
        for share in (0.2, 0.9, 1.0)
    }
    assert places[1.0] == [(left, top) for top in (0, 20, 40) for left in (0, 20, 40, 60)]
    assert places[0.9] == [(0, 20), (20, 20), (0, 40), (20, 40)]
    assert places[0.2] == [(0, 40)]
    scene = (BANDS / 7).astype(np.float32)
    scene[:, :40] = -9999
    body = tiff(scene, extratags=[(42113, "s", 0, "-9999", True)])
    assert [tile.top for tile in cut_tiles(stored(tmp_path, body), Cut(35))] == [35, 35]
    scene[0, 45, 0] = np.nan
    assert [tile.left for tile in cut_tiles(stored(tmp_path, tiff(scene)), Cut(30, background=1.0))] == [
        0,
        30,
        60,
        30,
        60,
    ]


def fill(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(np.full((6, 8), number, np.uint8)))
    return folder


def test_tiles_know_their_source(tmp_path: Path) -> None:
    for name in ("benign/a", "benign/b", "tumour/c"):
        path = tmp_path / "src" / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiff(BANDS))
    built = build(str(tmp_path / "src"), tmp_path / "out", reading=Reading(cut=Cut(40)))
    assert (built.samples, built.classes, built.groups) == (6, 2, 3)
    shards = Shards(str(tmp_path / "out"))
    assert shards.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert shards.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert json.loads((tmp_path / "out" / "groups.json").read_text()) == [
        "benign/a.tif",
        "benign/b.tif",
        "tumour/c.tif",
    ]
    with tarfile.open(shards.paths[0]) as tar:
        told = json.load(tar.extractfile("000000003.json"))  # type: ignore[arg-type]
    assert told == {"source": "benign/b.tif", "left": 40, "top": 0}
    assert np.array_equal(decode(shards.read(3), Form(5, 16)), BANDS[:, :40, 40:80])


@pytest.mark.parametrize(
    ("by", "groups", "names"),
    [
        ("folder", [0, 0, 1], ["p1", "p2"]),
        ("stem", [0, 1, 0], ["s", "t"]),
        (r"p(\d)", [0, 0, 1], ["1", "2"]),
        (r"/.", [0, 1, 0], ["/s", "/t"]),
        (None, [-1, -1, -1], None),
    ],
)
def test_groups_come_from_names(tmp_path: Path, by: str | None, groups: list[int], names: list[str] | None) -> None:
    fill(tmp_path / "src", ["p1/s.0.png", "p1/t.png", "p2/s.png"])
    build(str(tmp_path / "src"), tmp_path / "out", reading=Reading(group_by=by))
    assert Shards(str(tmp_path / "out")).groups.tolist() == groups
    path = tmp_path / "out" / "groups.json"
    assert (json.loads(path.read_text()) if path.exists() else None) == names
    for how in (
        {"encoding": Encoding(format="webp")},
        {"reading": Reading(unlabelled=True)},
        {},
    ):  # written again, or copied
        again = tmp_path / f"again-{len(list(tmp_path.iterdir()))}"
        build(str(tmp_path / "out"), again, **how)
        assert Shards(str(again)).groups.tolist() == groups
        assert (again / "groups.json").exists() == path.exists()


def test_folders_of_frames_are_clips(tmp_path: Path) -> None:
    fill(tmp_path / "src", ["run/b/f10.png", "run/b/f9.png", "run/b/more/f1.png", "run/b/z.png", "walk/a/1.png"])
    built = build(str(tmp_path / "src"), tmp_path / "out", reading=Reading(clips=True))
    assert (built.samples, built.classes) == (3, 2)
    shards = Shards(str(tmp_path / "out"))
    assert shards.labels.tolist() == [0, 0, 1]
    clips = [shards.images(i, shards.read(i)) for i in range(3)]
    assert [[int(decode(frame, Form(1))[0, 0, 0]) for frame in clip] for clip in clips] == [[1, 0, 3], [2], [4]]
    build(str(tmp_path / "out"), tmp_path / "again", encoding=Encoding(short_side=3))  # frames are encoded anew, too
    again = Shards(str(tmp_path / "again"))
    assert again.frames.tolist() == shards.frames.tolist() == [3, 0, 0]
    assert decode(again.images(0, again.read(0))[1], Form(1)).shape == (1, 3, 4)
    build(str(tmp_path / "src" / "run"), tmp_path / "flat", reading=Reading(clips=True))
    assert Shards(str(tmp_path / "flat")).labels.tolist() == [-1, -1]
    build(str(tmp_path / "src" / "run" / "b"), tmp_path / "one", reading=Reading(clips=True))
    assert Shards(str(tmp_path / "one")).labels.tolist() == [-1, -1]


def test_scientific_files_are_stored_as_they_are(tmp_path: Path) -> None:
    bodies = {"a.tiff": tiff(BANDS), "b.npy": npy(BANDS), "c.tif": tiff(RGB), "d.nii.gz": gzip.compress(nifti(RGB))}
    bodies["e.nii"], bodies["f.dcm"] = nifti(RGB), dicom(BANDS[0])
    for name, body in bodies.items():
        stored(tmp_path, body, name)
    build(str(tmp_path), tmp_path / "out")
    shards = Shards(str(tmp_path / "out"))
    assert [shards.read(i) for i in range(6)] == list(bodies.values())
    with tarfile.open(shards.paths[0]) as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["tif", "npy", "tif", "nii.gz", "nii", "dcm"]
    for how in (Encoding(short_side=8), Encoding(format="png")):
        with pytest.raises(UsageError, match=r"for 8-bit images that Pillow reads; the source holds a .tif with more"):
            build(str(tmp_path / "out"), tmp_path / "none", encoding=how)
    assert not (tmp_path / "none").exists()


def refusals() -> list[tuple[bytes, str]]:
    return [
        (b"no image", "UnidentifiedImageError"),
        (tiff(BANDS)[:50], "cannot be cut into tiles"),
        (tiff(BANDS, tile=(16, 16), compression="zlib")[:-3000], "past its end"),
        (tiff(BANDS[0], tile=(16, 16))[:-4000], "past its end"),
        (tiff(BANDS, imagej=True, metadata={"axes": "ZYX"}), "tiles are cut from images"),
        (npy(BANDS[None]), "has planes"),
        (circular(True), "pages run in a circle"),
    ]


@pytest.mark.parametrize(("body", "reason"), refusals(), ids=range(7))
def test_what_cannot_be_cut_is_named(body: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"x.tif: .*{reason}"):
        list(cut_tiles(stored(tmp_path, body), Cut(16)))


def test_usage_of_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = fill(tmp_path / "src", ["a_1.png", "b_1.png"])
    out = str(tmp_path / "out")
    for words, told in (
        (["--tile", "4", "--clips"], "a clip is not cut into tiles"),
        (["--stride", "4"], "add --tile"),
        (["--tile", "4", "--background", "1.5"], "0 to 1"),
        (["--group-by", "("], "nor a regular expression"),
        (["--group-by", "a_"], "b_1.png: --group-by 'a_' does not match"),
        (["--tile", "300"], "the source holds no image"),
    ):
        assert cli.main(["shards", "build", str(source), out, *words]) in (2, 65)
        assert told in capsys.readouterr().err
        assert not Path(out).exists()
    assert cli.main(["shards", "build", "digits:test", out, "--tile", "4"]) == 2
    assert "are for a folder of images" in capsys.readouterr().err
    assert cli.main(["shards", "build", str(source), out, "--tile", "4", "--background", "1"]) == 0
    assert "4 samples in 1 shards, no labels, 2 groups" in capsys.readouterr().out
