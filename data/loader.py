"""Batches in the order of the run. A batch is a pure function of its number, so that a loader has no state to restore.

DataLoader is given the numbers of the batches; whichever worker is free makes the next one, whole. So the number of
workers changes nothing, and neither does where the run starts.
"""

import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfsight import keyed
from selfsight.data.crops import Drawn, ViewMaker, needed
from selfsight.data.decode import DTYPES, BadSample, Form, Pixels
from selfsight.data.device_jpeg import Encoded, size_of
from selfsight.data.jpeg import Needs
from selfsight.data.mixture import Samples
from selfsight.data.order import WINDOW, Ids, rank_positions
from selfsight.data.picture import Picture, Shown
from selfsight.data.pixel_cache import PixelCache
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
    """V tensors (B, C, S, S) or (B, C, D, S, S); uint8, uint16 or float32."""
    positions: Tensor
    """(B,) positions in the run, int64."""
    keys: Tensor
    """(B,) what the augmentation is drawn by, int64: the position, or the row of a fixed number of augmentations."""
    ids: Tensor
    """(B,) samples, after substitution, int64."""
    bad: list[Bad]
    """Every sample that was replaced."""
    encoded: Sequence[Encoded] = ()
    """Images that the device is to decode; their views are 0 until then."""


@dataclass(frozen=True)
class Batches(Dataset[HostBatch]):
    """The micro-batches of one rank, by number: number = step * accumulate + micro."""

    shards: Samples
    makers: tuple[ViewMaker, ...]
    seed: int
    form: Form
    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1
    augmentations: int | None = None
    """So many augmentations of each sample, one an epoch in turn; None: every epoch has its own."""
    step: int = 1
    """Planes between the planes of a window."""
    repeat: int = 1
    """Positions in a row that show the same sample, decoded once (repeated augmentation, Hoffer et al. 2020)."""
    reduce: bool = False
    """Decode JPEGs at half the size or less where every crop is at least twice its view: not the same pixels."""
    cache: PixelCache | None = None
    """The samples' pixels, decoded once."""
    encode: bool = False
    """Leave JPEGs to the device, where it can decode them."""
    condemned: Mapping[int, str] = field(default_factory=dict)
    """Samples that took down whoever decoded them, and how: bad without being read."""
    report: Callable[[int], None] | None = None
    """Told READING before a sample is read, and its number before it is decoded, by a process that may not outlive it."""

    @property
    def item_bytes(self) -> int:
        """Bytes of the views of one micro-batch."""
        images = self.batch_size // self.world // self.accumulate
        values = self.form.channels * self.form.frames * sum(maker.size**2 for maker in self.makers)
        return images * values * self.form.depth // 8

    def without(self, condemned: Mapping[int, str]) -> "Batches":
        """The same batches, these samples replaced as any bad sample is."""
        return replace(self, condemned={**self.condemned, **condemned})

    def watched(self, report: Callable[[int], None]) -> "Batches":
        """The same batches, each sample reported before it is decoded."""
        return replace(self, report=report)

    def __getitem__(self, number: int) -> HostBatch:
        positions, ids = self._positions(number), self._ids(number)
        if self.shards.remote and not self.cache:
            self._prefetch(number, ids)
        if self.augmentations is None:
            return self.make(positions, ids, positions)
        groups, place = np.divmod(positions, self.repeat)
        shown = self.shards.epochs(groups, self.seed) * self.repeat + place  # how often the sample was shown before
        return self.make(positions, ids, shown % self.augmentations * len(self.shards) + ids)

    def _positions(self, number: int) -> Ids:
        step, micro = divmod(number, self.accumulate)
        return rank_positions(step, self.batch_size, self.rank, self.world, micro, self.accumulate)

    def _ids(self, number: int) -> Ids:
        return self.shards.ids(self._positions(number) // self.repeat, self.seed)

    def _prefetch(self, number: int, ids: Ids) -> None:
        """Ask for this batch, and for those that this worker will make: DataLoader deals the numbers out in turn."""
        worker = torch.utils.data.get_worker_info()
        turn = worker.num_workers if worker else 1
        self.shards.prefetch(ids)
        self.shards.prefetch(self._ids(number + turn))
        if self.shards.block > 1:  # the next window's blocks, which its first batches all touch, while this one is used
            window = -(-WINDOW * self.shards.block * self.repeat * self.accumulate // (self.batch_size * turn)) * turn
            self.shards.prefetch(self._ids(number + window), keep=False)

    def make(self, positions: Ids, ids: Ids, keys: Ids) -> HostBatch:
        """The views of these samples with these augmentations."""
        bad: list[Bad] = []
        if self.cache and all(maker.batches(*self.cache.shape[1:]) for maker in self.makers):
            self._replace_bad(positions, ids, keys, bad)
            pixels = self.cache.batch(ids)
            of_all = tuple(maker.of_batch(pixels, maker.draws(keys)) for maker in self.makers)
            return _batch(of_all, positions, keys, ids, bad)
        drawn = Drawn.of(self.makers, keys)
        views = [self._empty(maker.size, len(ids)) for maker in self.makers]
        encoded: list[Encoded] = []
        pictures: dict[int, Picture] = {}  # of the positions that show one sample
        for slot, (position, key, sample) in enumerate(
            zip(positions.tolist(), keys.tolist(), ids.tolist(), strict=True)
        ):
            if position % self.repeat == 0:
                pictures.clear()
            made, ids[slot] = self._sample(slot, position, key, sample, drawn, pictures, bad, encoded)
            for view, one in zip(views, made, strict=True):
                view[slot] = one  # now, while they are in the core's own memory
        return _batch(tuple(map(torch.from_numpy, views)), positions, keys, ids, bad, encoded)

    def _empty(self, size: int, count: int) -> Pixels:
        """Room for views; colours of bytes lie side by side, as decoders and `resize` give them."""
        channels, depth, _, frames = self.form
        if (channels, depth, frames) == (3, 8, 1):
            return np.empty((count, size, size, channels), np.uint8).transpose(0, 3, 1, 2)
        return np.empty((count, channels, *[frames] * (frames > 1), size, size), DTYPES[depth])

    def _replace_bad(self, positions: Ids, ids: Ids, keys: Ids, bad: list[Bad]) -> None:
        """As `_sample`, where it is known beforehand which samples are bad."""
        assert self.cache is not None
        reasons = {**self.cache.bad, **self.condemned}
        for slot in np.flatnonzero(np.isin(ids, list(reasons))).tolist():
            for candidate in self._candidates(int(keys[slot]), int(ids[slot])):
                ids[slot] = candidate
                if candidate not in reasons:
                    break
                bad.append(self._bad(int(positions[slot]), candidate, BadSample(reasons[candidate])))
            else:
                raise self._all_bad(bad)

    def _sample(
        self,
        slot: int,
        position: int,
        key: int,
        sample: int,
        drawn: Drawn,
        pictures: dict[int, Picture],
        bad: list[Bad],
        encoded: list[Encoded],
    ) -> tuple[list[Pixels], int]:
        """The views of a sample; a bad one gives way to a substitute that depends on nothing but the key."""
        group = slice(slot, slot + self.repeat - position % self.repeat)
        needs = partial(needed, self.makers, [rows[group] for rows in drawn.crops], self.reduce)
        for candidate in self._candidates(key, sample):
            try:
                if candidate not in pictures:
                    pictures[candidate] = self._picture(candidate, needs)
                if (
                    self.encode
                    and not self.cache
                    and (left := self._left_to_the_device(slot, candidate, pictures[candidate], drawn))
                ):
                    encoded.append(left)
                    return [np.zeros((self.form.channels, m.size, m.size), np.uint8) for m in self.makers], candidate
                picture = pictures[candidate]
                windows = [
                    picture.shown(places[slot], maker.view.moment)
                    for maker, places in zip(self.makers, drawn.moments, strict=True)
                ]
            except BadSample as error:
                bad.append(self._bad(position, candidate, error))
                continue
            for number, shifts in enumerate(drawn.shifts):
                if shifts[slot]:
                    windows[number] = self._neighbour(slot, position, candidate, number, drawn, bad) or windows[number]
            made = zip(self.makers, windows, drawn.crops, strict=True)
            return [maker(pixels, rows[slot], size) for maker, (pixels, size), rows in made], candidate
        raise self._all_bad(bad)

    def _left_to_the_device(self, slot: int, sample: int, picture: Picture, drawn: Drawn) -> Encoded | None:
        """What the device needs of an image that it can decode."""
        size = size_of(picture.bodies[0], self.form) if len(picture.bodies) == 1 else None
        if size is None or any(m.view.shift or m.view.moment is not None or not m.view.crop_scale for m in self.makers):
            return None
        rows = [rows[slot] for rows in drawn.crops]
        boxes = [maker.box(*size, row) for maker, row in zip(self.makers, rows, strict=True)]
        flips = [bool(row[0] < maker.view.flip) for maker, row in zip(self.makers, rows, strict=True)]
        return Encoded(slot, picture.bodies[0], boxes, flips, self.shards.describe(sample))

    def _all_bad(self, bad: list[Bad]) -> DataError:
        return DataError(f"{SUBSTITUTES + 1} samples in a row are bad, last: {bad[-1].where}: {bad[-1].reason}")

    def _neighbour(
        self, slot: int, position: int, sample: int, number: int, drawn: Drawn, bad: list[Bad]
    ) -> Shown | None:
        """What a view shows of a neighbour; None if there is none, or it is bad."""
        other = self.shards.neighbour(sample, drawn.shifts[number][slot])
        if other == sample:
            return None
        needs = partial(needed, self.makers[number : number + 1], [drawn.crops[number][slot : slot + 1]], self.reduce)
        try:
            picture = self._picture(other, needs)
            return picture.shown(drawn.moments[number][slot], self.makers[number].view.moment)
        except BadSample as error:
            bad.append(self._bad(position, other, error))
            return None

    def _picture(self, sample: int, needs: Needs) -> Picture:
        if sample in self.condemned:
            raise BadSample(self.condemned[sample])
        if self.cache:
            return Picture.of(self.cache.image(sample), self.form)
        if self.report:
            self.report(READING)
        body = self.shards.read(sample)
        if self.report:
            self.report(sample)
        return Picture(self.shards.images(sample, body), self.form, self.step, needs)

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


def _batch(
    views: tuple[Tensor, ...], positions: Ids, keys: Ids, ids: Ids, bad: list[Bad], encoded: Sequence[Encoded] = ()
) -> HostBatch:
    numbers = torch.from_numpy(positions), torch.from_numpy(keys), torch.from_numpy(ids)
    return HostBatch(views, *numbers, bad, encoded)


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
