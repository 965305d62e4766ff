"""Mean, variance, extremes and percentiles of channels, of one sample or of many added up.

Mean and variance are exact to float64 (combined by Chan, Golub and LeVeque 1979, eq. 2.1); percentiles come from a
histogram whose bins are the upper 16 bits of a float32, so that they are exact for whole numbers up to 256 and within
1/128 of any other value.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfsight.data.formats import Array, row_slices

BINS = 2**16
_SIGN = np.uint32(1 << 31)

Floats = NDArray[np.float64]


class Kind(NamedTuple):
    """Samples that can be added up: so many channels of one dtype."""

    channels: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels != 1)} of {self.dtype}"


@dataclass
class Moments:
    """What is known of the C channels of one kind."""

    samples: int
    pixels: int
    mean: Floats
    squares: Floats
    """Sum of squared differences from the mean."""
    least: Floats
    most: Floats
    bins: NDArray[np.int64]
    """(C, BINS) values by the upper 16 bits of their float32, in order."""

    @classmethod
    def of(cls, array: Array) -> "Moments":
        """Those of one sample, (C, H, W) or (C, D, H, W)."""
        parts = (array[..., rows, :].reshape(len(array), -1) for rows in row_slices(array))
        if array.dtype == np.uint8:
            return cls._of_bytes(np.sum([_counted(part, 256) for part in parts], 0))
        made = cls._of_part(next(parts))
        for part in parts:
            made.add(cls._of_part(part))
        made.samples = 1
        return made

    @classmethod
    def _of_part(cls, part: Array) -> "Moments":
        """Those of some values of each channel: (C, N)."""
        values = part.astype(np.float64)
        mean = values.mean(1)
        squares = ((values - mean[:, None]) ** 2).sum(1)
        return cls(1, values.shape[1], mean, squares, values.min(1), values.max(1), _counted(part, BINS))

    @classmethod
    def _of_bytes(cls, counts: NDArray[np.int64]) -> "Moments":
        """The same in a third of the time: of 256 levels it is enough to count them, (C, 256)."""
        levels, pixels = np.arange(256.0), int(counts[0].sum())
        mean = counts @ levels / pixels
        squares = (counts * (levels - mean[:, None]) ** 2).sum(1)
        least, most = (counts > 0).argmax(1), 255 - (counts > 0)[:, ::-1].argmax(1)
        bins = np.zeros((len(counts), BINS), np.int64)
        bins[:, _bin(levels)] = counts
        return cls(1, pixels, mean, squares, least.astype(np.float64), most.astype(np.float64), bins)

    @property
    def std(self) -> Floats:
        """Standard deviation of each channel over all pixels."""
        return np.sqrt(self.squares / self.pixels)

    def add(self, other: "Moments") -> None:
        """Take in another part of the data."""
        pixels, apart = self.pixels + other.pixels, other.mean - self.mean
        self.squares = self.squares + other.squares + apart**2 * (self.pixels * (other.pixels / pixels))
        self.mean = self.mean + apart * (other.pixels / pixels)
        self.least, self.most = np.minimum(self.least, other.least), np.maximum(self.most, other.most)
        self.bins = self.bins + other.bins
        self.samples, self.pixels = self.samples + other.samples, pixels

    def mapped(self, slope: float, shift: float) -> tuple[int, Floats, Floats]:
        """Pixels, mean and sum of squares of slope * value + shift."""
        return self.pixels, slope * self.mean + shift, slope**2 * self.squares

    def percentile(self, percent: float) -> Floats:
        """The value of each channel (C,) below or at which so much of the pixels lie."""
        counts = self.bins.cumsum(1)
        place = (counts >= np.ceil(percent / 100 * self.pixels)).argmax(1)
        return np.clip(_edge(place), self.least, self.most)


def _counted(part: Array, levels: int) -> NDArray[np.int64]:
    """How often each byte, or each bin, occurs in each channel of (C, N): (C, levels)."""
    return np.stack([np.bincount(channel if levels == 256 else _bin(channel), minlength=levels) for channel in part])


def _bin(values: Array) -> NDArray[np.int64]:
    """The upper 16 bits of float32 values, so that their order is that of the values."""
    bits = values.astype(np.float32).view(np.uint32)
    return (np.where(bits & _SIGN, ~bits, bits | _SIGN) >> np.uint32(16)).astype(np.int64)


def _edge(places: NDArray[np.int64]) -> Floats:
    """The least value of a bin."""
    keys = places.astype(np.uint32) << np.uint32(16)
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).astype(np.uint32).view(np.float32).astype(np.float64)
