"""Several sets as one: each gets its share of every epoch, and its own samples stay equally often.

Position p of the run lies in epoch e at index i, as for one set. Turns go round evenly: of any stretch of an epoch each set
has its share n_k / N, to within a sample for each set, so that every batch is a small picture of the mixture. The set's own
position is e * n_k plus its turns before i, and its sample that of a run over the set alone, blocks included. So a mixture is
a pure function of the position, too, and a small set that weighs much is walked through again and again, each sample as
often as the others.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import accumulate
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from selfsight import keyed
from selfsight.data.order import Ids
from selfsight.data.shards import Shards
from selfsight.errors import UsageError


class Mixture:
    """Sets of shards read as one, samples numbered set after set.

    Args:
        sets: at least one.
        weights: what an epoch holds of each, relative to each other; None: as many as the set has samples.

    Raises:
        UsageError: a weight so small that an epoch has no sample of the set.
    """

    def __init__(self, sets: Sequence[Shards], weights: Sequence[float | None]) -> None:
        self.sets = list(sets)
        self.starts = [0, *accumulate(map(len, self.sets))]
        known = [len(own) if weight is None else weight for own, weight in zip(sets, weights, strict=True)]
        self.shares = proportional(len(self), known)
        for own, share in zip(self.sets, self.shares, strict=True):
            if not share:
                raise UsageError(f"data.mix: {own.spec}: an epoch of {len(self):,} has none of it; give it more weight")
        self.spec = " + ".join(own.spec for own in self.sets)

    def __len__(self) -> int:
        return self.starts[-1]

    def ids(self, positions: Ids, seed: int) -> Ids:
        """The samples at `positions` (P,) of a run: (P,)."""
        ids = np.empty(len(positions), np.int64)
        for number, mine, turns, key in self._turns(positions, seed):
            ids[mine] = self.starts[number] + self.sets[number].ids(turns, key)
        return ids

    def epochs(self, positions: Ids, seed: int) -> Ids:
        """How often the sample at each position was shown before, of its set: (P,)."""
        epochs = np.empty(len(positions), np.int64)
        for number, mine, turns, key in self._turns(positions, seed):
            epochs[mine] = self.sets[number].epochs(turns, key)
        return epochs

    def _turns(self, positions: Ids, seed: int) -> Iterator[tuple[int, NDArray[np.bool_], Ids, int]]:
        """Set by set: its number, which positions are its, their positions within it, and the seed of its order.

        The first set against all others, the second against the rest, and so on: of `left` slots a set has `share`, at those
        where floor(i * share / left) steps up (Bresenham's line).
        """
        epoch, index = np.divmod(np.asarray(positions, np.int64), len(self))
        open_, left = np.ones(len(index), bool), len(self)
        for number, share in enumerate(self.shares):
            before = index * share // left
            mine = open_ & ((index + 1) * share // left > before)
            if mine.any():
                key = int(keyed.hashes(seed, f"set {number}", [0], 1)[0, 0] >> np.uint64(1))
                yield number, mine, (epoch * share + before)[mine], key
            open_, index, left = open_ & ~mine, index - before, max(1, left - share)

    def set_of(self, ids: Ids) -> Ids:
        """Which set each sample (P,) is of."""
        return np.searchsorted(self.starts[1:], ids, side="right")

    @property
    def labels(self) -> NDArray[np.int32]:
        """Label of every sample (N,), -1 where there is none; sets name their classes each for itself."""
        return np.concatenate([own.labels for own in self.sets])

    @property
    def id(self) -> str:
        """A short hash of what the sets and their shares are."""
        told = ",".join(f"{own.id}:{share}" for own, share in zip(self.sets, self.shares, strict=True))
        return sha256(told.encode()).hexdigest()[:16]

    def neighbour(self, sample: int, shift: int) -> int:
        """As `Shards.neighbour`, within the sample's set."""
        own, number, start = self._locate(sample)
        return start + own.neighbour(number, shift)

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages."""
        own, number, _ = self._locate(sample)
        return own.describe(number)

    def read(self, sample: int) -> bytes:
        """As `Shards.read`."""
        own, number, _ = self._locate(sample)
        return own.read(number)

    @property
    def block(self) -> int:
        """As `Shards.block`, the same for all."""
        return self.sets[0].block

    @property
    def remote(self) -> bool:
        """As `Shards.remote`."""
        return any(own.remote for own in self.sets)

    def prefetch(self, samples: Iterable[int], keep: bool = True) -> None:
        """As `Shards.prefetch`."""
        located = [self._locate(int(sample)) for sample in samples]
        for own, start in zip(self.sets, self.starts[:-1], strict=True):
            own.prefetch([number for _, number, first in located if first == start], keep)

    def read_images(self, sample: int) -> list[bytes]:
        """As `Shards.read_images`."""
        own, number, _ = self._locate(sample)
        return own.read_images(number)

    def images(self, sample: int, body: bytes) -> list[bytes]:
        """As `Shards.images`."""
        own, number, _ = self._locate(sample)
        return own.images(number, body)

    def _locate(self, sample: int) -> tuple[Shards, int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number = bisect_right(self.starts, sample) - 1
        return self.sets[number], sample - self.starts[number], self.starts[number]


Samples: TypeAlias = Shards | Mixture


def proportional(total: int, weights: Sequence[float]) -> list[int]:
    """`total` split in proportion to the weights, by largest remainder: whole numbers that sum to it."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(weights)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_rest[: total - sum(shares)]:
        shares[k] += 1
    return shares
