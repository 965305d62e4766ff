"""The order is a permutation each epoch, random enough, and the same however it is split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfsight.data.order import WINDOW, rank_positions, sample_ids


@given(st.integers(1, 3000), st.integers(0, 2**32), st.integers(0, 10**6))
def test_every_sample_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    positions = np.arange(size) + epoch * size
    assert sorted(sample_ids(positions, size, seed).tolist()) == list(range(size))


@given(st.integers(1, 500), st.integers(0, 9), st.lists(st.integers(0, 5000), min_size=1, max_size=30))
def test_a_position_alone_has_the_same_sample(size: int, seed: int, positions: list[int]) -> None:
    """Also where one batch spans several epochs."""
    together = sample_ids(np.array(positions), size, seed)
    assert together.tolist() == [sample_ids(np.array([p]), size, seed)[0] for p in positions]


def test_epochs_and_seeds_differ() -> None:
    first, second = sample_ids(np.arange(1000), 1000, 0), sample_ids(np.arange(1000, 2000), 1000, 0)
    other = sample_ids(np.arange(1000), 1000, 1)
    for a, b in ((first, second), (first, other)):
        assert (a == b).sum() < 10  # 1 is expected of two random permutations


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_small_permutations_are_fair(size: int) -> None:
    """Each sample at each place equally often over epochs."""
    epochs = 6000
    ids = sample_ids(np.arange(size * epochs), size, 0).reshape(epochs, size)
    for place in range(size):
        counts = np.bincount(ids[:, place], minlength=size)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_a_large_permutation_looks_like_numpys() -> None:
    """Where neighbours go, displacement and cycles: the statistics of a random permutation."""
    size = 10_007
    ids = sample_ids(np.arange(size), size, 5)
    gaps = np.diff(ids)
    random = np.diff(np.random.default_rng(0).permutation(size))
    assert stats.ks_2samp(gaps, random).pvalue > 1e-3
    assert abs(stats.spearmanr(np.arange(size), ids).statistic) < 0.04
    blocks, _, _ = np.histogram2d(np.arange(size), ids, bins=10)
    assert stats.chisquare(blocks.ravel()).pvalue > 1e-3
    assert (ids == np.arange(size)).sum() < 8


# -- blocks of neighbours


@given(st.integers(1, 3000), st.integers(1, 100), st.integers(0, 2**32), st.integers(0, 10**6))
def test_with_blocks_every_sample_is_once_in_an_epoch(size: int, block: int, seed: int, epoch: int) -> None:
    positions = np.arange(size) + epoch * size
    assert sorted(sample_ids(positions, size, seed, block).tolist()) == list(range(size))


@given(st.integers(1, 2000), st.integers(1, 30), st.lists(st.integers(0, 20_000), min_size=1, max_size=20))
def test_with_blocks_a_position_alone_has_the_same_sample(size: int, block: int, positions: list[int]) -> None:
    together = sample_ids(np.array(positions), size, 3, block)
    assert together.tolist() == [sample_ids(np.array([p]), size, 3, block)[0] for p in positions]


def test_blocks_of_one_sample_are_the_old_order() -> None:
    positions = np.arange(0, 5000, 7)
    assert sample_ids(positions, 997, 5, block=1).tolist() == sample_ids(positions, 997, 5).tolist()
    assert sample_ids(np.arange(10), 1000, 0).tolist() == [101, 992, 371, 244, 627, 51, 901, 584, 903, 343]


@pytest.mark.parametrize("size", [64 * 8 * 5, 64 * 8 * 5 + 3, 64 * 8 * 4 + 100])
def test_a_window_has_the_samples_of_its_blocks_alone(size: int) -> None:
    """And every one of them, so that a block is read once; the short block counts as one of the window's."""
    block, whole = 8, WINDOW * 8
    for epoch in range(3):
        ids = sample_ids(np.arange(size) + epoch * size, size, 1, block)
        missing = -size % block  # from the one window that has the short block
        seen: set[int] = set()
        start = 0
        while start < size:
            width = min(whole, size - start)
            short = missing and (size - 1) // block in (ids[start : start + width - missing] // block).tolist()
            width = min(width, whole - missing) if short else width
            blocks = set((ids[start : start + width] // block).tolist())
            assert len(blocks) <= WINDOW
            assert not blocks & seen
            seen |= blocks
            start += width
        assert len(seen) == -(-size // block)


def test_blocks_and_their_samples_are_shuffled() -> None:
    """Neither blocks nor the places within a window follow the order of the shards; the short block may come anywhere."""
    block, size = 8, WINDOW * 8 * 20 + 5
    ids = sample_ids(np.arange(size), size, 5, block)
    first = ids[: WINDOW * block]
    assert abs(stats.spearmanr(np.arange(len(first)), first).statistic) < 0.15
    assert len(set((first[:64] // block).tolist())) > 32
    order = [group for group in (ids[i * WINDOW * block : (i + 1) * WINDOW * block] for i in range(20))]
    starts = [float(np.median(group)) for group in order]
    assert max(starts) - min(starts) < size / 2  # every window has blocks from everywhere
    last = size // block
    places = [
        int(np.flatnonzero(sample_ids(np.arange(size) + e * size, size, 5, block) // block == last)[0])
        for e in range(40)
    ]
    assert max(places) - min(places) > size / 2
    again = sample_ids(np.arange(size) + size, size, 5, block)
    assert len(set((again[: WINDOW * block] // block).tolist()) & set((first // block).tolist())) < 20


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(1, 5))
def test_ranks_and_micro_batches_share_the_global_batch(step: int, world: int, micros: int, share: int) -> None:
    batch = world * micros * share
    parts = [rank_positions(step, batch, r, world, m, micros) for m in range(micros) for r in range(world)]
    assert np.concatenate(parts).tolist() == list(range(step * batch, (step + 1) * batch))


def test_an_uneven_split_is_refused() -> None:
    with pytest.raises(ValueError, match="does not split over 3 ranks x 1"):
        rank_positions(0, 16, 0, 3)


def test_a_billion_samples_need_no_memory() -> None:
    ids = sample_ids(np.array([0, 10**9 - 1, 5 * 10**9 + 7]), 10**9, 0)
    assert ((ids >= 0) & (ids < 10**9)).all()
