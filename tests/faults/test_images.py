"""Bytes to pixels, against formulas written out in numpy; and whatever is no image, refused without harm."""

import contextlib
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from selfsight.data import crops
from selfsight.data.crops import ViewMaker, resize_and_crop
from selfsight.data.decode import BadSample, Form, decode, open_image
from selfsight.data.views import View
from selfsight.errors import DataError

Pixels = NDArray[Any]
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(values: Pixels, colour: int, *extra: bytes, depth: int = 0, size: tuple[int, int] | None = None) -> bytes:
    """A PNG of values (H, W) or (H, W, C), written by hand. `extra` chunks come before the pixels."""
    width, height = size or (values.shape[1], values.shape[0])
    depth = depth or 8 * values.itemsize
    if depth < 8:
        bits = values[..., None] >> np.arange(depth - 1, -1, -1, dtype=np.uint8) & 1
        rows = [np.packbits(row).tobytes() for row in bits.reshape(len(values), -1)]
    else:
        rows = [row.astype(row.dtype.newbyteorder(">")).tobytes() for row in values]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + data + chunk(b"IEND", b"")


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(*shape: int, most: int = 255, seed: int = 0, dtype: Any = np.uint8) -> Pixels:
    return np.random.default_rng(seed).integers(0, most + 1, shape).astype(dtype)


def rgb(body: bytes) -> Pixels:
    return decode(body, Form(3)).transpose(1, 2, 0).astype(int)


def grey(body: bytes) -> Pixels:
    return decode(body, Form(1))[0].astype(int)


def luma(pixels: Pixels) -> Pixels:
    """ITU-R 601-2."""
    return pixels @ np.array([0.299, 0.587, 0.114])


def over_white(colour: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None].astype(float) / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(int)


def close(found: Pixels, expected: Pixels, within: float = 1) -> bool:
    return found.shape == expected.shape and np.abs(found - expected).max() <= within


# -- every mode


def test_rgb_and_grey() -> None:
    colour, level = noise(5, 7, 3), noise(5, 7)
    assert (rgb(png(colour, RGB)) == colour).all()
    assert close(grey(png(colour, RGB)), luma(colour))
    assert (grey(png(level, GREY)) == level).all()
    assert (rgb(png(level, GREY)) == level[..., None]).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_span_black_to_white(depth: int) -> None:
    values = noise(5, 11, most=2**depth - 1)
    assert (grey(png(values, GREY, depth=depth)) == values.astype(int) * 255 // (2**depth - 1)).all()


def test_16_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(ramp / 257)
    assert (grey(png(ramp, GREY)) == expected).all()
    assert (rgb(png(ramp, GREY)) == expected[..., None]).all()
    assert (grey(encoded(Image.fromarray(ramp), "TIFF")) == expected).all()
    assert len(np.unique(grey(png(ramp, GREY)))) == 256
    colours = np.stack([ramp, ramp[::-1], ramp.T], -1)
    assert close(rgb(png(colours, RGB)), colours / 257)
    alpha = noise(256, 256, most=65535, dtype=np.uint16)
    expected = over_white(colours / 257, alpha / 257)
    assert close(rgb(png(np.concatenate([colours, alpha[..., None]], -1), RGB_ALPHA)), expected, 2)
    both = np.stack([ramp, alpha], -1)
    assert close(rgb(png(both, GREY_ALPHA)), over_white(np.stack([ramp / 257] * 3, -1), alpha / 257), 2)


def test_alpha_is_composed_over_white() -> None:
    colour, alpha, level = noise(6, 9, 3), noise(6, 9, seed=1), noise(6, 9, seed=2)
    alpha[0, :2] = 0, 255
    body = png(np.concatenate([colour, alpha[..., None]], -1), RGB_ALPHA)
    assert close(rgb(body), over_white(colour, alpha))
    assert rgb(body)[0, 0].tolist() == [255, 255, 255]
    assert (rgb(body)[0, 1] == colour[0, 1]).all()
    assert close(grey(body), luma(over_white(colour, alpha)), 2)
    body = png(np.stack([level, alpha], -1), GREY_ALPHA)
    assert close(grey(body), over_white(level[..., None], alpha)[..., 0])
    assert close(rgb(body), over_white(np.stack([level] * 3, -1), alpha))


def test_palettes_with_and_without_alpha() -> None:
    entries, index, alphas = noise(256, 3), noise(6, 9, seed=1), noise(200, seed=2)
    palette = chunk(b"PLTE", entries.tobytes())
    assert (rgb(png(index, PALETTE, palette)) == entries[index]).all()
    alpha = np.append(alphas, [255] * 56)[index]  # entries beyond tRNS are opaque
    body = png(index, PALETTE, palette, chunk(b"tRNS", alphas.tobytes()))
    assert close(rgb(body), over_white(entries[index], alpha))


def test_a_transparent_colour_is_white() -> None:
    level, colour = noise(4, 4, most=3), noise(4, 4, 3, most=1)
    body = png(level, GREY, chunk(b"tRNS", b"\0\2"))
    assert (grey(body) == np.where(level == 2, 255, level)).all()
    body = png(colour, RGB, chunk(b"tRNS", b"\0\1\0\0\0\1"))
    key = (colour == [1, 0, 1]).all(-1)
    assert key.any()
    assert (rgb(body) == np.where(key[..., None], 255, colour)).all()
    ramp = np.arange(1000, 1016, dtype=np.uint16).reshape(4, 4)  # all of them 4 in 8 bits
    expected = np.where(ramp == 1005, 255, 4)
    assert (grey(png(ramp, GREY, chunk(b"tRNS", struct.pack(">H", 1005)))) == expected).all()
    bit = noise(4, 8, most=1)
    assert (grey(png(bit, GREY, chunk(b"tRNS", b"\0\0"), depth=1)) == 255).all()


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_ink_also_where_adobe_stores_it_inverted(form: str) -> None:
    ink = np.repeat(np.repeat(noise(3, 4, 4), 16, 0), 16, 1)  # flat squares, which JPEG keeps
    body = encoded(Image.fromarray(ink, "CMYK"), form, **({"quality": 100} if form == "JPEG" else {}))
    assert (b"Adobe" in body) == (form == "JPEG")
    cyan, magenta, yellow, black = np.moveaxis(ink.astype(float), -1, 0)
    expected = np.stack([(255 - one) * (255 - black) / 255 for one in (cyan, magenta, yellow)], -1)
    assert close(rgb(body), expected, 8 if form == "JPEG" else 1)


def test_32_bits_are_refused() -> None:
    for values in (np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)):
        with pytest.raises(BadSample, match="its range is unknown"):
            decode(encoded(Image.fromarray(values), "TIFF"), Form(1))


def test_an_image_of_other_channels_is_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="the encoder takes 2"):
        decode(png(noise(4, 4), GREY), Form(2))


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # by the EXIF standard: what turns the stored rows upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(form: str, orientation: int) -> None:
    stored, exif = noise(24, 40, 3), Image.Exif()
    exif[0x0112] = orientation  # 0 and 9 mean nothing
    lossless = {"lossless": True} if form == "WEBP" else {}
    plain = rgb(encoded(Image.fromarray(stored), form, **lossless))
    found = rgb(encoded(Image.fromarray(stored), form, exif=exif, **lossless))
    assert np.array_equal(found, UPRIGHT.get(orientation, UPRIGHT[1])(plain))


# -- more than one image, and more than an image


def frames(count: int = 3) -> list[Image.Image]:
    return [Image.fromarray(np.full((6, 8, 3), (40 * i + 80, 0, 0), np.uint8)) for i in range(count)]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first(form: str) -> None:
    first, *others = frames()
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    body = encoded(first, form, save_all=True, append_images=others, **options)
    assert Image.open(BytesIO(body)).n_frames == 3  # type: ignore[attr-defined]
    assert (rgb(body) == [80, 0, 0]).all()


def test_profiles_and_texts_change_no_pixel() -> None:
    values = noise(6, 8, 3)
    profile = chunk(b"iCCP", b"any\0\0" + zlib.compress(bytes(400_000)))
    texts = [chunk(b"tEXt", b"Comment\0" + b"x" * 900_000), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000)))]
    exif = chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0\0\0\0\0" + bytes(5_000_000))
    for extra in ([profile], texts, [exif], [profile, *texts, exif]):
        assert (rgb(png(values, RGB, *extra)) == values).all()
    jpeg = Image.fromarray(values)
    assert (rgb(encoded(jpeg, "JPEG", icc_profile=b"p" * 300_000)) == rgb(encoded(jpeg, "JPEG"))).all()


# -- odd shapes


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (2, 3)])
@pytest.mark.parametrize("crop", [(0.2, 1.0), (0.05, 0.4), None])
def test_extreme_shapes_give_whole_views(size: tuple[int, int], crop: tuple[float, float] | None) -> None:
    width, height = size
    image = decode(png(np.full((height, width), 99, np.uint8), GREY), Form(1))
    maker = ViewMaker(View(crop_scale=crop), 0, 12, "bicubic", 3)
    for draws in maker.draws(np.arange(20)):
        view = maker(image, draws)
        assert view.shape == (1, 12, 12)
        assert (view == 99).all()


@pytest.mark.parametrize("along", [0, 1])
def test_of_a_line_the_middle_is_taken_and_not_gigabytes(along: int) -> None:
    line = np.zeros((3, 20_000), np.uint8)
    line[:, 9_995:10_005] = 200
    image = np.ascontiguousarray(line if along else line.T)[None]
    sizes: list[tuple[int, ...]] = []
    real = crops.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crops, "resize", lambda pixels, *size: sizes.append(size[:2]) or real(pixels, *size))
        crop = resize_and_crop(image, 30, 1.0, "bicubic")
    assert max(map(max, sizes)) <= 8 * 30
    assert crop.shape == (1, 30, 30)
    assert (crop[0, 5:25, 5:25] == 200).all()


# -- what is no image


@pytest.mark.parametrize("form", ["JPEG", "progressive JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_images_are_refused_wherever_they_are_cut(form: str) -> None:
    options = {"progressive": True} if form.startswith("progressive") else {}
    body = encoded(Image.fromarray(noise(64, 64, 3)), form.split()[-1], **options)
    assert decode(body, Form(3)).size
    for share in np.linspace(0.02, 0.97, 10):
        with pytest.raises(BadSample):
            decode(body[: int(len(body) * share)], Form(3))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>404 Not Found</body></html>",
        b"%PDF-1.4",
        b"PK\x03\x04" + bytes(60),
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b"\xff\xd8\xff",
        b"GIF89a",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_what_is_no_image_is_refused_with_how_it_starts(body: bytes) -> None:
    with pytest.raises(BadSample, match=r"not an image of a known format \(starts with b|damaged image") as error:
        decode(body, Form(3))
    assert "\n" not in str(error.value)


def test_the_bytes_tell_the_format_and_no_name_does(tmp_path: Path) -> None:
    from tarforge import member, tar

    from selfsight.data.index import build_index
    from selfsight.data.shards import Shards

    values = noise(4, 4, 3)
    (tmp_path / "x.tar").write_bytes(tar(member(b"a.jpg", png(values, RGB))))
    build_index(tmp_path / "x.tar")
    assert (rgb(Shards(str(tmp_path / "x.tar")).read(0)) == values).all()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"]), st.integers(0, 2**32), st.integers(1, 30))
def test_hostile_bytes_are_a_bad_sample_or_an_image(form: str, seed: int, flips: int) -> None:
    body, rng = bytearray(encoded(Image.fromarray(noise(9, 7, 3)), form)), np.random.default_rng(seed)
    for place in rng.integers(0, len(body), flips):
        body[place] = rng.integers(0, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF
        with contextlib.suppress(BadSample):
            assert decode(bytes(body), Form(3)).dtype == np.uint8


# -- what would take the memory

LINE = np.zeros((1, 1), np.uint8)


def bombs() -> dict[str, bytes]:
    text = b"k\0\0" + zlib.compress(bytes(200_000_000), 1)
    gif = bytearray(encoded(Image.fromarray(noise(8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    bmp = bytearray(encoded(Image.fromarray(noise(8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 40_000, 40_000)
    webp = bytearray(encoded(Image.fromarray(noise(8, 8, 3)), "WEBP", lossless=True))
    webp[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    jpeg = bytearray(encoded(Image.fromarray(noise(8, 8, 3)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_500, 65_500)
    raw = zlib.compress(bytes(13_400 * (13_400 // 8 + 1)), 9)
    ones = png(LINE, GREY, depth=1, size=(13_400, 13_400))
    start = ones.index(b"IDAT") - 4
    return {
        "180 megapixels of 1 bit": ones[:start] + chunk(b"IDAT", raw) + chunk(b"IEND", b""),
        "64 megapixels": png(LINE, RGB, size=(8_000, 8_000)),
        "the largest header": png(LINE, RGB, size=(2**31 - 1, 2**31 - 1)),
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "ppm": b"P6 100000 100000 255\n" + bytes(100),
        "bmp": bytes(bmp),
        "webp": bytes(webp),
        "text": png(LINE, GREY, chunk(b"zTXt", text)),
        "international text": png(LINE, GREY, chunk(b"iTXt", b"k\0\1\0\0\0" + text[3:])),
        "profile": png(LINE, GREY, chunk(b"iCCP", text)),
        "a hundred texts": png(
            LINE, GREY, *[chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(10**6))) for i in range(100)]
        ),
    }


LIGHT = """
import json, resource, sys, warnings
from pathlib import Path
from selfsight.data.decode import BadSample, Form, decode
assert "torch" not in sys.modules
decode(Path(sys.argv[1], "fine").read_bytes(), Form(3))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20,) * 2)
warnings.simplefilter("error")
found = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        found[path.name] = decode(path.read_bytes(), Form(3)).shape
    except BadSample as error:
        found[path.name] = str(error)
print(json.dumps(found))
"""


def test_bombs_are_refused_within_100_mebibytes(tmp_path: Path) -> None:
    made = bombs()
    for name, body in (made | {"fine": png(noise(4, 4, 3), RGB)}).items():
        (tmp_path / name).write_bytes(body)
    assert len(made["180 megapixels of 1 bit"]) < 30_000
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path)],
        cwd=ROOT / "ssl",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found.pop("fine") == [3, 4, 4]
    assert found.keys() == made.keys()
    assert all(type(why) is str for why in found.values())
    assert found["64 megapixels"] == "image of 8000 x 8000 pixels, more than the 50,000,000 that are decoded"
    for name in ("180 megapixels of 1 bit", "jpeg", "gif", "ppm", "bmp", "the largest header"):
        assert "exceeds limit" in found[name] or "more than the 50,000,000" in found[name], (name, found[name])
    for name in ("text", "international text", "profile", "a hundred texts"):
        assert "too large" in found[name] or "Too much memory" in found[name], (name, found[name])


def test_the_cap_is_at_fifty_million() -> None:
    assert open_image(png(LINE, GREY, size=(10_000, 5_000))).size == (10_000, 5_000)
    with pytest.raises(DataError, match="image of 10000 x 5001 pixels"):
        open_image(png(LINE, GREY, size=(10_000, 5_001)))
