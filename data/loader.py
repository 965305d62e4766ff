"""Batches in the order of the run. A batch is a pure function of its number, so that a loader has no state to restore.

DataLoader is given the numbers of the batches; whichever worker is free makes the next one, whole. So the number of
workers changes nothing, and neither does where the run starts.
"""

import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfsight import keyed
from selfsight.data.colour import DRAWS, change_colour
from selfsight.data.decode import BadSample, decode
from selfsight.data.order import rank_positions, sample_ids
from selfsight.data.shards import Shards
from selfsight.data.views import View, ViewMaker
from selfsight.errors import DataError

ROWS = 256  # of a stored teacher that are made at once
READING = -1  # in place of a sample: its bytes are on their way, and nothing is its fault
SUBSTITUTES = 16  # tries to replace a bad sample; all bad means that the data are


class Bad(NamedTuple):
    """A sample that was replaced."""

    position: int
    sample: int
    reason: str
    where: str
    """Shard and offset, as `Shards.describe` says them."""


class HostBatch(NamedTuple):
    """What a loader worker makes: B images in V views, on the CPU."""

    views: tuple[Tensor, ...]
    """V tensors (B, C, S, S) uint8."""
    positions: Tensor
    """(B,) positions in the run, int64."""
    keys: Tensor
    """(B,) what the augmentation is drawn by, int64: the position, or the row of a fixed number of augmentations."""
    ids: Tensor
    """(B,) samples, after substitution, int64."""
    bad: list[Bad]
    """Every sample that was replaced."""


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
    augmentations: int | None = None
    """So many augmentations of each sample, one an epoch in turn; None: every epoch has its own."""
    condemned: Mapping[int, str] = field(default_factory=dict)
    """Samples that took down whoever decoded them, and how: bad without being read."""
    report: Callable[[int], None] | None = None
    """Told READING before a sample is read, and its number before it is decoded, by a process that may not outlive it."""

    @property
    def item_bytes(self) -> int:
        """Pixels of one micro-batch."""
        images = self.batch_size // self.world // self.accumulate
        return images * self.channels * sum(maker.size**2 for maker in self.makers)

    def without(self, condemned: Mapping[int, str]) -> "Batches":
        """The same batches, these samples replaced as any bad sample is."""
        return replace(self, condemned={**self.condemned, **condemned})

    def watched(self, report: Callable[[int], None]) -> "Batches":
        """The same batches, each sample reported before it is decoded."""
        return replace(self, report=report)

    def __getitem__(self, number: int) -> HostBatch:
        step, micro = divmod(number, self.accumulate)
        positions = rank_positions(step, self.batch_size, self.rank, self.world, micro, self.accumulate)
        ids = sample_ids(positions, len(self.shards), self.seed)
        if self.augmentations is None:
            return self.make(positions, ids, positions)
        samples = len(self.shards)
        return self.make(positions, ids, positions // samples % self.augmentations * samples + ids)

    def make(self, positions: NDArray[np.int64], ids: NDArray[np.int64], keys: NDArray[np.int64]) -> HostBatch:
        """The views of these samples with these augmentations."""
        draws = [maker.draws(keys) for maker in self.makers]
        shifts = [maker.shifts(keys) for maker in self.makers]
        bad: list[Bad] = []
        made: list[list[np.ndarray]] = []
        for slot, position in enumerate(positions):
            image, ids[slot] = self._image(int(position), int(keys[slot]), int(ids[slot]), bad)
            views = []
            for maker, draw, shift in zip(self.makers, draws, shifts, strict=True):
                source = self._neighbour(int(position), int(ids[slot]), int(shift[slot]), bad) if shift[slot] else None
                views.append(maker(source or image, draw[slot]))
            made.append(views)
        views_of_all = tuple(torch.from_numpy(np.stack(view)) for view in zip(*made, strict=True))
        return HostBatch(views_of_all, torch.from_numpy(positions), torch.from_numpy(keys), torch.from_numpy(ids), bad)

    def _image(self, position: int, key: int, sample: int, bad: list[Bad]) -> tuple[Image.Image, int]:
        """The image of a sample; a bad one gives way to a substitute that depends on nothing but the key."""
        for candidate in self._candidates(key, sample):
            try:
                return self._decoded(candidate), candidate
            except BadSample as error:
                bad.append(self._bad(position, candidate, error))
        raise DataError(f"{SUBSTITUTES + 1} samples in a row are bad, last: {bad[-1].where}: {bad[-1].reason}")

    def _neighbour(self, position: int, sample: int, shift: int, bad: list[Bad]) -> Image.Image | None:
        """The image of a neighbour; None if there is none, or it is bad."""
        other = self.shards.neighbour(sample, shift)
        try:
            return self._decoded(other) if other != sample else None
        except BadSample as error:
            bad.append(self._bad(position, other, error))
            return None

    def _decoded(self, sample: int) -> Image.Image:
        if sample in self.condemned:
            raise BadSample(self.condemned[sample])
        if not self.report:
            return decode(self.shards.read(sample), self.channels)
        self.report(READING)
        body = self.shards.read(sample)
        self.report(sample)
        return decode(body, self.channels)

    def _bad(self, position: int, sample: int, error: BadSample) -> Bad:
        where = self.shards.describe(sample)
        return Bad(position, sample, str(error).removeprefix(f"{where}: "), where)

    def _candidates(self, key: int, sample: int) -> Iterator[int]:
        yield sample
        substitutes = keyed.hashes(self.seed, "substitute", [key], SUBSTITUTES)[0] % np.uint64(len(self.shards))
        yield from map(int, substitutes)


@dataclass(frozen=True)
class Rows(Dataset[HostBatch]):
    """Every sample with every augmentation, once: row = augmentation * samples + sample, in batches of 256."""

    batches: Batches
    rows: int

    def __len__(self) -> int:
        return -(-self.rows // ROWS)

    def __getitem__(self, number: int) -> HostBatch:
        rows = np.arange(number * ROWS, min((number + 1) * ROWS, self.rows), dtype=np.int64)
        return self.batches.make(rows, rows % len(self.batches.shards), rows)


def forkserver() -> Any:
    """How worker processes start: a fork of this process would copy its threads' locks.

    The server imports torch once for all workers.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfsight.data.fork_server"])
    return context


def loader(dataset: Any, numbers: range, workers: int, pin: bool, timeout: float = 0) -> DataLoader:
    """Items `numbers` of a dataset, in that order, made ahead by `workers` processes (0: by this one).

    A worker that dies, or gives nothing for `timeout` seconds (0: for ever), ends the iteration with a RuntimeError;
    training has `selfsight.data.feed`, which goes on.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        timeout=timeout if workers else 0,
        multiprocessing_context=forkserver() if workers else None,
        worker_init_fn=end_with_parent,
    )


def end_with_parent(worker: int = 0) -> None:
    """Leave stopping to the training process, and end when it is gone, however it went.

    A terminal, torchrun or a cluster signals every process of a group, but the trainer still needs the batches of its
    last step: so workers leave the group. SIGTERM itself stays as it is: whoever ends its workers by it would wait for ever.
    DataLoader's own watchdog looks at the parent's number, which is the fork server's and outlives the trainer.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the fork server ignores it
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
        return torch.from_numpy(draws).to(self.views[0].device, non_blocking=True)


@dataclass(frozen=True)
class Placer:
    """Moves batches to the device, and colours and normalises them there."""

    views: tuple[View, ...]
    mean: Tensor
    """(C, 1, 1) on the device."""
    std: Tensor
    """(C, 1, 1) on the device."""
    seed: int

    def __call__(self, host: HostBatch, progress: float = 0.0) -> Batch:
        """The batch that an objective sees, when this share of the run is done."""
        made = []
        for number, (view, pixels) in enumerate(zip(self.views, host.views, strict=True)):
            pixels = pixels.to(self.mean.device, non_blocking=True).float() / 255
            draws = keyed.uniform(self.seed, f"colour {number}", host.keys.numpy(), DRAWS)
            made.append((change_colour(pixels, view, draws) - self.mean) / self.std)
        return Batch(tuple(made), host.positions, self.seed, host.keys, progress)


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 pixels (..., C, H, W) to float32: (pixels / 255 - mean) / std."""
    return (pixels.float() / 255 - mean) / std
