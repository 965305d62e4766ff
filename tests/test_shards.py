"""Indexes and reading by number."""

import gc
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import pictures
from test_tar import make_tar

from selfsight.data import index
from selfsight.data.build import write_shards
from selfsight.data.index import HEADER, RECORD, build_index, read_index
from selfsight.data.shards import Shards, find_shards
from selfsight.errors import DataError, UsageError

PNG = b"\x89PNG\r\n\x1a\nnot decoded here"


def forge(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.write_bytes(make_tar(files))
    return path


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_samples_are_webdatasets_own(small_shards: Path) -> None:
    shards = Shards(str(small_shards))
    urls = [str(path) for path in shards.paths]
    theirs = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(shards) == len(theirs) == 120
    assert [shards.read(i) for i in range(120)] == [sample["png"] for sample in theirs]
    assert shards.labels.tolist() == [int(sample["cls"]) for sample in theirs]
    gc.collect()  # webdataset leaves its files to the collector


def test_a_sample_is_one_pread(small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, calls, real = Shards(str(small_shards)), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *a: calls.append(a) or real(*a))
    for i in (0, 77, 119):
        shards.read(i)
    assert len(calls) == 3


def test_records_have_32_bytes() -> None:
    assert (RECORD.itemsize, HEADER.itemsize) == (32, 64)


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.data.shards.OPEN_FILES", 2)
    write_shards(iter(pictures(12)), tmp_path, "s", per_shard=2)
    shards = Shards(str(tmp_path))
    assert [shards.read(i) for i in range(12)] == [shards.read(i) for i in reversed(range(12))][::-1]
    assert len(shards._files) == 2
    again = pickle.loads(pickle.dumps(shards))  # noqa: S301 - as a loader worker gets it
    assert again.read(5) == shards.read(5)


def test_specs(small_shards: Path, tmp_path: Path) -> None:
    names = [path.name for path in find_shards(str(small_shards))]
    assert names == ["small-000000.tar", "small-000001.tar", "small-000002.tar"]
    assert [p.name for p in find_shards(f"{small_shards}/small-00000{{2,0}}.tar")] == [names[2], names[0]]
    assert [p.name for p in find_shards(f"{small_shards}/small-{{000000..000001}}.tar")] == names[:2]
    assert [p.name for p in find_shards(f"{small_shards}/*1.tar")] == names[1:2]
    assert [p.name for p in find_shards([f"{small_shards}/*2.tar", f"{small_shards}/*0.tar"])] == [names[2], names[0]]
    assert len(Shards("digits:train")) == 1438
    assert len(Shards("digits:test")) == 359
    with pytest.raises(DataError, match="no shards match"):
        find_shards(f"{small_shards}/none-*.tar")
    with pytest.raises(DataError, match=r"2 of 3 shards are missing: .*x-1.tar, .*x-2.tar"):
        find_shards([f"{small_shards}/small-000000.tar", f"{tmp_path}/x-{{1..2}}.tar"])
    with pytest.raises(DataError, match="no shards here"):
        find_shards(str(tmp_path))
    (tmp_path / "cat.jpg").touch()
    with pytest.raises(DataError, match="selfsight shards build"):
        find_shards(str(tmp_path))
    assert find_shards(f"file://{small_shards}/small-000001.tar") == find_shards(f"{small_shards}/small-000001.tar")
    with pytest.raises(
        UsageError,
        match=r"s4://bucket/x.tar: s4: is not read \(did you mean s3\?\); shards are local paths or http://",
    ):
        find_shards("s4://bucket/x.tar?secret=1")
    with pytest.raises(UsageError, match="pipe: is not read; shards are"):
        find_shards("pipe:cat x.tar")
    with pytest.raises(UsageError, match="train and test"):
        find_shards("digits:val")
    with pytest.raises(DataError, match="same shard twice"):
        find_shards([f"{small_shards}/*0.tar", f"{small_shards}/small-000000.tar"])


def test_no_index_and_stale_index(tmp_path: Path) -> None:
    shard = forge(tmp_path / "x.tar", [("a.png", PNG)])
    with pytest.raises(DataError, match="has no index; make it with: selfsight shards index"):
        Shards(str(shard))
    build_index(shard)
    assert len(Shards(str(shard))) == 1
    forge(shard, [("a.png", PNG), ("b.png", PNG * 600)])
    with pytest.raises(DataError, match="is stale"):
        Shards(str(shard))


def test_every_flipped_byte_of_an_index_is_found(tmp_path: Path) -> None:
    shard = forge(tmp_path / "x.tar", [("a.png", PNG), ("b.png", PNG)])
    build_index(shard)
    path = index.index_path(shard)
    raw = path.read_bytes()
    for i in range(len(raw)):
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
        with pytest.raises(DataError):
            read_index(shard)
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        with pytest.raises(DataError):
            read_index(shard)


def test_bit_rot_in_a_sample_is_found(tmp_path: Path) -> None:
    write_shards(iter(pictures(3)), tmp_path, "s")
    shards = Shards(str(tmp_path))
    _, record = shards._locate(1)
    raw = bytearray(shards.paths[0].read_bytes())
    raw[int(record["offset"]) + 20] ^= 1
    shards.paths[0].write_bytes(raw)
    shards = Shards(str(tmp_path))
    assert shards.read(0)
    with pytest.raises(DataError, match=r"s-000000.tar@\d+: the bytes are not those that were indexed"):
        shards.read(1)


def test_the_data_id_is_of_contents_and_not_of_places(small_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(small_shards, tmp_path / "elsewhere")
    shards = Shards(str(small_shards))
    assert Shards(str(tmp_path / "elsewhere")).id == shards.id
    assert Shards([str(path) for path in reversed(shards.paths)]).id != shards.id


def test_an_index_of_a_read_only_folder_goes_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = forge(tmp_path / "x.tar", [("a.png", PNG)])
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    build_index(shard)
    assert not shard.with_name("x.tar.idx").exists()
    assert np.array_equal(Shards(str(shard)).labels, [-1])
