"""Several sets as one: shares, equal use of each set's samples, statistics of each, and one integer of state.

Mutations that these tests caught when they were tried: the shares of a set counted from the epoch's start anew, all sets in
the same order, the next set's statistics, a remainder given to the smallest, ids without the set's start.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import given
from hypothesis import strategies as st

from selfsight.assemble import assemble
from selfsight.data.build import write_shards
from selfsight.data.decode import Form
from selfsight.data.mixture import Mixture, proportional
from selfsight.data.pixel_cache import build_cache
from selfsight.data.shards import Shards
from selfsight.errors import UsageError
from selfsight.recipe import Recipe, validate


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for number, count in enumerate((30, 7)):
        folder = tmp_path_factory.mktemp(f"set{number}")
        write_shards(((image, 0) for image, _ in pictures(count)), folder, "s", per_shard=11)
        made.append(folder)
    return made


def sets(folders: list[Path]) -> list[Shards]:
    return [Shards(str(folder)) for folder in folders]


@given(st.integers(1, 5000), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_shares_are_whole_sum_to_the_total_and_are_proportional(total: int, weights: list[float]) -> None:
    shares = proportional(total, weights)
    assert sum(shares) == total
    assert all(abs(share - total * w / sum(weights)) < 1 for share, w in zip(shares, weights, strict=True))


@pytest.mark.parametrize("weights", [(None, None), (1.0, 1.0), (1.0, 3.0), (5.0, 0.5)])
def test_every_epoch_has_its_shares_and_every_sample_is_used_as_often(
    folders: list[Path], weights: tuple[float | None, float | None]
) -> None:
    """Over whole epochs: samples of one set differ by at most one in how often they were seen."""
    mixture = Mixture(sets(folders), weights)
    assert len(mixture) == 37
    ids = np.concatenate([mixture.ids(np.arange(e * 37, (e + 1) * 37), seed=3) for e in range(40)])
    wanted = (30.0, 7.0) if weights == (None, None) else weights
    for epoch in ids.reshape(40, 37):
        small = int((epoch >= 30).sum())
        assert [37 - small, small] == proportional(37, wanted)  # type: ignore[arg-type]
    used = Counter(ids.tolist())
    for numbers in (range(30), range(30, 37)):
        counts = [used[i] for i in numbers]
        assert max(counts) - min(counts) <= 1
    if weights == (None, None):  # then every epoch is every sample once
        assert all(sorted(epoch) == list(range(37)) for epoch in ids.reshape(40, 37).tolist())


def test_the_order_is_a_function_of_the_position(folders: list[Path]) -> None:
    mixture = Mixture(sets(folders), (1.0, 2.0))
    whole = mixture.ids(np.arange(500), 1)
    shuffled = np.random.default_rng(0).permutation(500)
    assert np.array_equal(mixture.ids(shuffled, 1), whole[shuffled])
    assert not np.array_equal(mixture.ids(np.arange(500), 2), whole)
    halves = Mixture([sets(folders)[1]] * 2, (None, None)).ids(np.arange(14), 0)
    order = [[i % 7 for i in halves.tolist() if i // 7 == half] for half in (0, 1)]
    assert order[0] != order[1]  # sets of one size are not walked in step


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 200), st.integers(1, 60))
def test_every_stretch_has_its_shares(shares: list[int], start: int, count: int) -> None:
    """Of any stretch that lies in one epoch each set has its share, to within as many samples as there are sets."""
    mixture = Mixture.__new__(Mixture)
    mixture.shares, total = shares, sum(shares)
    mixture.starts = [0, total]
    start %= total
    count = min(count, total - start)
    positions = np.arange(start, start + count) + 3 * total
    found = {number: (int(mine.sum()), turns) for number, mine, turns, _ in mixture._turns(positions, 0)}
    assert sum(held for held, _ in found.values()) == count
    for number, share in enumerate(shares):
        held, turns = found.get(number, (0, np.empty(0, int)))
        assert abs(held - count * share / total) <= len(shares)
        if held:  # its own positions follow each other
            assert turns.tolist() == list(range(int(turns[0]), int(turns[0]) + held))
            assert 3 * share <= turns[0]
            assert turns[-1] < 4 * share


def test_blocks_keep_neighbours_of_each_set_together(folders: list[Path]) -> None:
    """Of both sets, two thirds of a window of 64 blocks of 2 are all they have, so that order alone is looked at."""
    mixture = Mixture([Shards(str(folder), 2) for folder in folders], (None, None))
    assert mixture.block == 2
    assert all(sorted(mixture.ids(np.arange(37) + 37 * e, 1).tolist()) == list(range(37)) for e in range(3))
    plain = Mixture(sets(folders), (None, None))
    assert not np.array_equal(mixture.ids(np.arange(37), 1), plain.ids(np.arange(37), 1))


def test_samples_are_the_sets_own(folders: list[Path]) -> None:
    first, second = sets(folders)
    mixture = Mixture([first, second], (None, None))
    for sample, (own, number) in {0: (first, 0), 29: (first, 29), 30: (second, 0), 36: (second, 6)}.items():
        assert mixture.read(sample) == own.read(number)
        assert mixture.describe(sample) == own.describe(number)
    assert mixture.neighbour(30, 2) == 32
    assert mixture.set_of(np.array([0, 29, 30, 36])).tolist() == [0, 0, 1, 1]
    assert mixture.id != Mixture([first, second], (1.0, 1.0)).id
    with pytest.raises(IndexError):
        mixture.read(37)


def test_a_set_without_a_share_is_refused(folders: list[Path]) -> None:
    with pytest.raises(UsageError, match="an epoch of 37 has none of it"):
        Mixture(sets(folders), (1.0, 1e-6))


def recipe(folders: list[Path], tmp_path: Path, **data: Any) -> Recipe:
    mix = [{"train": str(folder)} for folder in folders]
    tree: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "data": {"mix": mix} | data,
        "encoder": {"image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2},
        "objective": {"name": "rotation", "view": {"crop_scale": None, "flip": 0.0}},
        "train": {"epochs": 2, "batch_size": 16, "device": "cpu"},
    }
    return validate(tree, "test")


def test_each_set_has_its_statistics(folders: list[Path], tmp_path: Path) -> None:
    plain = assemble(recipe(folders, tmp_path), torch.device("cpu"))
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.25]}
    mix = [{"train": str(folders[0])}, {"train": str(folders[1])} | own]
    parts = assemble(recipe(folders, tmp_path, mix=mix), torch.device("cpu"))
    host = parts.batches()[1]
    theirs = host.ids >= 30
    assert 0 < theirs.sum() < 16
    found, default = (each.placer(torch.device("cpu"))(host).views[0] for each in (parts, plain))
    mean, std = (torch.tensor(own[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(found[theirs], (host.views[0][theirs].float() / 255 - mean) / std, atol=1e-6)
    assert torch.equal(found[~theirs], default[~theirs])
    assert parts.steps == 5  # 2 epochs of 37, in batches of 16
    assert parts.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"train": "x"}, "give either train or mix"),
        ({"mix": []}, "give either train or mix"),
        ({"mix": [{"train": "x", "weight": 0}]}, "mix.0.weight"),
    ],
)
def test_bad_mixtures_are_refused(folders: list[Path], tmp_path: Path, data: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        recipe(folders, tmp_path, **data)


@pytest.mark.parametrize("values", [{"mean": [0.5]}, {"std": [0.1, 0.2, 0.0]}])
def test_bad_statistics_are_refused(folders: list[Path], tmp_path: Path, values: dict[str, Any]) -> None:
    mix = [{"train": str(folders[0])}, {"train": str(folders[1])} | values]
    with pytest.raises(UsageError, match=r"data\.mix: (mean|std)"):
        assemble(recipe(folders, tmp_path, mix=mix), torch.device("cpu")).placer(torch.device("cpu"))


def test_how_often_a_sample_was_shown_is_counted_by_its_set(folders: list[Path]) -> None:
    """A small set of much weight comes many times an epoch; each time counts."""
    mixture = Mixture(sets(folders), (1.0, 3.0))
    positions = np.arange(37 * 6)
    seen: Counter[int] = Counter()
    epochs = mixture.epochs(positions, 2)
    for sample, epoch in zip(mixture.ids(positions, 2).tolist(), epochs.tolist(), strict=True):
        assert epoch >= 0
        seen[sample, epoch] += 1  # type: ignore[index]
    assert max(seen.values()) == 1
    first, _ = sets(folders)
    assert np.array_equal(first.epochs(np.arange(90), 1), np.arange(90) // 30)


def test_objectives_that_want_pixels_back_refuse_statistics_of_each_set(folders: list[Path], tmp_path: Path) -> None:
    mix = [{"train": str(folders[0])}, {"train": str(folders[1]), "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.25]}]
    tree = recipe(folders, tmp_path, mix=mix).model_dump(mode="json")
    mae = {"name": "mae", "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
    for objective in (
        mae | {"loss": "ms-ssim"},
        {"name": "joint", "parts": {"a": {"objective": mae | {"loss": "ms-ssim"}}}},
    ):
        with pytest.raises(UsageError, match="needs one mean and std for all sets"):
            assemble(validate(tree | {"objective": objective}, "test"), torch.device("cpu"))
    assemble(validate(tree | {"objective": mae}, "test"), torch.device("cpu"))


def test_a_cache_is_not_used_where_pixels_would_differ(folders: list[Path], tmp_path: Path) -> None:
    shards = Shards(str(folders[0]))
    build_cache(shards, Form(3))
    for more, used in (
        ({}, True),
        ({"cache": "off"}, False),
        ({"fast_decode": True}, False),
        ({"decode": "device"}, False),
    ):
        tree = recipe(folders, tmp_path).model_dump(mode="json")
        tree["data"] |= {"train": str(folders[0]), "mix": []} | more
        batches = assemble(validate(tree, "test"), torch.device("cpu")).batches()
        assert (batches.cache is not None) == used


def test_reduced_decoding_is_off_beside_repeats(folders: list[Path], tmp_path: Path) -> None:
    """The crops that may reduce an image would be those of its repeats in the same micro-batch."""
    tree = recipe(folders, tmp_path).model_dump(mode="json")
    for repeat, reduced in ((1, True), (2, False)):
        tree["data"] |= {"fast_decode": True, "repeat": repeat}
        assert assemble(validate(tree, "test"), torch.device("cpu")).batches().reduce == reduced
