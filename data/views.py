"""Geometry of a view: where to crop, how to resize, whether to flip; drawn from (seed, key), done on uint8 pixels.

The definitions are torchvision's (`RandomResizedCrop`, `RandomHorizontalFlip`, `Resize` + `CenterCrop`); only the source
of the randomness differs. Colour and normalisation come later, batched on the device (`selfsight.data.colour`).
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, model_validator

from selfsight import keyed
from selfsight.section import Section

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CROP_TRIES = 10  # as in torchvision
LONGEST = 8  # times the shorter side; of longer images only the middle is resized: 1 x 20,000 would become gigabytes


class View(Section):
    """How one view of an image is made: cropped, flipped, then coloured, in the order of the fields."""

    size: int | None = Field(None, ge=1)
    """Side of the view, pixels; null: encoder.image_size. Smaller for the local views of multi-crop."""
    shift: int = Field(0, ge=0)
    """Take the view from a neighbour at most so many samples away in its shard and of the same label, which must say which
    clip a frame is of (not its class: that would be learning from labels); 0: from the image itself."""

    crop_scale: tuple[float, float] | None = (0.2, 1.0)
    """Area of the random crop, least and most, as a share of the image; null: no random crop, as in evaluation."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of the random crop, least and most."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a left-right flip."""
    jitter: float = Field(0.0, ge=0, le=1)
    """Probability of colour jitter, by the four strengths that follow."""
    brightness: float = Field(0.4, ge=0)
    """Jitter of brightness: a factor in 1 - x .. 1 + x."""
    contrast: float = Field(0.4, ge=0)
    """Jitter of contrast: a factor in 1 - x .. 1 + x."""
    saturation: float = Field(0.2, ge=0)
    """Jitter of saturation: a factor in 1 - x .. 1 + x; three channels only."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Jitter of hue: at most this share of the colour circle, either way; three channels only."""
    grayscale: float = Field(0.0, ge=0, le=1)
    """Probability of losing all colour; three channels only."""
    blur: float = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Deviation of the blur, least and most, pixels."""
    solarize: float = Field(0.0, ge=0, le=1)
    """Probability of inverting the brighter half of the range."""

    @model_validator(mode="after")
    def _ordered(self) -> "View":
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be two shares, 0 < least <= most <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("crop_ratio must be two ratios, 0 < least <= most")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError("blur_sigma must be two deviations, 0 < least <= most")
        return self


def crop_box(width: int, height: int, draws: NDArray[np.float64], view: View) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop box (left, top, right, bottom) from 4 x CROP_TRIES uniform numbers.

    Each try draws an area and a log-ratio; the first that fits is placed at random; if none fits, the largest central
    crop within the ratios is taken.
    """
    assert view.crop_scale is not None
    least, most = view.crop_scale
    low, high = np.log(view.crop_ratio)
    for u_area, u_ratio, u_top, u_left in draws.reshape(CROP_TRIES, 4):
        area = width * height * (least + (most - least) * u_area)
        ratio = np.exp(low + (high - low) * u_ratio)
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < view.crop_ratio[0]:
        h = max(1, round(width / view.crop_ratio[0]))
    elif width / height > view.crop_ratio[1]:
        w = max(1, round(height * view.crop_ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class ViewMaker:
    """Draws one view of each image of a batch. `number` tells the views of an objective apart."""

    def __init__(self, view: View, number: int, size: int, interpolation: str, seed: int) -> None:
        self.view, self.number, self.size, self.seed = view, number, view.size or size, seed
        self.resampling = RESAMPLING[interpolation]

    def draws(self, keys: NDArray[np.int64]) -> NDArray[np.float64]:
        """All that the views with these keys are made from: (P, 1 + 4 x CROP_TRIES)."""
        return keyed.uniform(self.seed, f"view {self.number}", keys, 1 + 4 * CROP_TRIES)

    def shifts(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many samples away each view is taken from: (P,), 1 to `shift`, or 0."""
        if not self.view.shift:
            return np.zeros(len(keys), np.int64)
        draws = keyed.uniform(self.seed, f"shift {self.number}", keys, 1)[:, 0]
        return 1 + (draws * self.view.shift).astype(np.int64)

    def __call__(self, image: Image.Image, draws: NDArray[np.float64]) -> NDArray[np.uint8]:
        """One view, (C, size, size) uint8, from one row of `draws`."""
        if self.view.crop_scale is None:
            image = resize_and_crop(image, self.size, 1.0, self.resampling)
        else:
            box = crop_box(image.width, image.height, draws[1:], self.view)
            image = image.crop(box).resize((self.size, self.size), self.resampling)
        pixels = to_array(image)
        return np.ascontiguousarray(pixels[..., ::-1]) if draws[0] < self.view.flip else pixels


def resize_and_crop(image: Image.Image, size: int, crop_pct: float, resampling: Image.Resampling) -> Image.Image:
    """Evaluation's view: shorter side to floor(size / crop_pct), then the central size x size, as timm does it."""
    short = int(size / crop_pct)
    if max(image.size) > LONGEST * min(image.size):
        image = _middle(image, LONGEST * min(image.size))
    if min(image.size) != short:
        longer = short * max(image.size) // min(image.size)
        image = image.resize((short, longer) if image.width <= image.height else (longer, short), resampling)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _middle(image: Image.Image, most: int) -> Image.Image:
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Pixels as (C, H, W) uint8."""
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
