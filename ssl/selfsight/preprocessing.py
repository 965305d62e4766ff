"""How an image becomes an input, apart from what a view draws."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from selfsight.data.decode import Form, value_range


class Preprocessing(NamedTuple):
    """How an image becomes an input: belongs to the weights, and travels with them."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    depth: int = 8
    """Bits of a stored value: 8, 16, or 32 for floating point."""
    range: tuple[float, float] | None = None
    """Stored values that become 0 and 1, before mean and std; None: those of the depth."""
    frames: int = 1
    """Planes of a volume or frames of a clip; 1: an image."""
    step: int = 1
    """Planes from one plane of the input to the next."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an input: (C, S, S), or (C, D, S, S) of D planes."""
        planes = (self.frames,) if self.frames > 1 else ()
        return self.channels, *planes, self.image_size, self.image_size

    @property
    def form(self) -> Form:
        """What images are decoded to."""
        return Form(self.channels, self.depth, self.range, self.frames)

    @property
    def values(self) -> tuple[float, float]:
        """Decoded values that become 0 and 1."""
        return value_range(self.form)

    def statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation as (C, 1, 1), or (C, 1, 1, 1) for planes."""
        axes = 3 if self.frames > 1 else 2
        return _on_device(self.mean, device, axes), _on_device(self.std, device, axes)

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images (..., C, H, W), or with planes, back in 0..1."""
        mean, std = self.statistics(images.device)
        return images * std + mean


@cache
@torch.inference_mode(False)
def _on_device(values: tuple[float, ...], device: torch.device, axes: int) -> Tensor:
    """Channel values before so many axes of length 1; sent once, for each sending waits for the device.

    Never an inference tensor: who asks first may be an evaluation, and a loss on pixels saves it for its backward.
    """
    return torch.tensor(values, device=device).view(-1, *[1] * axes)
