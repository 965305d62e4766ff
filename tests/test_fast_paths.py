"""Every fast path gives the pixels of the plain one: JPEGs by simplejpeg, whole batches from cached pixels, one decoding for
several positions; and the resizing and cropping that all share is torchvision's.
"""

import pickle
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as reference

from selfsight import cli
from selfsight.assemble import assemble
from selfsight.data import jpeg, picture
from selfsight.data.build import write_shards
from selfsight.data.crops import CROP_TRIES, ViewMaker, crop_box, crop_boxes, mirrored, needed, resize
from selfsight.data.decode import MAX_PIXELS, BadSample, Form, decode
from selfsight.data.jpeg import Need, decode_jpeg, reduction
from selfsight.data.loader import Batches, HostBatch, Rows
from selfsight.data.pixel_cache import HEADER, PixelCache, build_cache, cache_path, find_cache
from selfsight.data.resample import AT_ONCE, affordable, axis_weights, resized_crops, table
from selfsight.data.shards import Shards
from selfsight.data.views import View
from selfsight.errors import DataError, UsageError
from selfsight.keyed import uniform
from selfsight.recipe import load

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
Pixels = NDArray[Any]


def scene(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    """Something like a photograph, (H, W, C): smooth colours, an edge, some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width][..., None] / max(height, width)
    waves = 120 + 80 * np.sin(5 * x + 3 * y + np.arange(channels)) + 30 * (x > y)
    return np.clip(waves + rng.normal(0, 6, (height, width, channels)), 0, 255).astype(np.uint8)


def encoded(pixels: Pixels, **options: Any) -> bytes:
    out = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(out, "JPEG", **options)
    return out.getvalue()


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pixels]:
    """`decode` without simplejpeg."""

    def decoded(body: bytes, form: Form) -> Pixels:
        with monkeypatch.context() as patched:
            patched.setattr(jpeg, "library", lambda: None)
            return decode(body, form)

    return decoded


def fast(body: bytes, channels: int = 3, need: Need | None = None) -> Pixels | None:
    return decode_jpeg(body, channels, MAX_PIXELS, (lambda width, height: need) if need else None)


# -- JPEGs

KINDS: list[dict[str, Any]] = [
    {}, {"quality": 30}, {"quality": 100}, {"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2},
    {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}, {"comment": b"\xff\xda none"},
    {"subsampling": 0, "restart_marker_rows": 1},
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("size", [(64, 48), (37, 51), (8, 8), (1, 1), (16, 17)])
def test_jpegs_have_pillows_pixels(options: dict[str, Any], size: tuple[int, int], plainly: Any) -> None:
    for channels in (1, 3):
        body = encoded(scene(*size, channels), **options)
        found, expected = fast(body), plainly(body, Form(3))
        assert found is not None
        assert np.array_equal(found, expected)
        assert np.array_equal(decode(body, Form(3, 16)), plainly(body, Form(3, 16)))
    level = fast(encoded(scene(*size, 1), **options), 1)
    assert level is not None
    assert np.array_equal(level, plainly(encoded(scene(*size, 1), **options), Form(1)))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_rows_in_need_are_those_of_the_whole_image(options: dict[str, Any], channels: int) -> None:
    body = encoded(scene(83, 50, channels), **options)
    whole = fast(body)
    assert whole is not None
    whole = whole.copy()
    for rows in range(1, 84):
        found = fast(body, 3, Need(rows))
        assert found is not None
        assert found.shape == whole.shape
        assert np.array_equal(found[:, :rows], whole[:, :rows]), rows


def test_rows_that_nobody_needs_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    library = jpeg.library()
    assert library is not None

    def counted(body: bytes, *given: Any, **more: Any) -> Pixels:
        header = jpeg.read_header(body)
        assert header is not None
        seen.append(header.height)
        return library.decode_jpeg(body, *given, **more)  # type: ignore[no-any-return]

    monkeypatch.setattr(jpeg, "library", lambda: type("Counting", (), {"decode_jpeg": staticmethod(counted)}))
    fast(encoded(scene(400, 40)), 3, Need(100))
    fast(encoded(scene(400, 40), subsampling=0), 3, Need(100))
    fast(encoded(scene(400, 40), progressive=True), 3, Need(100))  # each of its scans goes over the whole image
    fast(encoded(scene(400, 40)) + b"\0", 3, Need(100))  # an end that may be a cut
    fast(encoded(scene(400, 40), restart_marker_rows=2), 3, Need(100))  # markers that may be damage
    fast(encoded(scene(400, 40)), 3, Need(395))  # not worth it
    assert seen == [112, 104, 400, 400, 400, 400]


def oriented(body: bytes, value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0110], exif[0x0112] = "camera", value
    out = BytesIO()
    Image.open(BytesIO(body)).save(out, "JPEG", exif=exif, quality=90)
    return out.getvalue()


def xmp(body: bytes, told: bytes) -> bytes:
    segment = (
        b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description "
        + told
        + b"/></x:xmpmeta>"
    )
    return body[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + body[2:]


def cmyk() -> bytes:
    out = BytesIO()
    Image.fromarray(scene(20, 30)).convert("CMYK").save(out, "JPEG")
    return out.getvalue()


PLAIN: dict[str, tuple[bytes, int]] = {
    "rotated": (oriented(encoded(scene(20, 30)), 6), 3),
    "rotated by XMP": (xmp(encoded(scene(20, 30)), b'tiff:Orientation="6"'), 3),
    "rotated by XMP's element": (xmp(encoded(scene(20, 30)), b"><tiff:Orientation>3</tiff:Orientation"), 3),
    "CMYK": (cmyk(), 3),
    "colour as grey": (encoded(scene(20, 30)), 1),
    "cut": (encoded(scene(20, 30))[:-20], 3),
    "cut in the header": (encoded(scene(20, 30))[:200], 3),
    "not a JPEG": (b"\x89PNG\r\n\x1a\n" + bytes(100), 3),
    "nothing": (b"", 3),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_not_plain_is_left_to_pillow(kind: str, plainly: Any) -> None:
    body, channels = PLAIN[kind]
    assert fast(body, channels) is None
    assert same(lambda: decode(body, Form(channels)), lambda: plainly(body, Form(channels)))


def test_an_orientation_as_it_is_stays_fast() -> None:
    for body in (oriented(encoded(scene(20, 30)), 1), xmp(encoded(scene(20, 30)), b'tiff:Orientation="1"')):
        assert fast(body) is not None
    assert decode_jpeg(encoded(scene(20, 30)), 3, 599) is None  # more pixels than are decoded
    assert decode_jpeg(encoded(scene(20, 30)), 3, 600) is not None


def same(one: Callable[[], Pixels], other: Callable[[], Pixels]) -> bool:
    """Equal pixels, or both refused."""
    found: list[Pixels | None] = []
    for made in (one, other):
        try:
            found.append(made().copy())
        except BadSample:
            found.append(None)
    if found[0] is None or found[1] is None:
        return found[0] is found[1]
    return np.array_equal(found[0], found[1])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.booleans())
def test_damage_is_judged_as_without_simplejpeg(seed: int, flips: int, header: bool) -> None:
    rng = np.random.default_rng(seed)
    body = bytearray(encoded(scene(40, 40), quality=60, progressive=bool(seed % 2)))
    for at in rng.integers(2, 640 if header else len(body), flips):
        body[at] ^= 1 << rng.integers(8)

    def plain() -> Pixels:
        known, jpeg.library = jpeg.library, lambda: None  # type: ignore[assignment]
        try:
            return decode(bytes(body), Form(3))
        finally:
            jpeg.library = known

    assert same(lambda: decode(bytes(body), Form(3)), plain)


def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    first, second = encoded(scene(40, 50)), encoded(scene(40, 50, seed=1))
    held = fast(first)
    assert held is not None
    copy, place = held.copy(), held.ctypes.data
    part = torch.from_numpy(held[:, 3:9])
    del held
    for _ in range(3):
        other = fast(second)
        assert other is not None
        assert other.ctypes.data != place
    assert np.array_equal(part.numpy(), copy[:, 3:9])
    place = other.ctypes.data
    del other
    again = fast(first)
    assert again is not None
    assert again.ctypes.data == place


def test_reduced_pixels_are_means_of_blocks() -> None:
    """Within 2 levels on average of Pillow's own means; the sides are rounded up."""
    pixels = scene(163, 201)
    body = encoded(pixels, quality=95)
    for factor in (2, 4, 8):
        found = fast(body, 3, Need(163, factor))
        assert found is not None
        means = np.asarray(Image.fromarray(pixels).reduce(factor)).transpose(2, 0, 1).astype(int)
        assert found.shape == means.shape
        assert np.abs(found - means).mean() < 2
    assert [reduction(crop, 100) for crop in (99, 100, 199, 200, 399, 400, 800, 5000)] == [1, 1, 1, 2, 2, 4, 8, 8]


@pytest.mark.skipif(not PHOTOS.exists(), reason="needs ../shared/data/photos")
def test_photographs_have_pillows_pixels(tmp_path: Path, plainly: Any) -> None:
    """Ninety real files; those that rotate or are rare are left to Pillow."""
    for tar in PHOTOS.glob("*.tar"):
        (tmp_path / tar.name).symlink_to(tar)
    from selfsight.data.index import build_index

    for tar in tmp_path.glob("*.tar"):
        build_index(tar)
    shards, left = Shards(str(tmp_path)), 0
    for sample in range(0, len(shards), 8):
        body = shards.read(sample)
        found, expected = fast(body), plainly(body, Form(3))
        left += found is None
        assert found is None or np.array_equal(found, expected)
    assert left <= 2


# -- resizing


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(200, 150), (31, 300), (90, 90), (400, 420)])
def test_resizing_is_torchvisions_and_pillows(mode: str, height: int, width: int) -> None:
    """torchvision's bit for bit, interleaved or not; Pillow's within 1 level, mean below 0.1, up and down."""
    pixels = scene(height, width).transpose(2, 0, 1)
    method = reference.InterpolationMode(mode)
    for size in (64, 224):
        found = resize(pixels, size, size, mode)
        theirs = reference.resize(torch.from_numpy(np.ascontiguousarray(pixels)), [size, size], method, antialias=True)
        assert np.array_equal(found, theirs.numpy())
        assert np.array_equal(resize(np.ascontiguousarray(pixels), size, size, mode), found)
        image = Image.fromarray(pixels.transpose(1, 2, 0)).resize((size, size), Image.Resampling[mode.upper()])
        difference = np.abs(found.astype(int) - np.asarray(image).transpose(2, 0, 1))
        assert difference.max() <= 1
        assert difference.mean() < 0.1
        assert np.array_equal(mirrored(found), found[..., ::-1])


def test_a_view_is_torchvisions_resized_crop_and_flip() -> None:
    maker, flips = ViewMaker(View(), 0, 32, "bicubic", seed=5), 0
    for position, draws in enumerate(maker.draws(np.arange(16))):
        pixels = scene(50, 70, seed=position).transpose(2, 0, 1)
        left, top, right, bottom = crop_box(70, 50, draws[1:], maker.view)
        given_ = torch.from_numpy(np.ascontiguousarray(pixels))
        expected = reference.resized_crop(
            given_, top, left, bottom - top, right - left, [32, 32], reference.InterpolationMode.BICUBIC
        )
        if draws[0] < 0.5:
            expected, flips = reference.horizontal_flip(expected), flips + 1
        assert np.array_equal(maker(pixels, draws), expected.numpy())
    assert 3 < flips < 13


@pytest.mark.parametrize(
    ("height", "width", "size", "channels", "mode", "dtype"),
    [
        (32, 32, 32, 3, "bicubic", torch.float32), (28, 28, 28, 1, "bicubic", torch.float32),
        (8, 8, 8, 1, "bicubic", torch.float32), (20, 32, 64, 4, "bilinear", torch.float32),
        (33, 40, 9, 3, "bicubic", torch.float64), (17, 23, 5, 2, "bilinear", torch.float64),
    ],
)  # fmt: skip
def test_crops_of_a_batch_are_torchs_bit_for_bit(
    height: int, width: int, size: int, channels: int, mode: str, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    count = AT_ONCE + 40
    pixels = rng.integers(0, 256, (count, height, channels, width), np.uint8)
    pixels[:30] = (pixels[:30] > 127) * 255  # overshoots at every edge
    w, h = rng.integers(1, width + 1, count), rng.integers(1, height + 1, count)
    w[0], h[0], w[1], h[1] = 1, 1, width, height
    left, top = (rng.random(count) * (width - w + 1)).astype(int), (rng.random(count) * (height - h + 1)).astype(int)
    flips = rng.random(count) < 0.5
    found = resized_crops(torch.from_numpy(pixels), np.stack([left, top, left + w, top + h], 1), flips, size, mode)
    assert table(width, size, mode).weights.dtype == dtype
    for i in range(count):
        crop = pixels[i].transpose(1, 0, 2)[None, :, top[i] : top[i] + h[i], left[i] : left[i] + w[i]]
        expected = F.interpolate(torch.from_numpy(crop.copy()), (size, size), mode=mode, antialias=True)[0]
        assert torch.equal(found[i], expected.flip(-1) if flips[i] else expected), i


def test_weights_sum_to_one_and_tables_are_bounded() -> None:
    for length, size in ((1, 8), (32, 32), (64, 7), (7, 64)):
        weights = axis_weights(length, size, "bicubic")
        assert np.abs(weights.sum(1) - 1).max() < 0.01
    assert affordable(32, 32, 224)
    assert not affordable(64, 64, 224)
    assert not affordable(16, 64, 224)


def test_boxes_of_a_batch_are_those_one_by_one() -> None:
    view = View(crop_scale=(0.05, 1.0))
    for width, height in ((32, 32), (8, 8), (64, 5), (3, 60), (1, 1)):
        draws = uniform(1, "test", range(400), 4 * CROP_TRIES)
        expected = [crop_box(width, height, row, view) for row in draws]
        assert crop_boxes(width, height, draws, view).tolist() == [list(box) for box in expected]


# -- cached pixels


def noise_png(seed: int) -> bytes:
    out = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 small images, of which 0, 1, 17 and 60 cannot be decoded though their bytes are those that were indexed."""
    folder = tmp_path_factory.mktemp("tiny")

    def bodies() -> Iterator[tuple[bytes, int]]:
        for i in range(90):
            body = noise_png(i)
            yield body, i % 3

    from selfsight.data import build

    def spoilt() -> Iterator[tuple[bytes, int]]:
        for i, (body, label) in enumerate(bodies()):
            yield (body[:-40] if i in {0, 1, 17, 60} else body), label

    build.write_shards(spoilt(), folder, "t", per_shard=40)
    return folder


@pytest.fixture(scope="module")
def cache(tiny: Path) -> PixelCache:
    return build_cache(Shards(str(tiny)), Form(3))


def batches(folder: Path, views: tuple[View, ...] = (View(),), **options: Any) -> Batches:
    makers = tuple(ViewMaker(view, number, 16, "bicubic", 3) for number, view in enumerate(views))
    return Batches(Shards(str(folder)), makers, 3, options.pop("form", Form(3)), 30, **options)


def equal(a: HostBatch, b: HostBatch) -> bool:
    tensors = zip((*a.views, a.positions, a.keys, a.ids), (*b.views, b.positions, b.keys, b.ids), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in tensors) and a.bad == b.bad


VIEWS: dict[str, tuple[View, ...]] = {
    "one": (View(),),
    "two sizes": (View(crop_scale=(0.4, 1.0), flip=0.0), View(size=7, crop_scale=(0.05, 0.4), jitter=0.5)),
    "whole": (View(crop_scale=None),),
    "neighbour": (View(), View(shift=4)),  # every third has the same label
}


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("augmentations", [None, 2])
def test_a_cache_changes_nothing(tiny: Path, cache: PixelCache, views: str, augmentations: int | None) -> None:
    """Ids, keys, pixels, and what is recorded of bad samples: bit for bit, in every epoch."""
    plain = batches(tiny, VIEWS[views], augmentations=augmentations)
    cached = batches(tiny, VIEWS[views], augmentations=augmentations, cache=pickle.loads(pickle.dumps(cache)))  # noqa: S301 - as a worker gets it
    bad = 0
    for number in range(6):
        assert equal(cached[number], plain[number])
        bad += len(cached[number].bad)
    assert bad >= 8
    if augmentations:
        assert equal(Rows(cached, 180)[0], Rows(plain, 180)[0])
    condemned = {5: "crashes the decoder", 6: "hangs the decoder"}
    assert equal(cached.without(condemned)[1], plain.without(condemned)[1])


def test_a_cached_image_is_the_decoded_one(tiny: Path, cache: PixelCache) -> None:
    shards = Shards(str(tiny))
    assert (len(cache), cache.shape, sorted(cache.bad)) == (90, (3, 20, 24), [0, 1, 17, 60])
    for sample in (2, 16, 18, 89):
        assert np.array_equal(cache.image(sample), decode(shards.read(sample), Form(3)))
    with pytest.raises(BadSample, match="damaged image"):
        cache.image(17)
    found = find_cache(shards, Form(3))
    assert found is not None
    assert found.bad == cache.bad


def test_cached_batches_read_no_shard(tiny: Path, cache: PixelCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Shards, sample: int) -> bytes:
        raise AssertionError("read")

    monkeypatch.setattr(Shards, "read", refuse)
    for views in VIEWS.values():
        assert batches(tiny, views, cache=cache)[0].ids.shape == (30,)


def test_another_form_or_set_has_no_cache(tiny: Path, cache: PixelCache, small_shards: Path) -> None:
    shards = Shards(str(tiny))
    assert find_cache(Shards(str(small_shards)), Form(3)) is None
    assert all(find_cache(shards, form) is None for form in (Form(1), Form(3, 16), Form(3, 8, None, 2)))


def test_every_damaged_byte_of_a_cache_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(iter(pictures(4)), tmp_path, "s")
    shards = Shards(str(tmp_path))
    path = build_cache(shards, Form(1)).path
    whole = path.read_bytes()
    assert len(whole) == HEADER.itemsize + 4 * 64 + 2
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError):
            PixelCache(path)
    for cut in (0, 10, 64, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert find_cache(shards, Form(1)) is None
    assert "selfsight shards cache" in capsys.readouterr().err
    build_cache(shards, Form(1))
    assert path.read_bytes() == whole
    assert [found.name for found in path.parent.glob(f"{shards.id}*")] == [path.name]


def test_what_cannot_be_cached_is_said(tmp_path: Path) -> None:
    refused: dict[str, tuple[list[Any], str]] = {
        "sizes": (pictures(2) + pictures(1, size=(9, 8)), "has the shape"),
        "large": (pictures(2, size=(65, 8)), "at most 64 x 64"),
        "bad": ([(noise_png(i)[:-40], 0) for i in range(2)], "no image can be decoded"),
    }
    for name, (images, told) in refused.items():
        (tmp_path / name).mkdir()
        write_shards(iter(images), tmp_path / name, "s")
        shards = Shards(str(tmp_path / name))
        with pytest.raises((UsageError, DataError), match=told):
            build_cache(shards, Form(1))
        assert not cache_path(shards, Form(1)).exists()


def test_rotten_bytes_are_not_cached_as_bad(tmp_path: Path) -> None:
    """They may come back; an image that cannot be decoded stays so."""
    write_shards(iter(pictures(4)), tmp_path, "s")
    (shard,) = tmp_path.glob("*.tar")
    raw = bytearray(shard.read_bytes())
    raw[int(Shards(str(tmp_path))._locate(2)[1]["offset"]) + 30] ^= 1
    shard.write_bytes(raw)
    shards = Shards(str(tmp_path))
    with pytest.raises(DataError, match="not those that were indexed"):
        build_cache(shards, Form(1))


def test_a_run_uses_the_cache_that_the_command_made(
    small_fields: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    device = torch.device("cpu")
    before = assemble(load("digits/mae", small_fields), device)
    assert before.batches().cache is None
    assert cli.main(["shards", "cache", small_fields["data.train"], "--channels", "1"]) == 0
    assert "120 samples of (1, 8, 8)" in capsys.readouterr().out
    after = assemble(load("digits/mae", small_fields), device)
    assert after.batches().cache is not None
    assert equal(after.batches()[2], before.batches()[2])
    off = assemble(load("digits/mae", {**small_fields, "data.cache": "off"}), device)
    assert off.batches().cache is None
    assert off.fingerprint() == after.fingerprint()  # a run may go on with it or without


# -- several views and positions from one decoding


def test_what_is_needed_serves_every_view() -> None:
    """The lowest row of all crops, and the reduction that the smallest of them bears."""
    makers = [ViewMaker(View(size=size), number, 16, "bicubic", 3) for number, size in enumerate((16, 48))]
    for keys in (np.arange(1), np.arange(5, 8)):
        crops = [maker.draws(keys) for maker in makers]
        boxes = [[maker.box(300, 400, row) for row in rows] for maker, rows in zip(makers, crops, strict=True)]
        bottom = max(box[3] for of_view in boxes for box in of_view)
        assert needed(makers, crops, False, 300, 400) == Need(bottom, 1)
        sides = [[min(box[2] - box[0], box[3] - box[1]) for box in of_view] for of_view in boxes]
        factors = [reduction(side, size) for of_view, size in zip(sides, (16, 48), strict=True) for side in of_view]
        assert len(set(factors)) > 1
        assert needed(makers, crops, True, 300, 400) == Need(bottom, min(factors))


def test_repeats_share_a_sample_and_differ_in_their_crops(tiny: Path) -> None:
    made = batches(tiny, repeat=3, views=(View(flip=0.0),))
    parts = [made[number] for number in range(9)]  # 270 positions: every sample three times
    ids = torch.cat([part.ids for part in parts])
    positions = torch.cat([part.positions for part in parts])
    assert positions.tolist() == list(range(270))
    order = Shards(str(tiny)).ids(np.arange(90), 3)
    good = ~np.isin(order, [0, 1, 17, 60])
    assert np.array_equal(ids.view(90, 3).numpy()[good], np.repeat(order[good, None], 3, 1))
    views = torch.cat([part.views[0] for part in parts]).reshape(90, 3, -1)
    alike = (views[good][:, 0] == views[good][:, 1]).all(1) | (views[good][:, 1] == views[good][:, 2]).all(1)
    assert not alike.any()
    one = ViewMaker(View(flip=0.0), 0, 16, "bicubic", 3)
    for position in (0, 1, 2, 100):
        pixels = decode(Shards(str(tiny)).read(int(ids[position])), Form(3))
        expected = one(pixels, one.draws(np.array([position]))[0])
        assert np.array_equal(parts[position // 30].views[0][position % 30].numpy(), expected)


def test_repeats_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEGs, of which each crop needs other rows; on two ranks as on one."""
    images = [(encoded(scene(90, 60, seed=i)), 0) for i in range(24)]
    write_shards(iter(images), tmp_path, "j")
    whole = batches(tmp_path, repeat=3)
    plain = [whole[number] for number in range(3)]
    calls: list[int] = []

    def counted(body: bytes, form: Form, needs: Any = None) -> Pixels:
        calls.append(1)
        return decode(body, form, needs)

    monkeypatch.setattr(picture, "decode", counted)
    assert equal(whole[1], plain[1])
    assert len(calls) == 10
    for number in range(3):
        halves = [batches(tmp_path, repeat=3, rank=rank, world=2)[number] for rank in (0, 1)]
        assert torch.equal(torch.cat([half.views[0] for half in halves]), plain[number].views[0])
        assert torch.equal(torch.cat([half.ids for half in halves]), plain[number].ids)


def test_repeats_of_a_fixed_number_of_augmentations_take_them_in_turn(tiny: Path) -> None:
    made = batches(tiny, repeat=2, augmentations=3)
    keys = torch.cat([made[number].keys for number in range(12)]).view(2, 90, 2)  # two passes, each two crops a sample
    samples = keys % 90
    assert torch.equal(samples[..., 0], samples[..., 1])
    seen = {(int(sample), int(turn)) for sample, turn in zip(samples.flatten(), (keys // 90).flatten(), strict=True)}
    assert len(seen) == 90 * 3
    assert (keys[0] // 90).tolist() == [[0, 1]] * 90
    assert (keys[1] // 90).tolist() == [[2, 0]] * 90


# -- what a recipe says


def test_fast_decoding_asks_for_its_library(small_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load("digits/mae", {**small_fields, "data.fast_decode": True})
    assert assemble(recipe, torch.device("cpu")).batches().reduce
    monkeypatch.setattr(jpeg, "library", lambda: None)
    with pytest.raises(UsageError, match=r"selfsight\[fast\]"):
        assemble(recipe, torch.device("cpu"))


def test_reduced_decoding_is_close_and_only_where_crops_are_large(tmp_path: Path) -> None:
    """Photographs of five times the view: within 3 levels on average; crops below twice the view: the same pixels."""
    for side, most in ((100, 3.0), (24, 0.0)):
        folder = tmp_path / str(side)
        folder.mkdir()
        write_shards(iter([(encoded(scene(side, side, seed=i)), 0) for i in range(30)]), folder, "j")
        views = (View(crop_scale=(0.5, 1.0)),)
        plain, reduced = batches(folder, views)[0], batches(folder, views, reduce=True)[0]
        difference = (plain.views[0].int() - reduced.views[0].int()).abs().float().mean().item()
        assert difference <= most
        assert (difference > 0) == (most > 0)
