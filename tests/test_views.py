"""Decoding and geometry: golden pixels, and torchvision's own transforms given the same parameters."""

import contextlib
import math
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data import create_transform
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as reference

from selfsight import keyed
from selfsight.data.decode import decode, open_image
from selfsight.data.views import CROP_TRIES, RESAMPLING, View, ViewMaker, crop_box, resize_and_crop, to_array
from selfsight.errors import DataError, UsageError


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


# -- decoding


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    grey = np.asarray(decode(encoded(Image.fromarray(ramp)), 1))
    assert np.array_equal(grey, np.rint(ramp / 257).astype(np.uint8))
    assert (np.asarray(decode(encoded(Image.fromarray(ramp)), 3)) == grey[..., None]).all()


def test_transparency_is_composed_over_white() -> None:
    for image in (Image.new("RGBA", (2, 2), (255, 0, 0, 128)), Image.new("LA", (2, 2), (0, 128))):
        pixel = np.asarray(decode(encoded(image), 3))[0, 0]
        expected = [255, 127, 127] if image.mode == "RGBA" else [127, 127, 127]
        assert np.abs(pixel.astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert np.asarray(decode(encoded(palette), 3))[0, 0].tolist() == [10, 20, 30]
    assert np.asarray(decode(encoded(palette, transparency=1), 3))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(("mode", "colour", "rgb"), [
    ("1", 1, [255] * 3), ("L", 77, [77] * 3), ("RGB", (1, 2, 3), [1, 2, 3]),
])  # fmt: skip
def test_modes(mode: str, colour: object, rgb: list[int]) -> None:
    assert np.asarray(decode(encoded(Image.new(mode, (3, 2), colour)), 3))[0, 0].tolist() == rgb  # type: ignore[arg-type]


def test_cmyk_jpeg() -> None:
    pixel = np.asarray(decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), 3))[
        4, 4
    ].astype(int)
    assert np.abs(pixel - [255, 0, 0]).max() < 6  # red, not its inverse


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = noise(6, 4)
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL's transpose that the tag undoes
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(decode(encoded(stored, exif=exif), 3)), np.asarray(upright))


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    body = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(body, 3))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_refused_wherever_they_are_cut(form: str) -> None:
    body = encoded(noise(64, 64), form)
    assert decode(body, 3)
    for share in np.linspace(0.05, 0.95, 10):
        with pytest.raises(DataError):
            decode(body[: int(len(body) * share)], 3)


@pytest.mark.parametrize(
    "body", [b"", b"<html>404</html>", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n" + bytes(50), b"\xff\xd8\xff"]
)
def test_what_is_no_image_is_refused(body: bytes) -> None:
    with pytest.raises(DataError, match=r"not an image|damaged"):
        decode(body, 3)


def test_bombs_are_refused_from_the_header() -> None:
    for side in (7_100, 14_000):
        body = encoded(Image.new("1", (side, side)))
        with pytest.raises(DataError, match=r"exceeds limit|more than the 50,000,000"):
            open_image(body)


def test_32_bit_images_are_refused() -> None:
    with pytest.raises(DataError, match="range is unknown"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), 1)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]), st.integers(0, 2**32), st.integers(1, 30))
def test_hostile_bytes_are_a_data_error_or_an_image(form: str, seed: int, flips: int) -> None:
    body, rng = bytearray(encoded(noise(9, 7), form)), np.random.default_rng(seed)
    for place in rng.integers(0, len(body), flips):
        body[place] = rng.integers(0, 256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF
        with contextlib.suppress(DataError):
            assert decode(bytes(body), 3).mode == "RGB"


def test_other_channels_are_not_read_yet() -> None:
    with pytest.raises(UsageError, match="images are read with 1 or 3 channels"):
        decode(encoded(noise(4, 4)), 2)


# -- geometry


def test_crop_box_is_torchvisions_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try is torchvision's, fed from our uniforms in the order in which it asks for area, ratio, top and left."""
    view, fallbacks = View(crop_scale=(0.2, 1.0)), 0
    for number, (width, height) in enumerate([(64, 48), (30, 90), (1, 1), (500, 20), (20, 2000), (7, 7)] * 8):
        draws = keyed.uniform(0, "test", [number], 4 * CROP_TRIES)[0]
        fed = iter(draws)
        monkeypatch.setattr(
            torch.Tensor,
            "uniform_",
            lambda self, a, b: torch.tensor([a + (b - a) * next(fed)], dtype=torch.float64),  # noqa: B023
        )
        monkeypatch.setattr(torch, "randint", lambda a, b, size: torch.tensor([int(a + next(fed) * (b - a))]))  # noqa: B023
        expected = None
        for attempt in range(CROP_TRIES):
            fed = iter(draws[4 * attempt :])
            expected = expected or _first_try(width, height, view)
        monkeypatch.undo()
        fallbacks += expected is None
        assert crop_box(width, height, draws, view) == (expected or _fallback(width, height, view))
    assert 0 < fallbacks < 40


def _first_try(width: int, height: int, view: View) -> tuple[int, int, int, int] | None:
    """One try of torchvision's loop: its own code with the loop cut to one round."""
    area = height * width
    log_ratio = torch.log(torch.tensor(view.crop_ratio, dtype=torch.float64))
    target_area = area * torch.empty(1).uniform_(*view.crop_scale).item()  # type: ignore[misc]
    aspect_ratio = torch.exp(torch.empty(1).uniform_(log_ratio[0], log_ratio[1])).item()
    w, h = round(math.sqrt(target_area * aspect_ratio)), round(math.sqrt(target_area / aspect_ratio))
    if not (0 < w <= width and 0 < h <= height):
        return None
    top = torch.randint(0, height - h + 1, size=(1,)).item()
    left = torch.randint(0, width - w + 1, size=(1,)).item()
    return int(left), int(top), int(left) + w, int(top) + h


def _fallback(width: int, height: int, view: View) -> tuple[int, int, int, int]:
    """torchvision's central crop, reached by asking for crops larger than the image."""
    image = torch.empty(3, height, width)
    top, left, h, w = RandomResizedCrop.get_params(image, scale=[4.0, 4.0], ratio=list(view.crop_ratio))
    return left, top, left + w, top + h


def test_crops_have_torchvisions_distribution() -> None:
    view = View(crop_scale=(0.2, 1.0))
    ours = [crop_box(64, 48, d, view) for d in keyed.uniform(0, "t", range(3000), 4 * CROP_TRIES)]
    torch.manual_seed(0)
    image = torch.empty(3, 48, 64)
    theirs = [RandomResizedCrop.get_params(image, scale=[0.2, 1.0], ratio=[3 / 4, 4 / 3]) for _ in range(3000)]
    for mine, other in (
        ([b[2] - b[0] for b in ours], [w for _, _, _, w in theirs]),
        ([b[3] - b[1] for b in ours], [h for _, _, h, _ in theirs]),
        ([b[0] for b in ours], [left for _, left, _, _ in theirs]),
    ):
        assert stats.ks_2samp(mine, other).pvalue > 1e-3


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000))
def test_crops_lie_inside(width: int, height: int, position: int) -> None:
    draws = keyed.uniform(0, "t", [position], 4 * CROP_TRIES)[0]
    left, top, right, bottom = crop_box(width, height, draws, View())
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_a_view_has_torchvisions_pixels() -> None:
    maker = ViewMaker(View(flip=0.5), 0, 24, "bicubic", seed=3)
    flips = 0
    for position, draws in enumerate(maker.draws(np.arange(20))):
        image = noise(50, 40, seed=position)
        left, top, right, bottom = crop_box(50, 40, draws[1:], maker.view)
        expected = reference.resized_crop(
            image, top, left, bottom - top, right - left, [24, 24], reference.InterpolationMode.BICUBIC
        )
        if draws[0] < 0.5:
            expected, flips = reference.hflip(expected), flips + 1
        assert np.array_equal(maker(image, draws), np.asarray(expected).transpose(2, 0, 1))
    assert 4 < flips < 16


def test_views_of_one_image_differ() -> None:
    draws = [ViewMaker(View(), number, 8, "bicubic", seed=0).draws(np.arange(5)) for number in (0, 1)]
    assert (draws[0] != draws[1]).all()


@pytest.mark.parametrize("size", [(50, 40), (33, 97), (64, 64), (24, 24), (10, 300), (5, 170), (170, 5)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_evaluations_view_is_timms(size: tuple[int, int], crop_pct: float) -> None:
    image = noise(*size)
    theirs = create_transform((3, 24, 24), interpolation="bicubic", crop_pct=crop_pct, mean=(0,) * 3, std=(1,) * 3)(
        image
    )
    ours = to_array(resize_and_crop(image, 24, crop_pct, RESAMPLING["bicubic"]))
    assert np.array_equal(ours, (theirs * 255).round().byte().numpy())  # type: ignore[union-attr]


def test_grey_images_stay_one_channel() -> None:
    assert to_array(noise(8, 8, "L")).shape == (1, 8, 8)


@pytest.mark.parametrize("crop_scale", [None, (0.2, 1.0)])
def test_a_view_has_its_own_size_if_it_has_one(crop_scale: tuple[float, float] | None) -> None:
    image = noise(30, 20)
    for size, expected in ((None, 16), (7, 7), (20, 20)):
        maker = ViewMaker(View(size=size, crop_scale=crop_scale, flip=0.0), 0, 16, "bilinear", seed=1)
        draws = maker.draws(np.array([5]))[0]
        made = maker(image, draws)
        assert made.shape == (3, expected, expected)
        if crop_scale:
            left, top, right, bottom = crop_box(30, 20, draws[1:], maker.view)
            theirs = reference.resized_crop(image, top, left, bottom - top, right - left, [expected, expected])
        else:
            theirs = reference.center_crop(reference.resize(image, [expected]), [expected, expected])
        assert np.array_equal(made, np.asarray(theirs).transpose(2, 0, 1))


def test_shifts_are_uniform_and_belong_to_the_key_and_the_view() -> None:
    keys = np.arange(3000)
    first, second = (ViewMaker(View(shift=3), number, 8, "bicubic", seed=0).shifts(keys) for number in (0, 1))
    assert set(first.tolist()) == {1, 2, 3}
    assert np.abs(np.bincount(first)[1:] / 3000 - 1 / 3).max() < 0.03
    assert 0.2 < (first == second).mean() < 0.45
    alone = ViewMaker(View(shift=3), 0, 8, "bicubic", seed=0).shifts(np.array([1234]))
    assert alone[0] == first[1234]
    assert (ViewMaker(View(shift=3), 0, 8, "bicubic", seed=1).shifts(keys) != first).any()
    assert not ViewMaker(View(), 0, 8, "bicubic", seed=0).shifts(keys).any()
    assert set(ViewMaker(View(shift=1), 0, 8, "bicubic", seed=0).shifts(keys).tolist()) == {1}


@pytest.mark.parametrize(
    "fields",
    [
        {"crop_scale": (0.5, 0.2)}, {"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.5, 1.1)}, {"crop_ratio": (2.0, 1.0)},
        {"crop_ratio": (0.0, 1.0)}, {"flip": 2.0}, {"size": 0}, {"shift": -1}, {"jitter": 1.1}, {"brightness": -0.1},
        {"contrast": -0.1}, {"saturation": -0.1}, {"hue": 0.6}, {"hue": -0.1}, {"grayscale": 1.5}, {"blur": -0.5},
        {"blur_sigma": (2.0, 1.0)}, {"blur_sigma": (0.0, 1.0)}, {"solarize": 1.5},
    ],
)  # fmt: skip
def test_impossible_views_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        View(**fields)  # type: ignore[arg-type]


def test_views_at_the_edge_are_allowed() -> None:
    View(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), blur_sigma=(1.0, 1.0), hue=0.5, brightness=1.5, size=1)
    plain = View()
    assert (plain.size, plain.shift, plain.jitter, plain.grayscale, plain.blur, plain.solarize) == (None, 0, 0, 0, 0, 0)
