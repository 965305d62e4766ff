"""Colour: every operation is torchvision's on float pixels, image by image, and each image has its own draws.

Mutations that these tests caught when they were tried: a probability turned round, one operation with another's draw, a
hue that turns one way only, a negative factor, colour of grey images, solarisation of the dark half, the mean of the whole
batch as an image's, sectors of the colour circle exchanged, a narrower kernel, another deviation, borders mirrored with
their last pixel, the images that were not chosen, the draws of the first images for the chosen ones, pixels changed in place.
"""

from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as reference

from selfsight.data.colour import (
    DRAWS,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    change_colour,
    shift_hue,
    to_gray,
)
from selfsight.data.views import View

PLAIN: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}


def images(count: int = 6, channels: int = 3, height: int = 7, width: int = 9, seed: int = 0) -> torch.Tensor:
    """Noise with some greys, blacks, whites, pure colours and ties between channels."""
    made = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))
    made[:, :, 0, :2] = 0.0
    made[:, :, 0, 2:4] = 1.0
    made[:, :, 1, :3] = 0.3
    if channels == 3:
        made[:, :2, 2, :3] = 0.8  # yellow
        made[:, 1:, 3, :3] = 0.6  # cyan
        made[:, ::2, 4, :3] = 0.9  # magenta
        made[:, :, 5, :3] = torch.eye(3)
    return made


def draws(count: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((count, DRAWS))


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, reference.adjust_brightness, 0.0, 2.0),
        (adjust_contrast, reference.adjust_contrast, 0.0, 2.0),
        (adjust_saturation, reference.adjust_saturation, 0.0, 2.0),
        (shift_hue, reference.adjust_hue, -0.5, 0.5),
    ],
)
def test_jitter_is_torchvisions_with_a_factor_for_each_image(ours: Any, theirs: Any, low: float, high: float) -> None:
    pixels, factors = images(8), torch.linspace(low, high, 8)
    found = ours(pixels, factors.view(-1, 1, 1, 1))
    for image, factor, mine in zip(pixels, factors.tolist(), found, strict=True):
        assert torch.allclose(mine, theirs(image, factor), atol=1e-5), factor
    assert torch.equal(pixels, images(8))


def test_contrast_and_brightness_of_grey_images_are_torchvisions() -> None:
    pixels, factors = images(5, channels=1), torch.linspace(0, 2, 5)
    for ours, theirs in (
        (adjust_brightness, reference.adjust_brightness),
        (adjust_contrast, reference.adjust_contrast),
    ):
        found = ours(pixels, factors.view(-1, 1, 1, 1))
        for image, factor, mine in zip(pixels, factors.tolist(), found, strict=True):
            assert torch.allclose(mine, theirs(image, factor), atol=1e-6)


def test_luma_is_torchvisions() -> None:
    assert torch.allclose(to_gray(images()), reference.rgb_to_grayscale(images()), atol=1e-6)
    assert torch.equal(to_gray(images(channels=1)), images(channels=1))


def test_greyscale_and_solarisation_are_torchvisions() -> None:
    pixels, given_ = images(), draws(6)
    gray = change_colour(pixels, View(**PLAIN | {"grayscale": 1.0}), given_)
    assert torch.allclose(gray, reference.rgb_to_grayscale(pixels, num_output_channels=3), atol=1e-6)
    solarized = change_colour(pixels, View(**PLAIN | {"solarize": 1.0}), given_)
    assert torch.equal(solarized, reference.solarize(pixels, 0.5))


@pytest.mark.parametrize(("height", "width", "channels"), [(9, 13, 3), (16, 16, 1), (3, 5, 3), (2, 2, 3), (6, 1, 3)])
@pytest.mark.parametrize("high", [0.3, 1.0, 2.0])
def test_blur_is_torchvisions_with_a_deviation_for_each_image(
    height: int, width: int, channels: int, high: float
) -> None:
    pixels = torch.rand(5, channels, height, width, generator=torch.Generator().manual_seed(0))
    given_ = draws(5)
    given_[:, 7] = [0.0, 0.3, 0.5, 0.9, 1.0]  # the last has the largest deviation of all
    found = change_colour(pixels, View(**PLAIN | {"blur": 1.0, "blur_sigma": (0.2, high)}), given_)
    side = 2 * min(ceil(3 * high), height - 1, width - 1) + 1
    for image, draw, mine in zip(pixels, given_[:, 7], found, strict=True):
        theirs = reference.gaussian_blur(image, [side, side], [0.2 + (high - 0.2) * draw] * 2)
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("probability", [0.3, 0.8])
def test_colour_is_a_slow_loop_over_images(channels: int, probability: float) -> None:
    """The operations in their order, each where its own draw says so, with a strength from its own draw."""
    view = View(
        jitter=probability, brightness=0.6, contrast=1.5, saturation=0.9, hue=0.3,
        grayscale=0.3, blur=0.5, blur_sigma=(0.34, 0.66), solarize=probability,
    )  # fmt: skip
    pixels, given_ = images(64, channels), draws(64, seed=5)
    found, counts = change_colour(pixels, view, given_), {"jitter": 0, "grey": 0, "blur": 0, "solar": 0}
    for image, draw, mine in zip(pixels, given_, found, strict=True):
        if draw[0] < probability:
            counts["jitter"] += 1
            image = reference.adjust_brightness(image, 0.4 + 1.2 * draw[1])
            image = reference.adjust_contrast(image, 2.5 * draw[2])  # 1 - 1.5 is below 0: the least is 0
            if channels == 3:
                image = reference.adjust_saturation(image, 0.1 + 1.8 * draw[3])
                image = reference.adjust_hue(image, 0.6 * draw[4] - 0.3)
        if draw[5] < 0.3 and channels == 3:
            counts["grey"] += 1
            image = reference.rgb_to_grayscale(image, num_output_channels=3)
        if draw[6] < 0.5:
            counts["blur"] += 1
            image = reference.gaussian_blur(image, [5, 5], [0.34 + 0.32 * draw[7]] * 2)
        if draw[8] < probability:
            counts["solar"] += 1
            image = reference.solarize(image, 0.5)
        # Where rounding takes a pixel across the middle, solarisation has the same limit from both sides.
        assert torch.allclose(mine, image, atol=2e-5)
    assert all(6 < count < 60 for name, count in counts.items() if channels == 3 or name != "grey")
    assert torch.equal(pixels, images(64, channels))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_a_strength_of_nought_changes_nothing(name: str) -> None:
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    pixels, given_ = images(), draws(6)
    none = change_colour(pixels, View(**PLAIN | {"jitter": 1.0} | strengths), given_)
    assert torch.equal(none, pixels)
    one = change_colour(pixels, View(**PLAIN | {"jitter": 1.0} | strengths | {name: 0.3}), given_)
    assert (one - pixels).abs().amax((1, 2, 3)).min() > 1e-3
    given_[:, 1:5] = 0.5  # the middle of every range: a factor of 1, a shift of 0
    assert torch.allclose(
        change_colour(pixels, View(**PLAIN | {"jitter": 1.0}), given_), pixels, atol=1e-5
    )  # and saturation of a grey is itself


def test_no_colour_is_the_same_pixels() -> None:
    pixels = images()
    assert change_colour(pixels, View(), draws(6)).data_ptr() == pixels.data_ptr()
    alone = np.zeros((6, DRAWS))  # a draw of 0 is below every probability but 0
    assert change_colour(pixels, View(), alone).data_ptr() == pixels.data_ptr()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_only_three_channels_have_a_colour_to_change(channels: int) -> None:
    pixels = images(channels=channels)
    coloured = View(
        **PLAIN | {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 1.0, "hue": 0.5, "grayscale": 1.0}
    )
    assert torch.equal(change_colour(pixels, coloured, draws(6)), pixels)


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    """The same pixels for any number of ranks and micro-batches."""
    view = View(jitter=0.8, grayscale=0.2, blur=0.5, solarize=0.2)
    pixels, given_ = images(16, height=24, width=24), draws(16, seed=3)
    whole = change_colour(pixels, view, given_)
    for image in range(16):
        alone = change_colour(pixels[image : image + 1], view, given_[image : image + 1])
        assert torch.allclose(alone[0], whole[image], atol=1e-5), image
    order = np.random.default_rng(0).permutation(16)
    assert torch.allclose(change_colour(pixels[order], view, given_[order]), whole[order], atol=1e-6)


colours = st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(colours, st.floats(-0.5, 0.5))
def test_hue_keeps_value_and_saturation_and_comes_round(made: list[tuple[float, float, float]], shift: float) -> None:
    pixels = torch.tensor(made).T[None, :, :, None]
    turned = shift_hue(pixels, torch.full((1, 1, 1, 1), shift))
    assert torch.allclose(turned.amax(1), pixels.amax(1), atol=1e-6)
    assert torch.allclose(turned.amin(1), pixels.amin(1), atol=1e-5)
    for whole in (-1.0, 0.0, 1.0):
        assert torch.allclose(shift_hue(pixels, torch.full((1, 1, 1, 1), whole)), pixels, atol=1e-5)
    thirds = shift_hue(pixels, torch.full((1, 1, 1, 1), 1 / 3))  # red becomes green, green blue, blue red
    assert torch.allclose(thirds, pixels.roll(1, 1), atol=1e-5)


def test_all_planes_get_one_change_and_none_is_blurred_into_the_next() -> None:
    """Plane by plane with the same draws; only contrast looks at the whole."""
    planes = torch.stack([images(seed=seed) for seed in (0, 1, 2)], dim=2)  # (B, 3, D, H, W)
    for own in ({"jitter": 1.0, "contrast": 0.0}, {"grayscale": 1.0}, {"blur": 1.0}, {"solarize": 1.0}):
        view = View(**PLAIN | own)
        expected = torch.stack([change_colour(planes[:, :, d], view, draws(6)) for d in range(3)], dim=2)
        assert torch.allclose(change_colour(planes, view, draws(6)), expected, atol=1e-6)
    given_ = draws(6)
    only = View(**PLAIN | {"jitter": 1.0, "brightness": 0.0, "saturation": 0.0, "hue": 0.0})
    factor = torch.from_numpy(1 - only.contrast + 2 * only.contrast * given_[:, 2]).float().view(-1, 1, 1, 1, 1)
    mean = torch.stack([to_gray(planes[:, :, d]).mean((1, 2, 3)) for d in range(3)]).mean(0).view(-1, 1, 1, 1, 1)
    assert torch.allclose(change_colour(planes, only, given_), (mean + (planes - mean) * factor).clamp(0, 1), atol=1e-5)
