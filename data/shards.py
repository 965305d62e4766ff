"""A set of shards as one sequence of samples, read by index: `Shards("data/train-{000..009}.tar").read(123)`."""

import os
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from selfsight.data import targets
from selfsight.data.decode import BadSample
from selfsight.data.index import Records, index_path, read_index, read_records, targets_crc
from selfsight.data.order import Ids, sample_ids
from selfsight.data.remote import RemoteReader, ShardChanged, Span, Want, changed
from selfsight.data.remote_index import copies_beside, local_index, looked_at
from selfsight.data.samples import LISTED, split_clip
from selfsight.data.spec import find_shards
from selfsight.data.store import Address, Object, open_store
from selfsight.data.targets import Lists, Targets
from selfsight.errors import DataGone

OPEN_FILES = 128  # per process, well under the usual limit of 1,024
PATIENCE = 30.0  # seconds that a file system may be away
NETWORK = 2  # times as long may a store be away that is reached over a network
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0

T = TypeVar("T")


class Shards:
    """N samples in tars, by number. Cheap to send to a worker: files are opened by the process that reads them.

    Args:
        spec: see `find_shards`.
        block: neighbours that the order keeps near each other (`order.sample_ids`), and that are read together from afar.

    Raises:
        DataError: shards that are missing, or whose index is missing, damaged or stale.
    """

    patience = PATIENCE
    """Seconds for which a file that cannot be read is tried again."""

    def __init__(self, spec: str | Sequence[str], block: int = 1) -> None:
        self.paths, self.block = find_shards(spec), block
        self.spec = spec if isinstance(spec, str) else " ".join(spec)
        addresses = [path for path in self.paths if isinstance(path, Address)]
        far = dict(zip(addresses, looked_at(addresses) if addresses else [], strict=True))
        self._indexes = [far[path][1] if isinstance(path, Address) else None for path in self.paths]
        self._seen = [far[path][0] if isinstance(path, Address) else _identity(os.stat(path)) for path in self.paths]
        self._loaded: list[Records] | None = [self._read_index(shard) for shard in range(len(self.paths))]
        self._checksums = [_checksum(records) for records in self._loaded]
        indexes = [index or index_path(_local(path)) for path, index in zip(self.paths, self._indexes, strict=True)]
        self.targets_crcs = [targets_crc(*one) for one in zip(indexes, self._checksums, strict=True)]
        self._targets: list[Targets | None] | None = None
        self._starts = [0, *accumulate(map(len, self._records))]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._reader: RemoteReader | None = None

    @property
    def remote(self) -> bool:
        """Whether any of the shards is to be read over a network."""
        return any(self._indexes)

    def _read_index(self, shard: int) -> Records:
        path, seen, index = self.paths[shard], self._seen[shard], self._indexes[shard]
        if not isinstance(path, Address) or not isinstance(seen, Object) or index is None:
            return read_index(path)
        if not index.exists():  # the cache folder was cleaned meanwhile
            with closing(open_store(path.scheme)) as store:
                index = local_index(store, path, seen)
        return read_records(index, path, seen.size)

    @property
    def _records(self) -> list[Records]:
        """The indexes; a worker maps them at its first sample, where an error can be told to the one that waits."""
        if self._loaded is None:
            self._loaded = [self._waited(shard, partial(self._reopened, shard)) for shard in range(len(self.paths))]
        return self._loaded

    def beside(self, shard: int, suffix: str) -> Path:
        """A file about one of the shards, where its index is."""
        path, index = self.paths[shard], self._indexes[shard]
        if isinstance(path, Path):
            return index_path(path, suffix)
        assert index is not None
        return index.with_name(index.name.removesuffix(".idx") + suffix)

    def found_beside(self, suffix: str) -> list[Path] | None:
        """Those files of all shards, or local copies of those that stand beside remote ones; None where any has none.

        Raises:
            DataError, DataGone: a store that cannot be read.
        """
        own = [self.beside(shard, suffix) for shard in range(len(self.paths))]
        lacking = [path for path, file in zip(self.paths, own, strict=True) if not file.is_file()]
        far = [path for path in lacking if isinstance(path, Address)]
        copies = copies_beside(far, suffix) if len(far) == len(lacking) else None
        if copies is None:
            return None
        found: dict[Path | Address, Path] = dict(zip(lacking, copies, strict=True))
        return [found.get(path, file) for path, file in zip(self.paths, own, strict=True)]

    @property
    def checksums(self) -> list[int]:
        """CRC-32 of each shard's index records, which change with any sample in it."""
        return list(self._checksums)

    @property
    def sizes(self) -> list[int]:
        """Samples in each shard."""
        return [end - start for start, end in pairwise(self._starts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def ids(self, positions: Ids, seed: int) -> Ids:
        """The samples at `positions` (P,) of a run: (P,), each once an epoch."""
        return sample_ids(positions, len(self), seed, self.block)

    def epochs(self, positions: Ids, seed: int) -> Ids:
        """How often the sample at each position was shown before: (P,)."""
        return positions // len(self)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Label of every sample (N,), -1 where there is none, -2 where there is a list: see `label_lists`."""
        return np.concatenate([records["label"] for records in self._records]).astype(np.int32)

    def label_lists(self) -> NDArray[np.bool_] | None:
        """Which sample has which label, (N, C) with C - 1 the largest; None where no sample has a list.

        A single label counts as a list of one, none as an empty one; `labels` tells them apart.

        Raises:
            DataError: lists that are missing or damaged, or a table of more than 8 GiB.
        """
        if not (self.labels == LISTED).any():
            return None
        return targets.table([(own["label"], more) for own, more in zip(self._records, self._more, strict=True)])

    @property
    def lists(self) -> Lists:
        """What the lists of labels hold, counted without a table of them."""
        found = [more for more in self._more if more]
        filled = sum(int(np.count_nonzero(np.diff(more.starts))) for more in found)
        labels = np.unique(
            np.concatenate([np.empty(0, np.int32), *(more.labels for more in found)]), return_counts=True
        )
        samples = int((self.labels == LISTED).sum())
        return Lists(samples, samples - filled, dict(zip(*(column.tolist() for column in labels), strict=True)))

    @property
    def masks(self) -> NDArray[np.bool_]:
        """Whether every sample has a mask (N,)."""
        sizes = [
            more.masks["size"] if more and len(more.masks) else np.zeros(size, np.uint32)
            for size, more in zip(self.sizes, self._more, strict=True)
        ]
        return np.concatenate(sizes) > 0

    def read_mask(self, sample: int) -> bytes:
        """The encoded mask of one sample; raises as `read`.

        Raises:
            BadSample: it has none, or other bytes than those that were indexed.
        """
        shard, _ = self._locate(sample)
        more = self._more[shard]
        if more is None or not len(more.masks) or not more.masks[place := sample - self._starts[shard]]["size"]:
            raise BadSample(f"{self.describe(sample)}: has no mask")
        offset, size, crc = more.masks[place].item()
        return self._bytes(sample, Want(shard, offset, size, crc))

    @property
    def _more(self) -> list[Targets | None]:
        """Lists and masks of each shard, read when they are first asked for; None where a shard has neither."""
        if self._targets is None:
            self._targets = [self._read_targets(shard) for shard in range(len(self.paths))]
        return self._targets

    def _read_targets(self, shard: int) -> Targets | None:
        path, seen, crc = self.paths[shard], self._seen[shard], self.targets_crcs[shard]
        if not crc:
            return None
        file = self.beside(shard, targets.SUFFIX)
        if isinstance(path, Address) and not file.is_file():
            file = (copies_beside([path], targets.SUFFIX) or [file])[0]
        size = seen.size if isinstance(seen, Object) else seen[0]
        return targets.read_targets(file, str(path), self.sizes[shard], size, crc)

    @property
    def fingerprinted(self) -> bool:
        """Whether the indexes say more of contents than a checksum; those of older releases do not."""
        return all(bool((records["print"] > 0).all()) for records in self._records)

    @property
    def prints(self) -> NDArray[np.uint64]:
        """Size and fingerprint of every sample as one number (N,): of equal samples the same, of others hardly ever."""
        return np.concatenate(
            [records["size"].astype(np.uint64) << np.uint64(32) | records["print"] for records in self._records]
        )

    @property
    def groups(self) -> NDArray[np.int32]:
        """Number of the whole (patient, slide, scene) that every sample is a part of (N,), -1 where there is none."""
        return np.concatenate([records["group"] for records in self._records]).astype(np.int32)

    @property
    def frames(self) -> NDArray[np.int64]:
        """Frames of every sample (N,), 0 of a sample that is one image."""
        return np.concatenate([records["frames"] for records in self._records]).astype(np.int64)

    @property
    def id(self) -> str:
        """A short hash of what the samples are: their sizes, checksums, labels and masks in order; not where they lie."""
        digest = sha256()
        for records, more in zip(self._records, self._more, strict=True):
            for field in ("size", "crc", "label"):
                digest.update(np.ascontiguousarray(records[field]).tobytes())
            if more:
                for column in (more.starts, more.labels, more.masks["size"], more.masks["crc"]):
                    digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()[:16]

    @property
    def contents(self) -> str:
        """A hash of what the images are, in order: as `id`, but of images alone, and of more of them."""
        digest = sha256()
        for records in self._records:
            for field in ("size", "crc", "print"):
                digest.update(np.ascontiguousarray(records[field]).tobytes())
        return digest.hexdigest()

    def neighbour(self, sample: int, shift: int) -> int:
        """The sample so many places after this one, else before it, that lies in its shard and has its label; else itself."""
        shard, record = self._locate(sample)
        records, place = self._records[shard], sample - self._starts[shard]
        if record["label"] == LISTED:  # whose list is the same, the index does not know
            return sample
        for other in (place + shift, place - shift):
            if 0 <= other < len(records) and records[other]["label"] == record["label"]:
                return self._starts[shard] + other
        return sample

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: `train-000003.tar@51200`."""
        shard, record = self._locate(sample)
        return f"{self.paths[shard].name}@{record['offset']}"

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample, by one `pread`, or as `prefetch` has asked for it.

        Raises:
            BadSample: bytes that are not those that were indexed.
            ShardChanged: the shard is another file than at the start.
            DataGone: the shard cannot be read, and could not for `patience` seconds.
        """
        shard, record = self._locate(sample)
        offset, size, crc, *_ = record.item()  # one conversion: this is done for every image
        return self._bytes(sample, Want(shard, offset, size, crc))

    def _bytes(self, sample: int, want: Want) -> bytes:
        shard, offset, size, crc = want
        if self._indexes[shard]:
            return self._far.sample(want)
        for _ in range(2):  # a second read tells a passing fault from a lasting one
            try:
                body = self._pread(shard, size, offset)
            except OSError:
                body = self._waited(shard, partial(self._pread, shard, size, offset))
            if zlib.crc32(body) == crc:
                return body
        if _identity(self._waited(shard, partial(os.stat, _local(self.paths[shard])))) != self._seen[shard]:
            raise ShardChanged(changed(self.paths[shard]))
        raise BadSample(f"{self.describe(sample)}: the bytes are not those that were indexed (CRC)")

    @property
    def sets(self) -> list["Shards"]:
        """As `Mixture.sets`: itself alone."""
        return [self]

    def read_images(self, sample: int) -> list[bytes]:
        """The encoded images of a sample; raises as `read` and `images`."""
        return self.images(sample, self.read(sample))

    def images(self, sample: int, body: bytes) -> list[bytes]:
        """The encoded images in the bytes of a sample: its one image, or the frames of a clip in order."""
        frames = int(self._locate(sample)[1]["frames"])
        return split_clip(body, frames) if frames else [body]

    def prefetch(self, samples: Iterable[int], keep: bool = True) -> None:
        """Begin to read samples of remote shards; local ones need no such thing. Returns at once; `read` waits, and
        raises what went wrong.

        Args:
            keep: whether they are needed soon; else they only come to the cache on the disk.
        """
        if not self.remote:
            return
        located = ((sample, *self._locate(int(sample))) for sample in samples)
        wants = {
            Want(shard, *record.item()[:3]): int(sample) for sample, shard, record in located if self._indexes[shard]
        }
        around = (lambda want: self._block_of(wants[want])) if self.block > 1 else None
        if keep:
            self._far.ask(list(wants), around)
        elif around:
            self._far.fill(list(wants), around)

    @property
    def _far(self) -> RemoteReader:
        if self._reader is None:
            addresses = [path if isinstance(path, Address) else None for path in self.paths]
            seen = [found if isinstance(found, Object) else None for found in self._seen]
            self._reader = RemoteReader(addresses, seen, NETWORK * self.patience)
        return self._reader

    def _block_of(self, sample: int) -> Span:
        """The bytes of a sample's block, as far as it lies in one shard."""
        shard, _ = self._locate(sample)
        start, end = self._starts[shard : shard + 2]
        first = max(start, sample // self.block * self.block) - start
        those = self._records[shard][first : min(end, (sample // self.block + 1) * self.block) - start]
        return Span(shard, int(those["offset"].min()), int((those["offset"] + those["size"]).max()))

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file(shard), size, offset)
        except OSError:
            self.close()  # after an outage old files may stay unreadable for ever (ESTALE)
            raise

    def _waited(self, shard: int, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, once the file system lets it."""
        end, pause = time.monotonic() + self.patience, FIRST_PAUSE
        while True:
            try:
                return attempt()
            except OSError as error:
                if time.monotonic() + pause > end:
                    raise DataGone(
                        f"{self.paths[shard]}: the data cannot be reached any more ({error.strerror}, for {self.patience:g} s); "
                        "run the same command when they are back"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _reopened(self, shard: int) -> Records:
        path = self.paths[shard]
        if isinstance(path, Path):
            os.stat(path)  # raises what `_waited` waits for, where `read_index` says that no run can start
        records = self._read_index(shard)
        if _checksum(records) != self._checksums[shard]:
            raise ShardChanged(changed(self.paths[shard]))
        return records

    def _locate(self, sample: int) -> tuple[int, np.void]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = bisect_right(self._starts, sample) - 1
        return shard, self._records[shard][sample - self._starts[shard]]

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            file = self._files[shard] = os.open(_local(self.paths[shard]), os.O_RDONLY)
            if os.fstat(file).st_size != self._seen[shard][0]:
                raise ShardChanged(changed(self.paths[shard]))
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        """Close what is open; the next read opens it again."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._reader:
            self._reader.close()
            self._reader = None

    def __del__(self) -> None:
        if "_reader" in self.__dict__:  # not set where the constructor raised
            self.close()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict(), "_loaded": None, "_reader": None, "_targets": None}


def _checksum(records: Records) -> int:
    return zlib.crc32(records.tobytes())


def _local(path: Path | Address) -> Path:
    assert isinstance(path, Path)
    return path


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino
