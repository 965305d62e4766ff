"""From a loader's batch to what an objective sees: moved to the device, decoded there if asked, coloured and normalised."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from selfsight import keyed
from selfsight.data.colour import DRAWS, change_colour
from selfsight.data.device_jpeg import fill
from selfsight.data.loader import HostBatch
from selfsight.data.mixture import Mixture
from selfsight.data.transfer import without_waiting
from selfsight.data.views import View

PART_BYTES = 2**20  # that are normalised at once


@dataclass(frozen=True)
class Batch:
    """What an objective sees: normalised views on the device, and randomness that belongs to the images' positions."""

    views: tuple[Tensor, ...]
    """V tensors (B, C, S, S) or (B, C, D, S, S), normalised."""
    positions: Tensor
    """(B,) positions in the run, on the CPU."""
    seed: int
    keys: Tensor | None = None
    """(B,) rows of a stored teacher's outputs, on the CPU, where the run has a fixed number of augmentations."""
    progress: float = 0.0
    """Share of the run that is done, for schedules."""
    shared: dict[Any, Any] = field(default_factory=dict)
    """What the objectives of a joint have computed of these views, for each other."""

    def uniform(self, purpose: str, count: int) -> Tensor:
        """`count` numbers in [0, 1) for each image, from (seed, position, purpose): (B, count) float64 on the device.

        float64, because the order of thousands of float32 draws would have ties.
        """
        draws = keyed.uniform(self.seed, purpose, self.positions.numpy(), count)
        return without_waiting(torch.from_numpy(draws), self.views[0].device)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def sent(host: HostBatch, device: torch.device) -> HostBatch:
    """The batch with its views on their way to the GPU, beside what that computes; on a CPU the batch as it is."""
    if device.type != "cuda":
        return host
    with torch.cuda.stream(_copying(device)):
        return host._replace(views=tuple(view.to(device, non_blocking=True) for view in host.views))


def arrived(views: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Views on the device, usable by what is computed next; `sent` or not."""
    if device.type == "cuda":
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(_copying(device))
        for view in views:
            if view.is_cuda:
                view.record_stream(computing)  # else its memory would be used again while it is read
    return [view.to(device, non_blocking=True) for view in views]


@dataclass(frozen=True)
class Placer:
    """Moves batches to the device, and colours and normalises them there."""

    views: tuple[View, ...]
    mean: Tensor
    """(C, 1, 1) on the device; (C, 1, 1, 1) for planes."""
    std: Tensor
    """As `mean`."""
    seed: int
    range: tuple[float, float] = (0.0, 255.0)
    """Stored values that become 0 and 1."""
    interpolation: str = "bicubic"
    """How the device resizes what it decodes."""
    samples: Mixture | None = None
    """Where each set has statistics of its own: `mean` and `std` are theirs, one above the other (K, C, 1, 1)."""

    def __call__(self, host: HostBatch, progress: float = 0.0) -> Batch:
        """The batch that an objective sees, when this share of the run is done."""
        made, mean, std = [], self.mean, self.std
        if self.samples:
            sets = without_waiting(torch.from_numpy(self.samples.set_of(host.ids.numpy())), mean.device)
            mean, std = mean[sets], std[sets]
        views = arrived(host.views, self.mean.device)
        if host.encoded:
            fill(views, host.encoded, self.interpolation)
        for number, (view, pixels) in enumerate(zip(self.views, views, strict=True)):
            if not view.coloured:
                made.append(normalize(pixels, mean, std, self.range))
                continue
            draws = keyed.uniform(self.seed, f"colour {number}", host.keys.numpy(), DRAWS)
            made.append((change_colour(unit(pixels, self.range), view, draws) - mean) / std)
        return Batch(tuple(made), host.positions, self.seed, host.keys, progress)


def unit(pixels: Tensor, range: tuple[float, float] = (0.0, 255.0), out: Tensor | None = None) -> Tensor:
    """Stored values to float32, `range` to 0..1."""
    low, high = range
    made = torch.empty(pixels.shape, device=pixels.device) if out is None else out  # in this order of axes
    made.copy_(pixels)
    return (made.sub_(low) if low else made).div_(high - low)


def normalize(pixels: Tensor, mean: Tensor, std: Tensor, range: tuple[float, float] = (0.0, 255.0)) -> Tensor:
    """Stored values (B, C, H, W) or (B, C, D, H, W) to float32: (unit(pixels) - mean) / std."""
    made = torch.empty(pixels.shape, device=pixels.device)
    # On a CPU in parts that stay in a core's own memory between the operations: three times faster.
    parts = 1 if made.is_cuda else max(1, min(len(made), made.nbytes // PART_BYTES))
    tensors = pixels, made, mean.expand_as(made), std.expand_as(made)
    for stored, out, mean_of, std_of in zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True):
        unit(stored, range, out).sub_(mean_of).div_(std_of)
    return made
