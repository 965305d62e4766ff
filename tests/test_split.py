"""Training and test shards never share a group."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from test_samples import indexed
from test_tar import make_tar
from test_tiles import png

from selfsight import cli
from selfsight.data.index import build_index
from selfsight.data.packing import Sample, write_shards
from selfsight.data.shards import Shards
from selfsight.data.split import in_test, split
from selfsight.errors import DataError, UsageError


def source(folder: Path, groups: int = 30, each: int = 3) -> Shards:
    samples = [
        Sample(png(np.full((3, 4), i % 251, np.uint8)), i % 2, group, {"of": group})
        for i, group in enumerate(list(range(groups)) * each)
    ]
    folder.mkdir()
    write_shards(samples, folder, "s", per_shard=35)
    (folder / "groups.json").write_text('["a", "b"]')
    return Shards(str(folder))


def test_no_group_is_on_both_sides_and_nothing_is_lost(tmp_path: Path) -> None:
    whole = source(tmp_path / "src")
    halves = split(str(tmp_path / "src"), tmp_path / "train", tmp_path / "test", 0.3, seed=1)
    train, test = Shards(str(tmp_path / "train")), Shards(str(tmp_path / "test"))
    sides = set(train.groups.tolist()), set(test.groups.tolist())
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(30))
    assert [half[:2] for half in halves] == [(len(train), len(sides[0])), (len(test), len(sides[1]))]
    assert 3 <= len(sides[1]) <= 15
    bodies = [[shards.read(i) for i in range(len(shards))] for shards in (whole, train, test)]
    assert sorted(bodies[1] + bodies[2]) == sorted(bodies[0])
    chosen = in_test(whole.groups, 0.3, 1, ["a", "b"])
    assert bodies[2] == [body for body, side in zip(bodies[0], chosen, strict=True) if side]  # in their order
    assert np.array_equal(test.labels, whole.labels[chosen])
    assert (tmp_path / "test" / "groups.json").read_text() == '[\n "a",\n "b"\n]'


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_other_members_stay_with_their_sample(tmp_path: Path) -> None:
    source(tmp_path / "src", 8)
    split(str(tmp_path / "src"), tmp_path / "train", tmp_path / "test", 0.5)
    for side in ("train", "test"):
        urls = sorted(map(str, (tmp_path / side).glob("*.tar")))
        for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False):
            assert sample["json"] == b'{"of": %s}' % sample["group"]


def test_the_side_depends_on_seed_and_group_alone() -> None:
    groups = np.arange(4000, dtype=np.int32)
    chosen = in_test(groups, 0.1, 5)
    assert 330 < chosen.sum() < 470
    assert np.array_equal(in_test(groups[::-7], 0.1, 5), chosen[::-7])
    assert (in_test(groups, 0.1, 6) != chosen).any()
    assert in_test(groups, 0.3, 5)[chosen].all()  # a larger share adds groups


def test_groups_that_are_added_later_move_nobody(tmp_path: Path) -> None:
    """A new build numbers the groups anew, by their sorted names."""
    early, late = [f"p{i:02}" for i in range(0, 60, 2)], [f"p{i:02}" for i in range(60)]
    before, after = (in_test(np.arange(len(names), dtype=np.int32), 0.4, 3, names) for names in (early, late))
    assert 5 <= before.sum() <= 20
    assert np.array_equal(after[::2], before)
    unnamed = in_test(np.arange(50, dtype=np.int32), 0.4, 3, early)[30:]
    assert np.array_equal(unnamed, in_test(np.arange(50, dtype=np.int32), 0.4, 3)[30:])
    samples = [Sample(png(np.full((3, 4), i, np.uint8)), 0, i) for i in range(30)]
    write_shards(samples, tmp_path, "s")
    (tmp_path / "groups.json").write_text(json.dumps(early))
    split(str(tmp_path), tmp_path / "train", tmp_path / "test", 0.4, 3)
    assert Shards(str(tmp_path / "test")).groups.tolist() == np.flatnonzero(before).tolist()


def test_shards_that_cannot_lie_in_one_folder_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        source(tmp_path / folder, 8)
    out = tmp_path / "train", tmp_path / "test"
    with pytest.raises(UsageError, match=r"2 shards of the name s-000000.tar, which would lie in one folder"):
        split(f"{tmp_path}/{{a,b}}", *out, 0.5)
    for path in list((tmp_path / "b").glob("s-*")):
        path.rename(path.with_name(path.name.replace("s-", "t-")))
    (tmp_path / "b" / "groups.json").write_text('["c", "d"]')
    with pytest.raises(UsageError, match=r"/a, .*/b: number other classes or groups"):
        split(f"{tmp_path}/{{a,b}}", *out, 0.5)
    assert not any(path.exists() for path in out)
    (tmp_path / "b" / "groups.json").write_text('["a", "b"]')
    assert sum(half.samples for half in split(f"{tmp_path}/{{a,b}}", *out, 0.5)) == 48


def test_long_names_and_clips_are_copied_as_they_are(tmp_path: Path) -> None:
    name = "folder-of-a-name/" * 12
    files = []
    for group in range(6):
        files += [(f"{name}{group}.{i}.jpg", f"{group} {i}".encode()) for i in range(2)]
        files.append((f"{name}{group}.group", str(group).encode()))
    (tmp_path / "src").mkdir()
    indexed(tmp_path / "src", files)
    split(str(tmp_path / "src"), tmp_path / "train", tmp_path / "test", 0.5)
    found = []
    for side in ("train", "test"):
        shards = Shards(str(tmp_path / side))
        assert shards.frames.tolist() == [2] * len(shards)
        for i, group in enumerate(shards.groups):
            assert shards.images(i, shards.read(i)) == [f"{group} {frame}".encode() for frame in range(2)]
        with tarfile.open(shards.paths[0]) as tar:
            found += tar.getnames()
    assert sorted(found) == sorted(name for name, _ in files)


def test_what_cannot_be_split_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.group", b"1")]))
    build_index(tmp_path / "x.tar")
    with pytest.raises(DataError, match="1 of 2 samples have no group; pack them with shards build --group-by"):
        split(str(tmp_path), tmp_path / "train", tmp_path / "test", 0.5)
    source(tmp_path / "src", 4)
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(UsageError, match="no share between 0 and 1"):
            split(str(tmp_path / "src"), tmp_path / "train", tmp_path / "test", share)
    for share, side in ((1e-9, "test"), (1 - 1e-9, "training")):
        with pytest.raises(UsageError, match=f"no group of 4 is a {side} group; another share or --seed"):
            split(str(tmp_path / "src"), tmp_path / "train", tmp_path / "test", share)
    assert not (tmp_path / "train").exists()
    words = ["shards", "split", str(tmp_path / "src"), str(tmp_path / "train"), str(tmp_path / "test"), "--by", "group"]
    assert cli.main([*words, "--test", "0.5"]) == 0
    assert "samples of" in capsys.readouterr().out
    assert cli.main([*words, "--test", "0.5"]) == 2
    assert "exists already" in capsys.readouterr().err
