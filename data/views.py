"""What a view of an image is: the fields of a recipe. `selfsight.data.crops` and `selfsight.data.colour` make it.

They stand apart so that `--help` need not import torch.
"""

from typing import Literal

from pydantic import Field, model_validator

from selfsight.section import Section


class View(Section):
    """How one view of an image is made: cropped, flipped, then coloured, in the order of the fields."""

    size: int | None = Field(None, ge=1)
    """Side of the view, pixels; null: encoder.image_size. Smaller for the local views of multi-crop."""
    shift: int = Field(0, ge=0)
    """Take the view from a neighbour at most so many samples away in its shard and of the same label, which must say which
    clip a frame is of (not its class: that would be learning from labels); 0: from the image itself."""

    moment: Literal[0, 1, 2] | None = None
    """Of a clip, show the first, second or third of three frames drawn in order, the same three for all views; null: a frame
    (or window of encoder.frames) drawn for each view by itself."""

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

    @property
    def coloured(self) -> bool:
        """Whether anything of the colour is ever changed."""
        return bool(self.jitter or self.grayscale or self.blur or self.solarize)

    @model_validator(mode="after")
    def _ordered(self) -> "View":
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be two shares, 0 < least <= most <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("crop_ratio must be two ratios, 0 < least <= most")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError("blur_sigma must be two deviations, 0 < least <= most")
        return self
