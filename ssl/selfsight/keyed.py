"""Randomness as a pure function of (seed, purpose, position): no generator, no state, nothing to restore.

Every crop, flip, mask and permutation asks here, so that a run depends neither on the number of loader workers, nor on
the number of ranks, nor on where it was interrupted. The bits are those of SplitMix64 (Steele, Lea, Flood 2014) read
at a counter: position p owns the stream that starts at mix(key + p), column c is its c-th output.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, SplitMix64's increment


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashes(seed: int, purpose: str, positions: ArrayLike, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit words for each of the P positions: (P, count)."""
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    key = np.frombuffer(digest, np.uint64)
    streams = mix(key + np.asarray(positions).astype(np.uint64) * _GOLDEN)
    return mix(streams[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def uniform(seed: int, purpose: str, positions: ArrayLike, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each of the P positions: (P, count)."""
    return (hashes(seed, purpose, positions, count) >> np.uint64(11)) * 2.0**-53
