"""Gradient magnitude and MS-SSIM against slow loops in float64 and against pytorch_msssim.

Mutations that these tests caught when they were tried: Sobel without its factors or with equal weights, borders
reflected or black, one direction twice, no epsilon, no root, images not brought to 0..1 or shifted the wrong way, one
scale more or less, exponents not scaled or reversed or two of them swapped, luminance at every scale or at none,
negative similarities cut off before the mean over the image, no or a high lower bound, a mean instead of a product, a
sum over images, a mean over channels too early, other pooling, the window off centre, unscaled, of 9 pixels or
another width, constants swapped or not squared, variances and covariance without their means, half precision.
"""

import warnings
from math import exp

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfsight.objectives.pixels import gradient_magnitude, ms_ssim
from selfsight.preprocessing import Preprocessing

with warnings.catch_warnings():  # invalid escapes in its docstrings
    warnings.simplefilter("ignore")
    import pytorch_msssim

MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.25, 0.1)
WEIGHTS = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]  # Wang et al. 2003, section 3.2
SOBEL = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))


def preprocessing(size: int) -> Preprocessing:
    return Preprocessing(size, 3, MEAN, STD)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def pair(size: int, noise: float, count: int = 2) -> tuple[Tensor, Tensor]:
    """Images in 0..1, smooth and rough parts mixed, and noisy ones; noise 1: independent."""
    generator = torch.Generator().manual_seed(size)

    def draw() -> Tensor:
        coarse = torch.rand(count, 3, max(2, size // 8), max(2, size // 8), generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
        return 0.7 * smooth + 0.3 * torch.rand(count, 3, size, size, generator=generator)

    one, other = draw(), draw()
    return one, (1 - noise) * one + noise * other


def slow_ms_ssim(one: Tensor, other: Tensor) -> float:
    """MS-SSIM of images in 0..1, window by window. A scale's mean counts as at least 1e-6, so that others matter still."""
    values = [
        slow_of_channel(a, b)
        for a, b in zip(one.double().flatten(0, 1).numpy(), other.double().flatten(0, 1).numpy(), strict=True)
    ]
    return float(np.mean(values))


def slow_of_channel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    side = len(a)
    window = min(11, side)
    middle = (window - 1) / 2
    weight = np.array(
        [
            [exp(-((row - middle) ** 2 + (column - middle) ** 2) / (2 * 1.5**2)) for column in range(window)]
            for row in range(window)
        ]
    )
    weight /= weight.sum()
    scales = max(scales for scales in range(1, 6) if scales == 1 or side // 2 ** (scales - 1) >= 11)
    product = 1.0
    for scale in range(scales):
        luminances, structures = [], []
        for row in range(len(a) - window + 1):
            for column in range(len(a) - window + 1):
                x, y = (image[row : row + window, column : column + window] for image in (a, b))
                mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
                variance_x, variance_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
                covariance = (weight * (x - mean_x) * (y - mean_y)).sum()
                luminances.append((2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2))
                structures.append((2 * covariance + 0.03**2) / (variance_x + variance_y + 0.03**2))
        kept = structures if scale < scales - 1 else [p * q for p, q in zip(luminances, structures, strict=True)]
        product *= max(np.mean(kept), 1e-6) ** (WEIGHTS[scale] / sum(WEIGHTS[:scales]))
        half = len(a) // 2
        a, b = (x[: 2 * half, : 2 * half].reshape(half, 2, half, 2).mean((1, 3)) for x in (a, b))
    return product


def test_gradient_magnitude_is_a_slow_loop() -> None:
    images = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1))
    made = gradient_magnitude(images)
    assert made.shape == images.shape
    for image in range(2):
        for channel in range(3):
            pixels = images[image, channel].double().numpy()
            for row in range(5):
                for column in range(7):
                    across = down = 0.0
                    for i in range(3):
                        for j in range(3):
                            pixel = pixels[min(max(row + i - 1, 0), 4), min(max(column + j - 1, 0), 6)]
                            across += SOBEL[i][j] / 8 * pixel
                            down += SOBEL[j][i] / 8 * pixel
                    expected = (across**2 + down**2) ** 0.5
                    assert made[image, channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_gradient_magnitude_of_a_ramp_is_its_slope_and_that_of_one_colour_is_nothing() -> None:
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    ramp = (3 * rows - 4 * columns).expand(1, 2, 6, 6)
    assert torch.allclose(gradient_magnitude(ramp)[..., 1:-1, 1:-1], torch.tensor(5.0))
    flat = torch.full((1, 1, 4, 4), 0.3, requires_grad=True)
    edges = gradient_magnitude(flat)
    assert edges.max() < 2e-6
    edges.sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize("noise", [0.02, 0.2, 0.5, 0.8])
@pytest.mark.parametrize(("size", "scales"), [(192, 5), (176, 5), (168, 4)])
def test_ms_ssim_is_pytorch_msssims(size: int, scales: int, noise: float) -> None:
    one, other = pair(size, noise, 1)
    weights = [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]
    expected = pytorch_msssim.ms_ssim(one, other, data_range=1.0, weights=weights)
    assert expected > 0.1  # for each channel, since where a scale's mean is not above 0 we are kinder, see below
    found = ms_ssim(normalised(one), normalised(other), preprocessing(size))
    assert found.item() == pytest.approx(expected.item(), abs=2e-5)


@pytest.mark.parametrize("noise", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("size", [11, 16, 21])
def test_an_image_with_room_for_one_scale_is_compared_by_ssim(size: int, noise: float) -> None:
    one, other = pair(size, noise)
    each = pytorch_msssim.ssim(
        one.flatten(0, 1)[:, None], other.flatten(0, 1)[:, None], data_range=1.0, size_average=False
    )
    found = ms_ssim(normalised(one), normalised(other), preprocessing(size))
    assert found.item() == pytest.approx(each.clamp(min=0).mean().item(), abs=2e-5)


@pytest.mark.parametrize("noise", [0.3, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("size", [3, 8, 22, 23, 44])
def test_ms_ssim_of_small_images_is_a_slow_loop(size: int, noise: float) -> None:
    one, other = pair(size, noise, 1)
    found = ms_ssim(normalised(one), normalised(other), preprocessing(size))
    assert found.item() == pytest.approx(slow_ms_ssim(one, other), abs=5e-5)


def test_ms_ssim_is_the_mean_over_images() -> None:
    one, other = pair(32, 0.3, 3)
    other[0] = one[0]
    each = [
        ms_ssim(normalised(a[None]), normalised(b[None]), preprocessing(32)) for a, b in zip(one, other, strict=True)
    ]
    assert each[0].item() == pytest.approx(1, abs=1e-6)
    assert ms_ssim(normalised(one), normalised(other), preprocessing(32)).item() == pytest.approx(
        torch.stack(each).mean().item(), abs=1e-6
    )


def test_the_gradient_of_ms_ssim_is_finite_for_opposite_and_for_flat_images() -> None:
    one, _ = pair(32, 0.0)
    for other in (1 - one, one.clone(), torch.full_like(one, 0.5)):
        wanted = normalised(other).requires_grad_()
        similarity = ms_ssim(wanted, normalised(one), preprocessing(32))
        similarity.backward()
        assert wanted.grad is not None
        assert wanted.grad.isfinite().all()
    assert ms_ssim(normalised(1 - one), normalised(one), preprocessing(32)) < 1e-3


@pytest.mark.parametrize("what", ["ms_ssim", "gradient_magnitude"])
def test_images_are_compared_in_full_precision_whatever_autocast_says(what: str) -> None:
    one, other = (normalised(images) for images in pair(64, 0.1))

    def compared() -> Tensor:
        return ms_ssim(one, other, preprocessing(64)) if what == "ms_ssim" else gradient_magnitude(one)

    expected = compared()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compared()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_pixels_have_a_gradient_although_an_evaluation_asked_for_their_statistics_first() -> None:
    made = Preprocessing(4, 1, (0.4375,), (0.21875,))  # statistics that no other test has asked for
    with torch.inference_mode():
        made.pixels(torch.zeros(1, 1, 4, 4))
    images = torch.zeros(1, 1, 4, 4, requires_grad=True)
    made.pixels(images).sum().backward()
    assert images.grad is not None
    assert images.grad.unique().tolist() == [0.21875]
