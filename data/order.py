"""Which sample stands at which position of a run: a pure function, so that progress is one integer.

Position p of the run lies in epoch e at index i, (e, i) = divmod(p, N); its sample is permutation[seed, e](i). Nothing is
stored: the permutation is a Feistel network (Luby and Rackoff 1988) over a grid a x b that just covers N, walked again
for the few values that fall outside N, so that any position of any epoch costs the same and no rank or worker holds an
array of N numbers.

For stores far away, neighbours are read together: blocks of samples are permuted, and in each window of so many permuted
blocks the samples are.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

from selfsight import keyed

ROUNDS = 12  # half-rounds; 4 already make a pseudo-random permutation in theory, the rest is margin for tiny N
WINDOW = 64  # blocks whose samples are shuffled among themselves

Ids = NDArray[np.int64]


def sample_ids(positions: Ids, size: int, seed: int, block: int = 1) -> Ids:
    """The samples at `positions` (P,) of a run over `size` samples: (P,) ids in [0, size), each once an epoch.

    Args:
        block: neighbours that stay near each other: the samples of `WINDOW` blocks are shuffled among themselves.
    """
    epoch, index = np.divmod(np.asarray(positions, np.int64), size)
    if block == 1:
        return _permuted(index, keyed.hashes(seed, "order", epoch, ROUNDS), size)
    return _in_blocks(epoch, index, size, seed, block)


def _in_blocks(epoch: Ids, index: Ids, size: int, seed: int, block: int) -> Ids:
    """Blocks in the order of the epoch's permutation, and in every window of them the samples in an order of their own.

    The last block may be short. It has a place of its own among the others, which are all alike: that place is a hash.
    """
    whole, rest = divmod(size, block)
    lacking = (block - rest) % block
    blocks = whole + bool(rest)
    short = np.full(len(epoch), blocks)  # no block lacks anything
    if rest:
        short = (keyed.hashes(seed, "short block", epoch, 1)[:, 0] % np.uint64(blocks)).astype(np.int64)
    window = (index + (index >= short * block + rest) * lacking) // (block * WINDOW)
    start, end = (_start_of(edge, short, blocks, block, lacking) for edge in (window, window + 1))
    keys = keyed.hashes(seed, "window", epoch * -(-blocks // WINDOW) + window, ROUNDS)
    place = np.empty_like(index)
    for length in np.unique(end - start):  # few: whole windows, one with the short block, the last one
        same = end - start == length
        place[same] = start[same] + _permuted((index - start)[same], keys[same], int(length))
    turn, within = np.divmod(place + (place >= short * block + rest) * lacking, block)
    others = turn != short
    found = np.full_like(turn, whole)
    found[others] = _permuted(
        (turn - (turn > short))[others], keyed.hashes(seed, "blocks", epoch[others], ROUNDS), whole
    )
    return found * block + within


def _start_of(window: Ids, short: Ids, blocks: int, block: int, lacking: int) -> Ids:
    """How many samples of the epoch come before a window."""
    before = np.minimum(window * WINDOW, blocks)
    return before * block - (short < before) * lacking


def _permuted(index: Ids, keys: NDArray[np.uint64], size: int) -> Ids:
    """A keyed bijection of [0, size)."""
    if size < 2:
        return index.copy()
    columns = isqrt(size - 1) + 1
    rows = -(-size // columns)
    ids = _feistel(index, keys, rows, columns)
    while (outside := ids >= size).any():  # cycle walking: at most 1 value in sqrt(N) takes another turn
        ids[outside] = _feistel(ids[outside], keys[outside], rows, columns)
    return ids


def _feistel(index: Ids, keys: NDArray[np.uint64], rows: int, columns: int) -> Ids:
    """A keyed bijection of [0, rows * columns): each half-round shifts one coordinate by a hash of the other."""
    row, column = np.divmod(index, columns)
    for r in range(0, ROUNDS, 2):
        row = (row + _hash(column, keys[:, r], rows)) % rows
        column = (column + _hash(row, keys[:, r + 1], columns)) % columns
    return row * columns + column


def _hash(x: Ids, key: NDArray[np.uint64], bound: int) -> Ids:
    return (keyed.mix(x.astype(np.uint64) ^ key) % np.uint64(bound)).astype(np.int64)


def rank_positions(step: int, batch_size: int, rank: int = 0, world: int = 1, micro: int = 0, micros: int = 1) -> Ids:
    """The positions of one micro-batch: step s, slot j -> s * batch_size + j, slots split over micro-batches, then ranks.

    In this order a micro-batch holds the same samples on any number of ranks.

    Raises:
        ValueError: `batch_size` is not a multiple of world * micros.
    """
    share, rest = divmod(batch_size, world * micros)
    if rest:
        raise ValueError(f"a global batch of {batch_size} does not split over {world} ranks x {micros} micro-batches")
    first = step * batch_size + (micro * world + rank) * share
    return np.arange(first, first + share, dtype=np.int64)
