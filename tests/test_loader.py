"""The same global batches, tensors included, for any number of workers and ranks and from any start.

Mutations that these tests caught when they were tried: augmentations counted on for ever, or numbered otherwise; crops,
shifts, substitutes or colours drawn by position or sample and not by key; one colour for all views; a shift of 1 for any;
no neighbour, its fault under another position or not recorded; a last batch of rows left out, or too long; rows shifted;
mean added, multiplied by std, 256 for 255; positions and keys exchanged; a neighbour before in place of after, of another
clip or shard, or numbered within its shard.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfsight import keyed
from selfsight.data.build import write_shards
from selfsight.data.colour import DRAWS, change_colour
from selfsight.data.crops import ViewMaker
from selfsight.data.decode import Form, decode
from selfsight.data.loader import ROWS, Batches, HostBatch, Rows, loader
from selfsight.data.order import sample_ids
from selfsight.data.placer import Placer, normalize
from selfsight.data.shards import Shards
from selfsight.data.views import View
from selfsight.errors import DataError

MAKERS = tuple(ViewMaker(View(), number, 6, "bicubic", seed=4) for number in (0, 1))


def batches(
    folder: Path,
    batch_size: int = 12,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    augmentations: int | None = None,
    makers: tuple[ViewMaker, ...] = MAKERS,
) -> Batches:
    return Batches(Shards(str(folder)), makers, 4, Form(1), batch_size, rank, world, accumulate, augmentations)


def same(a: HostBatch, b: HostBatch) -> bool:
    tensors = zip((*a.views, a.positions, a.keys, a.ids), (*b.views, b.positions, b.keys, b.ids), strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and a.bad == b.bad


def joined(parts: list[HostBatch]) -> HostBatch:
    views = tuple(torch.cat([part.views[v] for part in parts]) for v in range(len(parts[0].views)))
    return HostBatch(
        views,
        torch.cat([p.positions for p in parts]),
        torch.cat([p.keys for p in parts]),
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
        for micro in range(accumulate)
        for rank in range(world)
    ]
    assert same(whole, joined(parts))


def test_a_batch_is_what_the_order_says(small_shards: Path) -> None:
    shards = Shards(str(small_shards))
    batch = batches(small_shards)[11]  # positions 132..143, in the second epoch
    assert batch.positions.tolist() == batch.keys.tolist() == list(range(132, 144))
    assert batch.ids.tolist() == sample_ids(np.arange(132, 144), 120, 4).tolist()
    for slot, (position, sample) in enumerate(zip(batch.positions.tolist(), batch.ids.tolist(), strict=True)):
        for maker, view in zip(MAKERS, batch.views, strict=True):
            alone = maker(decode(shards.read(sample), Form(1)), maker.draws(np.array([position]))[0])
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
    assert {sample for _, sample, _, _ in first.bad} == {7}
    assert all("not those that were indexed" in reason for _, _, reason, _ in first.bad)
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


def test_normalisation() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    expected = [
        (float(v) / 255 - m) / s
        for c, (m, s) in enumerate([(0.1, 0.5), (0.2, 0.6), (0.3, 0.7)])
        for v in pixels[0, c].flatten()
    ]
    assert torch.allclose(normalize(pixels, mean, std).flatten(), torch.tensor(expected))


# -- a fixed number of augmentations


@pytest.mark.parametrize(("world", "accumulate"), [pytest.param(1, 1, marks=pytest.mark.slow), (2, 2)])
def test_augmentations_come_in_turn(tmp_path: Path, world: int, accumulate: int) -> None:
    """Sample by sample: in epochs e and e + K the same pixels, in those between others."""
    write_shards(iter(pictures(20, size=(40, 40))), tmp_path, "s")
    count, epochs = 3, 5
    parts = [
        batches(tmp_path, 4, rank, world, accumulate, count)[step * accumulate + micro]
        for step in range(5 * epochs)
        for rank in range(world)
        for micro in range(accumulate)
    ]
    everything = joined(parts)
    seen: dict[int, dict[int, Any]] = {}
    for slot, position in enumerate(everything.positions.tolist()):
        epoch, sample = position // 20, int(everything.ids[slot])
        assert everything.keys[slot] == (epoch % count) * 20 + sample
        seen.setdefault(sample, {})[epoch] = tuple(view[slot] for view in everything.views)
    assert sorted(seen) == list(range(20))
    for by_epoch in seen.values():
        assert sorted(by_epoch) == list(range(epochs))
        for one in range(epochs):
            for other in range(one):
                for a, b in zip(by_epoch[one], by_epoch[other], strict=True):
                    assert torch.equal(a, b) == ((one - other) % count == 0)


def test_rows_are_every_augmentation_of_every_sample_once_and_those_of_the_batches(tmp_path: Path) -> None:
    write_shards(iter(pictures(60)), tmp_path, "s")
    made = batches(tmp_path, 12, augmentations=5)
    rows = Rows(made, 5 * 60)
    assert (len(rows), ROWS) == (2, 256)
    assert len(Rows(made, 256)) == 1
    parts = list(loader(rows, range(len(rows)), 0, False))
    assert [len(part.ids) for part in parts] == [256, 44]
    everything = joined(parts)
    assert everything.keys.tolist() == everything.positions.tolist() == list(range(300))
    assert everything.ids.tolist() == list(range(60)) * 5
    for batch in (made[2], made[13], made[24], made[26]):  # epochs 0, 2, 4 and 5, which is 0 again
        assert torch.equal(everything.ids[batch.keys], batch.ids)
        for view, expected in zip(batch.views, everything.views, strict=True):
            assert torch.equal(view, expected[batch.keys])


def test_a_substitute_belongs_to_the_augmentation(tmp_path: Path) -> None:
    """A stored teacher has seen the substitute of the same row: it must be the same in every epoch, and in `Rows`."""
    write_shards(iter(pictures(40)), tmp_path, "s")
    damage(Shards(str(tmp_path)), 7)
    made = batches(tmp_path, 4, augmentations=2)
    everything = joined([made[number] for number in range(60)])  # six epochs
    rows = joined([Rows(made, 80)[0]])
    replaced = [slot for slot, key in enumerate(everything.keys.tolist()) if key % 40 == 7]
    assert len(replaced) == 6
    for slot in replaced:
        key = int(everything.keys[slot])
        assert everything.ids[slot] == rows.ids[key] != 7
        assert torch.equal(everything.views[0][slot], rows.views[0][key])
    assert sorted(position for position, _, _, _ in everything.bad) == sorted(everything.positions[replaced].tolist())
    assert {(position, sample) for position, sample, _, _ in rows.bad} == {(7, 7), (47, 7)}
    assert rows.ids[7] != rows.ids[47]


def damage(shards: Shards, sample: int) -> None:
    raw = bytearray(shards.paths[0].read_bytes())
    raw[int(shards._locate(sample)[1]["offset"]) + 30] ^= 1
    shards.paths[0].write_bytes(raw)


# -- neighbours

LABELS = [0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 3, 3, 3, 3, 3, 4]  # in shards of 7, 7 and 2


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    frames = pictures(len(LABELS), size=(6, 6))
    write_shards(((image, label) for (image, _), label in zip(frames, LABELS, strict=True)), tmp_path, "c", per_shard=7)
    return tmp_path


def test_neighbours_lie_in_the_same_shard_and_clip(clips: Path) -> None:
    shards = Shards(str(clips))
    assert len(shards.paths) == 3
    assert shards.labels.tolist() == LABELS
    found = {}
    for sample in range(16):
        for shift in range(1, 8):
            expected = sample
            for other in (sample - shift, sample + shift):  # the later wins
                if 0 <= other < 16 and other // 7 == sample // 7 and LABELS[other] == LABELS[sample]:
                    expected = other
            found[sample, shift] = shards.neighbour(sample, shift)
            assert found[sample, shift] == expected, (sample, shift)
    assert all(type(other) is int for other in found.values())
    assert found[0, 1] == 1
    assert found[2, 1] == 1  # the end of the clip: the one before
    assert found[0, 6] == 6  # the label came back: still the same clip by label, in the same shard
    assert found[6, 1] == 6  # the next has the label but lies in another shard
    assert found[7, 1] == 8
    assert {found[5, shift] for shift in range(1, 8)} == {5}  # alone
    with pytest.raises(IndexError):
        shards.neighbour(16, 1)


def still(number: int, shift: int) -> ViewMaker:
    return ViewMaker(View(crop_scale=None, flip=0.0, shift=shift), number, 6, "bicubic", seed=4)


def test_a_view_with_shift_is_another_frame_of_the_clip(clips: Path) -> None:
    shards = Shards(str(clips))
    frames = [np.asarray(decode(shards.read(sample), Form(1))) for sample in range(16)]
    made = batches(clips, 4, makers=(still(0, 0), still(1, 3)))
    distances = set()
    for host in (made[number] for number in range(40)):
        assert host.bad == []
        shifts = made.makers[1].shifts(host.keys.numpy())
        for slot, (sample, shift) in enumerate(zip(host.ids.tolist(), shifts.tolist(), strict=True)):
            assert np.array_equal(host.views[0][slot].numpy(), frames[sample])
            other = shards.neighbour(sample, shift)
            assert np.array_equal(host.views[1][slot].numpy(), frames[other])
            assert abs(other - sample) <= 3
            assert LABELS[other] == LABELS[sample]
            distances.add(other - sample)
    assert distances == set(range(-3, 4))


def test_a_bad_neighbour_leaves_the_image_itself_and_is_recorded(clips: Path) -> None:
    shards = Shards(str(clips))
    frames = [np.asarray(decode(shards.read(sample), Form(1))) for sample in range(16)]
    damage(shards, 1)
    made = batches(clips, 4, makers=(still(0, 0), still(1, 1)))
    fell_back = 0
    for host in (made[number] for number in range(12)):
        for slot, (position, sample) in enumerate(zip(host.positions.tolist(), host.ids.tolist(), strict=True)):
            if shards.neighbour(sample, 1) == 1:
                reasons = [reason for at, other, reason, _ in host.bad if at == position and other == 1]
                assert reasons, "the bad neighbour is recorded"
                assert all("not those that were indexed" in reason for reason in reasons)
                assert np.array_equal(host.views[1][slot].numpy(), frames[sample])
                fell_back += 1
            assert np.array_equal(host.views[0][slot].numpy(), frames[sample])
    assert fell_back >= 6


def test_views_of_several_sizes(small_shards: Path) -> None:
    makers = tuple(ViewMaker(View(size=size), number, 6, "bicubic", 4) for number, size in enumerate((None, 4, 9)))
    host = batches(small_shards, makers=makers)[0]
    assert [tuple(view.shape) for view in host.views] == [(12, 1, 6, 6), (12, 1, 4, 4), (12, 1, 9, 9)]


# -- the device


MEAN, STD = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)


def host_batch(views: int = 1) -> HostBatch:
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    positions, keys = torch.tensor([5, 9, 40, 41, 42]), torch.tensor([3, 1, 4, 2, 0])
    return HostBatch((pixels,) * views, positions, keys, torch.arange(5), [])


def test_the_placer_normalises_and_passes_on_what_it_is_given() -> None:
    host, place = host_batch(2), Placer((View(), View()), MEAN, STD, seed=1)
    batch = place(host, 0.25)
    assert len(batch.views) == 2
    for pixels, view in zip(host.views, batch.views, strict=True):
        assert view.dtype == torch.float32
        assert torch.allclose(view, normalize(pixels, MEAN, STD))
    assert (batch.progress, batch.seed, batch.shared) == (0.25, 1, {})
    assert place(host).progress == 0
    assert batch.keys is host.keys
    assert batch.positions is host.positions


def test_draws_of_an_objective_follow_the_position() -> None:
    host, place = host_batch(), Placer((View(),), MEAN, STD, seed=1)
    batch = place(host)
    other = place(host._replace(positions=host.positions.flip(0), keys=host.keys + 7))
    assert torch.equal(batch.uniform("mask", 7), other.uniform("mask", 7).flip(0))
    assert not torch.equal(batch.uniform("mask", 7), batch.uniform("other", 7))
    assert batch.uniform("mask", 7).dtype == torch.float64


def test_the_placer_colours_by_key_and_by_view() -> None:
    view = View(jitter=0.7, grayscale=0.3, solarize=0.4)
    place, host = Placer((view, view, View()), MEAN, STD, seed=1), host_batch(3)
    batch = place(host)
    for number in (0, 1):
        draws = keyed.uniform(1, f"colour {number}", host.keys.numpy(), DRAWS)
        expected = (change_colour(host.views[0].float() / 255, view, draws) - MEAN) / STD
        assert torch.allclose(batch.views[number], expected, atol=1e-6)
    assert not torch.equal(batch.views[0], batch.views[1])
    assert torch.equal(batch.views[2], (host.views[2].float() / 255 - MEAN) / STD)
    moved = place(host._replace(positions=host.positions + 1000))  # another epoch with the same augmentation
    assert torch.equal(moved.views[0], batch.views[0])
    one = host._replace(
        views=tuple(pixels[2:3] for pixels in host.views), keys=host.keys[2:3], positions=host.positions[2:3]
    )
    assert torch.allclose(place(one).views[0], batch.views[0][2:3], atol=1e-6)
    assert not torch.equal(place(host._replace(keys=host.keys + 1)).views[0], batch.views[0])
    assert not torch.equal(Placer((view,) * 3, MEAN, STD, seed=2)(host).views[0], batch.views[0])
