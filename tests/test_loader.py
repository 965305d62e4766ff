"""The same global batches, tensors included, for any number of workers and ranks and from any start."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfsight.data.build import write_shards
from selfsight.data.decode import decode
from selfsight.data.loader import Batches, HostBatch, loader, normalize, to_device
from selfsight.data.order import sample_ids
from selfsight.data.shards import Shards
from selfsight.data.views import View, ViewMaker
from selfsight.errors import DataError

MAKERS = tuple(ViewMaker(View(), number, 6, "bicubic", seed=4) for number in (0, 1))


def batches(folder: Path, batch_size: int = 12, rank: int = 0, world: int = 1, accumulate: int = 1) -> Batches:
    return Batches(Shards(str(folder)), MAKERS, 4, 1, batch_size, rank, world, accumulate)


def same(a: HostBatch, b: HostBatch) -> bool:
    tensors = zip((*a.views, a.positions, a.ids), (*b.views, b.positions, b.ids), strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and a.bad == b.bad


def joined(parts: list[HostBatch]) -> HostBatch:
    views = tuple(torch.cat([part.views[v] for part in parts]) for v in range(len(parts[0].views)))
    return HostBatch(
        views,
        torch.cat([p.positions for p in parts]),
        torch.cat([p.ids for p in parts]),
        [bad for part in parts for bad in part.bad],
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores, on purpose
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(small_shards: Path, workers: int) -> None:
    plain = list(loader(batches(small_shards), range(3, 16), 0, False))
    assert all(
        same(a, b) for a, b in zip(plain, loader(batches(small_shards), range(3, 16), workers, False), strict=True)
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 50), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]))
def test_ranks_and_accumulation_change_nothing(small_shards: Path, step: int, world: int, accumulate: int) -> None:
    whole = batches(small_shards)[step]
    parts = [
        batches(small_shards, 12, rank, world, accumulate)[step * accumulate + micro]
        for rank in range(world)
        for micro in range(accumulate)
    ]
    assert same(whole, joined(parts))


def test_a_batch_is_what_the_order_says(small_shards: Path) -> None:
    shards = Shards(str(small_shards))
    batch = batches(small_shards)[11]  # positions 132..143, in the second epoch
    assert batch.ids.tolist() == sample_ids(np.arange(132, 144), 120, 4).tolist()
    for slot, (position, sample) in enumerate(zip(batch.positions.tolist(), batch.ids.tolist(), strict=True)):
        for maker, view in zip(MAKERS, batch.views, strict=True):
            alone = maker(decode(shards.read(sample), 1), maker.draws(np.array([position]))[0])
            assert np.array_equal(view[slot].numpy(), alone)
    assert not torch.equal(batch.views[0], batch.views[1])


def test_one_epoch_is_every_sample_once(small_shards: Path) -> None:
    ids = torch.cat([batch.ids for batch in loader(batches(small_shards), range(10), 0, False)])
    assert sorted(ids.tolist()) == list(range(120))


def test_a_bad_sample_gives_way_to_the_same_substitute_everywhere(tmp_path: Path) -> None:
    write_shards(iter(pictures(40)), tmp_path, "s")
    shards = Shards(str(tmp_path))
    clean = joined(list(loader(batches(tmp_path), range(10), 0, False)))
    raw = bytearray(shards.paths[0].read_bytes())
    raw[int(shards._locate(7)[1]["offset"]) + 30] ^= 1
    shards.paths[0].write_bytes(raw)
    first = joined(list(loader(batches(tmp_path), range(10), 0, False)))
    assert same(first, joined(list(loader(batches(tmp_path), range(10), 2, False))))
    assert same(first, joined([batches(tmp_path, 12, rank, 2)[step] for step in range(10) for rank in (0, 1)]))
    assert {sample for _, sample, _ in first.bad} == {7}
    assert all("not those that were indexed" in reason for _, _, reason in first.bad)
    assert 7 not in first.ids
    assert len(set(first.ids[clean.ids == 7].tolist())) > 1  # a function of the position: not one sample for all epochs
    untouched = clean.ids != 7
    assert torch.equal(first.ids[untouched], clean.ids[untouched])
    assert torch.equal(first.views[0][untouched], clean.views[0][untouched])


def test_all_bad_is_an_error(tmp_path: Path) -> None:
    write_shards(iter(pictures(4)), tmp_path, "s")
    shards = Shards(str(tmp_path))
    shards.paths[0].write_bytes(bytes(shards.paths[0].stat().st_size))
    with pytest.raises(DataError, match="17 samples in a row are bad"):
        batches(tmp_path, 4)[0]
    with pytest.raises(DataError, match="17 samples in a row are bad"):
        list(loader(batches(tmp_path, 4), range(2), 1, False))


def test_normalisation_and_draws() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    expected = [
        (float(v) / 255 - m) / s
        for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)])
        for v in pixels[0, c].flatten()
    ]
    assert torch.allclose(normalize(pixels, mean, std).flatten(), torch.tensor(expected))
    host = HostBatch((pixels.repeat(2, 1, 1, 1),), torch.tensor([5, 9]), torch.tensor([0, 1]), [])
    batch = to_device(host, torch.device("cpu"), mean, std, seed=1)
    alone = to_device(host._replace(positions=torch.tensor([9, 5])), torch.device("cpu"), mean, std, seed=1)
    assert torch.equal(batch.uniform("mask", 7), alone.uniform("mask", 7).flip(0))
    assert not torch.equal(batch.uniform("mask", 7), batch.uniform("other", 7))
