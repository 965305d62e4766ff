"""Shards that are damaged, missing, replaced or odd: refused or read rightly, at the start and in the middle of a run."""

import json
import os
import pickle
import random
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pictures
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tarforge import BLOCK, END, READ, REFUSED, A, B, cuts, header, member, pax, tar

from selfsight.data import tar as walk
from selfsight.data.build import write_shards
from selfsight.data.crops import ViewMaker
from selfsight.data.decode import BadSample, Form
from selfsight.data.feed import feed
from selfsight.data.index import build_index, index_path
from selfsight.data.loader import Bad, Batches, HostBatch
from selfsight.data.shards import ShardChanged, Shards
from selfsight.data.views import View
from selfsight.errors import DataError, DataGone
from selfsight.quarantine import Quarantine, replaced


def forge(folder: Path, body: bytes, name: str = "x.tar") -> Path:
    path = folder / name
    path.write_bytes(body)
    return path


def indexed(folder: Path, body: bytes, name: str = "x.tar") -> Shards:
    shard = forge(folder, body, name)
    build_index(shard)
    return Shards(str(shard))


def batches(shards: Shards, batch_size: int = 4, rank: int = 0, world: int = 1) -> Batches:
    return Batches(shards, (ViewMaker(View(), 0, 4, "bicubic", 0),), 0, Form(1), batch_size, rank, world)


# -- containers


@pytest.mark.parametrize("case", REFUSED)
def test_a_defective_tar_is_refused_by_name(tmp_path: Path, case: str) -> None:
    body, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"(?s)x\.tar: .*{message}"):
        build_index(forge(tmp_path, body))
    assert os.listdir(tmp_path) == ["x.tar"]


@pytest.mark.parametrize("case", READ)
def test_an_odd_tar_is_read_rightly(tmp_path: Path, case: str) -> None:
    body, expected = READ[case]
    shards = indexed(tmp_path, body)
    assert [(shards.read(i), int(shards.labels[i])) for i in range(len(shards))] == expected


def test_a_shard_cut_at_any_block_is_refused_at_the_start(tmp_path: Path) -> None:
    raw = READ["interleaved"][0]
    shard = forge(tmp_path, raw)
    for cut in cuts(raw):
        shard.write_bytes(cut)
        with pytest.raises(DataError, match=r"x\.tar: (cut off|the member at byte)"):
            build_index(shard)
    shard.write_bytes(raw)
    build_index(shard)
    for cut in cuts(raw):
        shard.write_bytes(cut)
        with pytest.raises(DataError, match=r"x\.tar\.idx: is stale"):
            Shards(str(shard))


def test_any_flipped_header_bit_is_found_or_harmless() -> None:
    raw = bytearray(tar(pax(b"path", b"c.png"), A))
    expected = list(walk.members(memoryview(bytes(raw)), "x"))
    harmless = 0
    for bit in [*range(8 * BLOCK), *range(16 * BLOCK, 24 * BLOCK)]:  # of the two headers
        at = bit // 8
        raw[at] ^= 1 << bit % 8
        try:
            found = list(walk.members(memoryview(bytes(raw)), "x"))
            assert found == expected
            harmless += 1
        except DataError:
            pass
        raw[at] ^= 1 << bit % 8
    assert harmless < 20  # blanks beside the checksum's digits


FIELDS = st.one_of(
    st.integers(0, 2000).map(lambda n: b"%011o\0" % n),
    st.binary(min_size=12, max_size=12),
    st.integers(-(2**94), 2**94).map(lambda n: (n % 2**96).to_bytes(12, "big")),
)
KINDS = st.sampled_from([bytes([kind]) for kind in b"0000\x007xxLKg5S12346Z"])
BODIES = st.one_of(
    st.binary(max_size=1200),
    st.builds(
        lambda n, k, v: b"%d %s=%s\n" % (n, k, v),
        st.integers(0, 40),
        st.sampled_from([b"path", b"size"]),
        st.binary(max_size=9),
    ),
    st.integers(0, 10**6).map(lambda n: pax(b"size", b"%d" % n)[BLOCK:]),
)
PARTS = st.lists(
    st.one_of(
        st.builds(lambda name, field, kind, body: member(name, body, kind, field), st.binary(max_size=100), FIELDS, KINDS, BODIES),
        st.builds(lambda name, kind, body: member(name, body, kind), st.binary(max_size=100), KINDS, BODIES),
        st.binary(max_size=700),
    ),
    max_size=8,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(PARTS, st.sampled_from([b"", END, bytes(BLOCK)]))
@example([header(b"a", 0, b"5")] * 50, END)
@example([pax(b"size", b"0"), A], END)
def test_the_walk_ends_within_the_file_whatever_the_bytes(parts: list[bytes], end: bytes) -> None:
    raw = b"".join(parts) + end
    steps, last, check = 0, -1, walk._check_header

    def counted(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        check(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "_check_header", counted)
        try:
            for found in walk.members(memoryview(raw), "x"):
                assert last < found.offset
                assert found.size >= 0
                assert found.offset + found.size <= len(raw)
                last = found.offset
        except DataError as error:
            assert str(error).startswith("x: ")
            assert "\n" not in str(error)
    assert steps <= len(raw) / BLOCK


WRITES: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    changes = event in {"os.mkdir", "os.symlink", "os.link", "os.remove", "os.rename", "os.chmod"}
    if WRITES is not None and (changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):
        WRITES.append(str(arguments[0]))


def test_names_are_labels_and_nothing_is_extracted(tmp_path: Path) -> None:
    global WRITES
    sys.addaudithook(_note)
    (tmp_path / "in").mkdir()
    shard = forge(tmp_path / "in", READ["a way out"][0])
    WRITES = []
    try:
        shards = indexed(tmp_path / "in", READ["a way out"][0])
        assert shards.read(0) == b"1"
        with pytest.raises(DataError):
            indexed(tmp_path / "in", REFUSED["a symbolic link"][0], "y.tar")
    finally:
        written, WRITES = WRITES, None
    assert len(written) >= 3
    assert all(Path(path).is_relative_to(tmp_path / "in") for path in written)
    assert sorted(os.listdir(tmp_path / "in")) == ["x.tar", "x.tar.idx", "y.tar"]
    assert os.listdir(tmp_path) == ["in"]
    assert shard.stat().st_nlink == 1


def test_empty_samples_are_left_out_when_asked_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = forge(tmp_path, tar(A, member(b"b.png", b""), member(b"c.cls", b"1"), member(b"d.png", b""), B[:0]))
    with pytest.raises(DataError, match="2 of 4 samples have an image of zero bytes, first 'b'; 1 of 4 samples have no image, first 'c'; leave them out"):  # fmt: skip
        build_index(shard)
    assert len(build_index(shard, missing="exclude")) == 1
    said = capsys.readouterr().err
    assert "2 of 4 samples have an image of zero bytes, first 'b'" in said
    assert said.endswith("left out\n")
    assert Shards(str(shard)).read(0) == b"image A"


# -- many shards, few shards, one


def test_the_order_of_a_listing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(iter(pictures(12)), tmp_path, "s", per_shard=2)
    first = [Shards(str(tmp_path)), Shards(f"{tmp_path}/s-*.tar")]
    real_scan, real_list = os.scandir, os.listdir

    class Shuffled(list[Any]):
        def __enter__(self) -> "Shuffled":
            return self

        def __exit__(self, *_: object) -> None: ...

    def shuffled(found: Any) -> Shuffled:
        made = Shuffled(found)
        random.Random(5).shuffle(made)
        return made

    monkeypatch.setattr(os, "scandir", lambda *a: shuffled(real_scan(*a)))
    monkeypatch.setattr(os, "listdir", lambda *a: shuffled(real_list(*a)))
    for before, spec in zip(first, (str(tmp_path), f"{tmp_path}/s-*.tar"), strict=True):
        again = Shards(spec)
        assert again.paths == before.paths == sorted(before.paths)
        assert again.id == before.id


def test_one_sample_is_a_set(tmp_path: Path) -> None:
    write_shards(iter(pictures(1)), tmp_path, "s")
    made = batches(Shards(str(tmp_path)), batch_size=1)
    assert [made[number].ids.tolist() for number in range(3)] == [[0]] * 3
    assert made[0].bad == []


def test_fewer_shards_than_ranks_and_workers(tmp_path: Path) -> None:
    write_shards(iter(pictures(16)), tmp_path, "s")
    shards = Shards(str(tmp_path))
    ids = [batches(shards, 4, rank, 4)[step].ids.tolist() for step in range(4) for rank in range(4)]
    assert all(len(one) == 1 for one in ids)
    assert sorted(one[0] for one in ids) == list(range(16))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([1, 2, 4]))
def test_uneven_shards_are_each_sample_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], world: int
) -> None:
    folder, total = tmp_path_factory.mktemp("uneven"), sum(counts)
    for shard, count in enumerate(counts):
        parts = [member(b"%d.ppm" % i, b"P5 1 1 255\n%c" % (16 * shard + i)) for i in range(count)]
        build_index(forge(folder, tar(*parts), f"{shard}.tar"))
    ranks = [batches(Shards(str(folder)), world, rank, world) for rank in range(world)]
    made = [rank[step] for step in range(total) for rank in ranks]  # so many epochs as ranks
    grey = {i: 16 * s + k for i, (s, k) in enumerate((s, k) for s, n in enumerate(counts) for k in range(n))}
    assert all((host.views[0] == grey[int(host.ids)]).all() for host in made)
    seen = [int(host.ids) for host in sorted(made, key=lambda host: int(host.positions))]
    for epoch in range(world):
        assert sorted(seen[epoch * total : (epoch + 1) * total]) == list(range(total))


def test_an_empty_shard_among_others_is_refused(tmp_path: Path) -> None:
    indexed(tmp_path, tar(A), "a.tar")
    with pytest.raises(DataError, match=r"b\.tar: holds no image"):
        indexed(tmp_path, tar(), "b.tar")
    with pytest.raises(DataError, match=r"b\.tar: has no index"):
        Shards(str(tmp_path))


def test_an_unreadable_shard_at_the_start_is_a_data_error(tmp_path: Path) -> None:
    shard = tmp_path / "x.tar"
    indexed(tmp_path, tar(A))
    index_path(shard).unlink()
    index_path(shard).mkdir()
    with pytest.raises(DataError, match=r"x\.tar\.idx: is not a file"):
        Shards(str(shard))


# -- in the middle of a run


@pytest.fixture
def running(tmp_path: Path) -> Shards:
    """Shards of a run that has begun, with little patience."""
    write_shards(iter(pictures(8)), tmp_path, "s", per_shard=4)
    shards = Shards(str(tmp_path))
    shards.patience = 0.2
    return shards


def test_a_shard_that_is_gone_is_waited_for_and_then_said(running: Shards) -> None:
    path = running.paths[1]
    body = running.read(5)
    path.rename(path.with_suffix(".away"))
    assert running.read(5) == body  # still open
    running.close()
    assert running.read(0)
    with pytest.raises(DataGone, match=r"s-000001.tar: the data cannot be reached any more \(No such file.*0.2 s.*run the same command") as gone:  # fmt: skip
        running.read(5)
    assert not isinstance(gone.value, DataError)
    assert gone.value.exit_code == 75
    running.patience = 20
    threading.Timer(0.1, path.with_suffix(".away").rename, [path]).start()
    assert running.read(5) == body


def test_passing_faults_are_waited_out_with_files_opened_anew(running: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    body, real, faults = running.read(0), os.pread, [5, 116, 5]
    opened: list[Path] = []
    real_open = os.open

    def failing(*arguments: Any) -> bytes:
        if faults:
            raise OSError(faults.pop(), "away")
        return real(*arguments)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(path) or real_open(path, *a, **k))
    running.patience = 20
    assert running.read(0) == body
    assert faults == []
    assert opened == [running.paths[0]] * 3
    monkeypatch.setattr(os, "pread", lambda *a: failing(faults.append(5)))
    running.patience = 0.1
    with pytest.raises(DataGone, match=r"\(away, for 0.1 s\)"):
        running.read(0)


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("change", ["replaced", "rewritten", "cut", "grown"])
def test_a_shard_that_changed_ends_the_run(running: Shards, change: str, opened: bool) -> None:
    path = running.paths[0]
    raw = path.read_bytes()
    if opened:
        assert running.read(0)
    if change == "replaced":  # another file of the same size: what is open stays the old one
        running.close()
        other = path.with_suffix(".new")
        other.write_bytes(raw[:700] + bytes(len(raw) - 700))
        os.utime(other, ns=(0, path.stat().st_mtime_ns))
        other.replace(path)
    elif change == "rewritten":
        path.write_bytes(raw[:700] + bytes(len(raw) - 700))
    elif change == "cut":
        os.truncate(path, len(raw) // 2)
    else:
        path.write_bytes(tar(A) + raw)
    with pytest.raises(ShardChanged, match=r"s-000000.tar: is another file than when the run started") as changed:
        running.read(3)
    assert not isinstance(changed.value, BadSample)
    assert changed.value.exit_code == 65
    with pytest.raises(ShardChanged):
        batches(running, 8)[0]
    assert running.read(5)


def test_a_shard_that_only_grew_is_another_where_it_is_opened(running: Shards) -> None:
    with running.paths[0].open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ShardChanged):
        running.read(0)


def test_a_shard_put_back_or_touched_is_the_same(running: Shards) -> None:
    path, body = running.paths[0], running.read(2)
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").replace(path)
    running.close()
    assert running.read(2) == body
    os.utime(path)
    assert running.read(2) == body


def test_a_thousand_flipped_bits_are_all_found_and_none_blamed_on_the_shard(running: Shards) -> None:
    path, rng = running.paths[0], np.random.default_rng(0)
    before, raw = path.stat(), bytearray(path.read_bytes())
    places = [(i, int(running._locate(i)[1]["offset"]), int(running._locate(i)[1]["size"])) for i in range(4)]
    bodies = [running.read(i) for i in range(4)]
    with path.open("r+b") as file:
        for _ in range(1000):
            sample, offset, size = places[rng.integers(4)]
            at, bit = offset + int(rng.integers(size)), 1 << int(rng.integers(8))
            os.pwrite(file.fileno(), bytes([raw[at] ^ bit]), at)
            os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))  # rot leaves no trace
            with pytest.raises(BadSample, match=rf"s-000000.tar@{offset}: the bytes are not those that were indexed"):
                running.read(sample)
            os.pwrite(file.fileno(), bytes([raw[at]]), at)
    assert [running.read(i) for i in range(4)] == bodies


def test_a_fault_that_passes_at_the_second_read_is_none(running: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    body, real, rotten = running.read(1), os.pread, [True]
    monkeypatch.setattr(os, "pread", lambda *a: bytes(len(body)) if rotten and rotten.pop() else real(*a))
    assert running.read(1) == body
    assert not rotten


def test_a_worker_that_starts_late_finds_the_same_shards_or_says_so(running: Shards) -> None:
    sent = pickle.dumps(running)
    path = running.paths[0]
    aside = path.with_suffix(".away")
    path.rename(aside)
    late = pickle.loads(sent)  # noqa: S301 - as a loader worker gets it; nothing is opened yet
    with pytest.raises(DataGone, match=r"s-000000.tar: the data cannot be reached"):
        late.read(7)
    aside.rename(path)
    assert late.read(7) == running.read(7)
    shutil.copy(running.paths[1], path)  # same size, other images, indexed anew
    assert path.stat().st_size == running.paths[1].stat().st_size
    build_index(path)
    with pytest.raises(ShardChanged):
        pickle.loads(sent).read(7)  # noqa: S301


def test_what_ends_a_run_comes_out_of_a_worker_as_it_is(running: Shards) -> None:
    made = batches(running, 8)
    away = running.paths[0].with_suffix(".away")
    running.paths[0].rename(away)
    with pytest.raises(DataGone) as gone:
        next(feed(made, range(1), 1, False))
    assert gone.value.told.startswith(f"{running.paths[0]}: the data cannot be reached any more")
    assert "\n" not in gone.value.told


# -- the record of bad samples


def rotten_batch(samples: list[int], reason: str = "damaged image", size: int = 4, shard: str = "s-0.tar") -> HostBatch:
    none = torch.zeros(size, dtype=torch.int64)
    bad = [Bad(100 + i, sample, reason, f"{shard}@{512 * sample}") for i, sample in enumerate(samples)]
    return HostBatch((), none, none, none, bad)


def test_the_record_says_where_each_bad_sample_lies(tmp_path: Path) -> None:
    parts = [member(b"%d.png" % i, b"<html>" if i == 2 else b"\x89PNG rest") for i in range(4)]
    shards = indexed(tmp_path, tar(*parts))
    made = batches(shards, 4)
    with pytest.raises(DataError, match=r"17 samples in a row are bad, last: x.tar@\d+: (not an|damaged) image"):
        made[0]
    quarantine = Quarantine(tmp_path, 3)
    quarantine.record(rotten_batch([2, 2, 1]))
    quarantine.record(rotten_batch([1, 0]))
    lines = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert [(line["sample"], line["position"], line["where"]) for line in lines] == [
        (2, 100, "s-0.tar@1024"),
        (1, 102, "s-0.tar@512"),
        (0, 101, "s-0.tar@0"),
    ]
    assert {(line["rank"], line["reason"]) for line in lines} == {(3, "damaged image")}


def test_a_bad_sample_is_described_by_shard_and_offset(tmp_path: Path) -> None:
    write_shards(iter(pictures(12)), tmp_path, "s", per_shard=6)
    path = Shards(str(tmp_path)).paths[1]
    offset = int(Shards(str(tmp_path))._locate(7)[1]["offset"])
    raw = bytearray(path.read_bytes())
    raw[offset + 20] ^= 1
    path.write_bytes(raw)
    found = batches(Shards(str(tmp_path)), 12)[0].bad
    assert [(bad.sample, bad.where) for bad in found] == [(7, f"s-000001.tar@{offset}")]
    assert found[0].reason == "the bytes are not those that were indexed (CRC)"


def test_the_budget_says_reasons_and_shards(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, 0)
    quarantine.record(rotten_batch([1, 2, 3, 4], "not an image of a known format (starts with b'<html>')"))
    quarantine.record(rotten_batch([5, 6], "not an image of a known format (starts with b'%PDF')", shard="s-1.tar"))
    quarantine.record(
        rotten_batch([7], "image of 9 x 9,000 pixels, more than the 50 that are decoded", shard="s-2.tar")
    )
    quarantine.record(rotten_batch([8, 9], "damaged image (cut at 7)", shard="s-3.tar"))
    quarantine.record(rotten_batch([10], "odd", shard="s-4.tar"))
    with pytest.raises(DataError) as over:
        quarantine.record(rotten_batch([11], "damaged image (cut at 15)", shard="s-3.tar"))
    said = str(over.value)
    assert said.startswith("11 bad samples among 24 read; reasons: not an image of a known format (starts with ...) (6), damaged image (cut at N) (3), ")  # fmt: skip
    assert "and 1 more; shards: s-0.tar (4), s-3.tar (3), s-1.tar (2) and 2 more; all are in" in said
    assert said.endswith("quarantine.jsonl; look closer with: selfsight shards check")
    assert "\n" not in said


def test_the_budget_is_a_share_and_at_least_ten(tmp_path: Path) -> None:
    lenient = Quarantine(tmp_path, 0, share=0.5)
    lenient.record(rotten_batch(list(range(20)), size=40))
    with pytest.raises(DataError, match="21 bad samples among 41 read"):
        lenient.record(rotten_batch([20], size=1))
    strict = Quarantine(tmp_path, 0, share=0.0)
    strict.record(rotten_batch(list(range(10))))
    strict.record(rotten_batch(list(range(10))))  # known: not counted again
    with pytest.raises(DataError, match="11 bad"):
        strict.record(rotten_batch([10]))
    usual = Quarantine(tmp_path, 0)
    usual.record(rotten_batch(list(range(12)), size=12_000))
    with pytest.raises(DataError, match="13 bad samples among 12,001"):
        usual.record(rotten_batch([12], size=1))


def test_a_full_disk_is_said_once_and_the_count_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quarantine.jsonl").symlink_to("/dev/full")
    quarantine = Quarantine(tmp_path, 0)
    for sample in range(10):
        quarantine.record(rotten_batch([sample]))
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device)") == 1
    with pytest.raises(DataError, match="11 bad samples"):
        quarantine.record(rotten_batch([10]))


def test_what_was_replaced_is_told_in_the_end(tmp_path: Path) -> None:
    assert replaced(tmp_path) == ""
    lines = [{"sample": s, "reason": f"has {s} channels; the encoder takes 1"} for s in (3, 4, 4, 5)]
    lines.append({"sample": 9, "reason": "not an image of a known format (starts with b'x')"})
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = replaced(tmp_path)
    assert told.startswith(
        "4 samples could not be used and were replaced: has N channels; the encoder takes N (3), not an image"
    )
