"""Statistics of channels in the units of the files: one file beside each shard's index, added up over shards when read.

`selfsight shards check SPEC --stats` writes `x.tar.stats.json`; what it holds is in `selfsight.data.moments`.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.data.formats import Array
from selfsight.data.moments import BINS, Kind, Moments
from selfsight.data.shards import Shards
from selfsight.errors import DataError, StorageError, UsageError
from selfsight.recipe import DataConfig

VERSION = 1
SUFFIX = ".stats.json"
LOW, HIGH = 0.1, 99.9  # percentiles that become 0 and 1 where floating point has no range


@dataclass
class Statistics:
    """What is known of a set, or of a shard."""

    samples: int = 0
    """How many were measured."""
    of: int = 0
    """How many there are."""
    planes: Counter[int] = field(default_factory=Counter)
    """Samples by their planes (frames, slices); 1: plain images."""
    kinds: dict[Kind, Moments] = field(default_factory=dict)

    def add_sample(self, images: Sequence[Array]) -> None:
        """Take in one sample: an image, or the frames of a clip."""
        self.samples += 1
        self.planes[len(images) if len(images) > 1 else images[0].shape[1] if images[0].ndim == 4 else 1] += 1
        for number, image in enumerate(images):
            made = Moments.of(image)
            made.samples = int(number == 0)
            self._add_kind(Kind(len(image), image.dtype.name), made)

    def add(self, other: "Statistics") -> None:
        """Take in another shard."""
        self.samples, self.of = self.samples + other.samples, self.of + other.of
        self.planes.update(other.planes)
        for kind, moments in other.kinds.items():
            self._add_kind(kind, moments)

    def _add_kind(self, kind: Kind, moments: Moments) -> None:
        if kind in self.kinds:
            self.kinds[kind].add(moments)
        else:
            self.kinds[kind] = moments

    @property
    def mixed(self) -> list[str]:
        """The kinds with their counts, where there are several: `12 channels of uint16: 3`."""
        if len(self.kinds) < 2:
            return []
        ordered = sorted(self.kinds.items(), key=lambda item: -item[1].samples)
        return [f"{kind}: {moments.samples:,}" for kind, moments in ordered]

    def matching(self, channels: int, advice: str = "give data.mean and data.std") -> dict[Kind, Moments]:
        """The kinds that an encoder of so many channels takes; grey counts for three equal ones.

        Args:
            advice: what to do where there is none.

        Raises:
            UsageError: there is none, or colours for one channel, whose luma was not measured.
        """
        fits = {
            kind: moments
            for kind, moments in self.kinds.items()
            if kind.channels in {channels, 1 if channels == 3 else channels}
        }
        if not fits or (channels == 1 and any(kind.channels == 3 for kind in self.kinds)):
            told = ", ".join(map(str, self.kinds)) or "no sample"
            raise UsageError(f"encoder.channels: {channels}; the shards' statistics are of {told}; {advice}")
        return fits

    def range(self, channels: int) -> tuple[float, float]:
        """The least 0.1 and the largest 99.9 percentile of any channel: what becomes 0 and 1 of floating point."""
        fits = self.matching(channels).values()
        low = min(float(moments.percentile(LOW).min()) for moments in fits)
        high = max(float(moments.percentile(HIGH).max()) for moments in fits)
        return (low, high) if low < high else (low, low + 1)

    def normalization(
        self, channels: int, depth: int, range: tuple[float, float] | None
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel in units of 0..1, as `data.mean` and `data.std` want them.

        Values outside the range count as they are, though 8 bits clip them.

        Raises:
            UsageError: as `matching`, or a channel that is constant.
        """
        total, mean, squares = 0, np.zeros(channels), np.zeros(channels)
        for kind, moments in self.matching(channels).items():
            pixels, own, others = moments.mapped(*unit_line(kind.dtype, depth, range))
            apart, total = own - mean, total + pixels
            mean = mean + apart * (pixels / total)
            squares = squares + others + apart**2 * ((total - pixels) * (pixels / total))
        std = np.sqrt(squares / total)
        if (std <= 0).any():
            constant = ", ".join(str(i) for i in np.flatnonzero(std <= 0))
            raise UsageError(
                f"data.std: channel {constant} is constant in the shards' statistics; leave it out, or give data.std"
            )
        return tuple(mean.tolist()), tuple(std.tolist())


def fill_in(data: DataConfig, channels: int, sets: Sequence[Shards], frames: int = 1) -> DataConfig:
    """A recipe's data with the range, mean and standard deviation that its shards' statistics give, where the recipe has
    none and no default fits: other than 1 or 3 channels, or other than 8 bits.

    Args:
        frames: planes that the encoder takes; above 1 an axis without a name is planes in the statistics, too.

    Raises:
        UsageError: they are wanted, and the shards have none, or of other channels.
    """
    ranged = data.range is None and data.depth == 32
    given = data.mean and data.std  # a mixture's own do not stand for these, by which it is scored and exported
    if (given or (channels in (1, 3) and data.depth == 8)) and not ranged:
        return data
    found = read_stats(*sets)
    spec = " ".join(shards.spec for shards in sets)
    command = f"selfsight shards check {spec} --stats{' --volumes' * (frames > 1)}"
    if found is None:
        raise UsageError(
            f"data.mean: no default fits {channels} channels of {data.depth} bits, and the shards have no statistics; "
            f"make them with: {command} (or give data.mean, data.std{' and data.range' * ranged})"
        )
    if frames > 1:
        found.matching(channels, f"measure planes as planes with: {command} (or give data.mean and data.std)")
    range = found.range(channels) if ranged else data.range
    mean, std = found.normalization(channels, data.depth, range)
    return data.model_copy(update={"range": range, "mean": data.mean or mean, "std": data.std or std})


def unit_line(dtype: str, depth: int, range: tuple[float, float] | None) -> tuple[float, float]:
    """Slope and shift that bring a file's own values to 0..1 as `formats.to_depth` and `loader.unit` together do."""
    scale = 1.0
    if dtype == "uint8" and depth < 32:  # a range is one of 16 bits
        scale, range = (1.0, (0.0, 255.0)) if depth == 8 or range is None else (257.0, range)
    low, high = range or (0.0, 65535.0)
    return scale / (high - low), -low / (high - low)


def write_stats(shards: Shards, shard: int, found: Statistics) -> Path:
    """Keep the statistics of one shard beside its index.

    Raises:
        StorageError: the file cannot be written.
    """
    path = shards.beside(shard, SUFFIX)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_packed(found, shards.checksums[shard])))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: the statistics cannot be written ({error.strerror})") from None
    return path


def read_stats(*sets: Shards) -> Statistics | None:
    """The statistics of all shards of these sets together; None where any has none.

    Raises:
        DataError: a damaged file, or one of a shard that has changed since.
    """
    total = Statistics()
    for shards in sets:
        found = shards.found_beside(SUFFIX)
        if found is None:
            return None
        for shard, path in enumerate(found):
            total.add(_read(path, shards.checksums[shard], f"selfsight shards check {shards.paths[shard]} --stats"))
    return total


def _read(path: Path, checksum: int, fix: str) -> Statistics:
    try:
        told = json.loads(path.read_bytes())
        if told["version"] != VERSION:
            raise DataError(f"{path}: statistics of version {told['version']}, this release reads {VERSION}; {fix}")
        if told["index"] != checksum:
            raise DataError(f"{path}: the statistics are of another state of the shard; {fix}")
        return _unpacked(told)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OSError):
        raise DataError(f"{path}: the statistics are damaged; {fix}") from None


def _packed(found: Statistics, checksum: int) -> dict[str, Any]:
    kinds = []
    for kind, moments in found.kinds.items():
        filled = [np.flatnonzero(channel) for channel in moments.bins]
        kinds.append(
            {
                **kind._asdict(),
                "samples": moments.samples,
                "pixels": moments.pixels,
                **{name: getattr(moments, name).tolist() for name in ("mean", "std", "squares", "least", "most")},
                "bins": [[own.tolist(), row[own].tolist()] for own, row in zip(filled, moments.bins, strict=True)],
            }
        )
    head = {"version": VERSION, "index": checksum, "samples": found.samples, "of": found.of}
    return {**head, "planes": dict(found.planes), "kinds": kinds}


def _unpacked(told: dict[str, Any]) -> Statistics:
    found = Statistics(int(told["samples"]), int(told["of"]))
    found.planes = Counter({int(planes): int(count) for planes, count in told["planes"].items()})
    for one in told["kinds"]:
        kind = Kind(int(one["channels"]), str(one["dtype"]))
        vectors = np.array([one[name] for name in ("mean", "squares", "least", "most")], np.float64)
        if vectors.shape != (4, kind.channels) or not np.isfinite(vectors).all():
            raise ValueError("vectors of other lengths")
        mean, squares, least, most = vectors
        bins = np.zeros((kind.channels, BINS), np.int64)
        for row, (places, counts) in zip(bins, one["bins"], strict=True):
            row[places] = counts
        found.kinds[kind] = Moments(int(one["samples"]), int(one["pixels"]), mean, squares, least, most, bins)
    return found
