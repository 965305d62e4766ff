"""Batches in the order of the run. A batch is a pure function of its number, so that a loader has no state to restore.

DataLoader is given the numbers of the batches; whichever worker is free makes the next one, whole. So the number of
workers changes nothing, and neither does where the run starts.
"""

import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfsight import keyed
from selfsight.data.decode import decode
from selfsight.data.order import rank_positions, sample_ids
from selfsight.data.shards import Shards
from selfsight.data.views import ViewMaker
from selfsight.errors import DataError

SUBSTITUTES = 16  # tries to replace a bad sample; all bad means that the data are


class HostBatch(NamedTuple):
    """What a loader worker makes: B images in V views, on the CPU."""

    views: tuple[Tensor, ...]
    """V tensors (B, C, S, S) uint8."""
    positions: Tensor
    """(B,) positions in the run, int64."""
    ids: Tensor
    """(B,) samples, after substitution, int64."""
    bad: list[tuple[int, int, str]]
    """(position, sample, reason) of every sample that was replaced."""


@dataclass(frozen=True)
class Batches(Dataset[HostBatch]):
    """The micro-batches of one rank, by number: number = step * accumulate + micro."""

    shards: Shards
    makers: tuple[ViewMaker, ...]
    seed: int
    channels: int
    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __getitem__(self, number: int) -> HostBatch:
        step, micro = divmod(number, self.accumulate)
        positions = rank_positions(step, self.batch_size, self.rank, self.world, micro, self.accumulate)
        ids = sample_ids(positions, len(self.shards), self.seed)
        draws = [maker.draws(positions) for maker in self.makers]
        bad: list[tuple[int, int, str]] = []
        made: list[list[np.ndarray]] = []
        for slot, position in enumerate(positions):
            image, ids[slot] = self._image(int(position), int(ids[slot]), bad)
            made.append([maker(image, draw[slot]) for maker, draw in zip(self.makers, draws, strict=True)])
        views = tuple(torch.from_numpy(np.stack(view)) for view in zip(*made, strict=True))
        return HostBatch(views, torch.from_numpy(positions), torch.from_numpy(ids), bad)

    def _image(self, position: int, sample: int, bad: list[tuple[int, int, str]]) -> tuple[Image.Image, int]:
        """The image at a position; a bad one gives way to a substitute that depends on nothing but the position."""
        for candidate in self._candidates(position, sample):
            try:
                return decode(self.shards.read(candidate), self.channels), candidate
            except DataError as error:
                bad.append((position, candidate, str(error)))
        raise DataError(f"{SUBSTITUTES + 1} samples in a row are bad, last: {bad[-1][2]}")

    def _candidates(self, position: int, sample: int) -> Iterator[int]:
        yield sample
        substitutes = keyed.hashes(self.seed, "substitute", [position], SUBSTITUTES)[0] % np.uint64(len(self.shards))
        yield from map(int, substitutes)


def loader(dataset: Dataset, numbers: range, workers: int, pin: bool) -> DataLoader:
    """Items `numbers` of a dataset, in that order, made ahead by `workers` processes (0: by this one)."""
    # forkserver: a fork of this process would copy its threads' locks; the server imports torch once for all workers.
    context = torch.multiprocessing.get_context("forkserver") if workers else None
    if context is not None:
        context.set_forkserver_preload(["selfsight.data.loader"])
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        multiprocessing_context=context,
        worker_init_fn=_end_with_parent,
    )


def _end_with_parent(worker: int) -> None:
    """Leave stopping to the training process, and end when it is gone, however it went.

    A terminal, torchrun or a cluster signals every process of a group, but the trainer still needs the batches of its
    last step: so workers leave the group. SIGTERM itself stays as it is; DataLoader ends its workers with it.
    DataLoader's own watchdog looks at the parent's number, which is the fork server's and outlives the trainer.
    """
    os.setsid()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _as_it_is(item: Any) -> Any:
    return item


@dataclass(frozen=True)
class Batch:
    """What an objective sees: normalised views on the device, and randomness that belongs to the images' positions."""

    views: tuple[Tensor, ...]
    """V tensors (B, C, S, S), normalised."""
    positions: Tensor
    """(B,) positions in the run, on the CPU."""
    seed: int

    def uniform(self, purpose: str, count: int) -> Tensor:
        """`count` numbers in [0, 1) for each image, from (seed, position, purpose): (B, count) float64 on the device.

        float64, because the order of thousands of float32 draws would have ties.
        """
        draws = keyed.uniform(self.seed, purpose, self.positions.numpy(), count)
        return torch.from_numpy(draws).to(self.views[0].device, non_blocking=True)


def to_device(host: HostBatch, device: torch.device, mean: Tensor, std: Tensor, seed: int) -> Batch:
    """Move a batch and normalise it there; `mean` and `std` are (C, 1, 1) on the device."""
    views = tuple(normalize(view.to(device, non_blocking=True), mean, std) for view in host.views)
    return Batch(views, host.positions, seed)


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 pixels (..., C, H, W) to float32: (pixels / 255 - mean) / std."""
    return (pixels.float() / 255 - mean) / std
