"""Geometry: torchvision's own transforms given the same parameters. Decoding is in faults/test_images.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from timm.data import create_transform
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as reference

from selfsight import keyed
from selfsight.data.crops import CROP_TRIES, ViewMaker, crop_box, resize_and_crop
from selfsight.data.decode import Pixels
from selfsight.data.views import View


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def as_pixels(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def assert_close(ours: Pixels, theirs: Pixels) -> None:
    """Pillow's resizing and torch's round otherwise between rows and columns: a level here and there, and more in a few pixels
    where bicubic overshoots black or white, which noise has many of."""
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert ours.shape == theirs.shape
    assert (difference > 2).mean() < 0.02
    assert difference.mean() < 0.5
    assert difference.max() < 24


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
        assert_close(maker(as_pixels(image), draws), as_pixels(expected))
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
    ours = resize_and_crop(as_pixels(image), 24, crop_pct, "bicubic")
    assert_close(ours, (theirs * 255).round().byte().numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize("crop_scale", [None, (0.2, 1.0)])
def test_a_view_has_its_own_size_if_it_has_one(crop_scale: tuple[float, float] | None) -> None:
    image = noise(30, 20)
    for size, expected in ((None, 16), (7, 7), (20, 20)):
        maker = ViewMaker(View(size=size, crop_scale=crop_scale, flip=0.0), 0, 16, "bilinear", seed=1)
        draws = maker.draws(np.array([5]))[0]
        made = maker(as_pixels(image), draws)
        assert made.shape == (3, expected, expected)
        if crop_scale:
            left, top, right, bottom = crop_box(30, 20, draws[1:], maker.view)
            theirs = reference.resized_crop(image, top, left, bottom - top, right - left, [expected, expected])
        else:
            theirs = reference.center_crop(reference.resize(image, [expected]), [expected, expected])
        assert_close(made, as_pixels(theirs))


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
