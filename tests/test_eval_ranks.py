"""Evaluation by several processes: every sample once, the same bits for any number of them, nobody left waiting."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, pictures
from hypothesis import given
from hypothesis import strategies as st
from launch import Launcher

from selfsight.data.build import write_shards
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.eval.ranks import Ranks
from selfsight.recipe import DataConfig, EncoderConfig

WORLDS = (1, 2, 4)


@given(st.integers(0, 200), st.integers(1, 9))
def test_every_batch_is_one_ranks(batches: int, world: int) -> None:
    shares = [Ranks(rank, world).share(batches) for rank in range(world)]
    assert [number for share in shares for number in share] == list(range(batches))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert not batches or len(shares[0])  # rank 0 knows how wide features are


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 1, 2 and 4 processes make of 5 samples, of 2 batches, and of 7 with a partial last one."""
    top = tmp_path_factory.mktemp("ranks")
    for seed, (name, count) in enumerate((("one", 5), ("few", 20), ("many", 103))):
        (top / name).mkdir()
        write_shards(iter(pictures(count, seed=seed)), top / name, "s")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("eval_ranks.py")), str(top), *map(str, WORLDS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join([*map(str, (ROOT / "tests" / "faults", ROOT / "ssl")), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return top


@pytest.mark.parametrize("world", WORLDS[1:])
@pytest.mark.parametrize("name", ["one", "few", "many"])
def test_features_are_bit_for_bit_those_of_one_process(folder: Path, name: str, world: int) -> None:
    alone = (folder / f"{name}-1.st").read_bytes()
    assert len(alone) > 1000
    assert (folder / f"{name}-{world}.st").read_bytes() == alone


@pytest.mark.parametrize("world", WORLDS[1:])
def test_scores_are_those_of_one_process_fresh_and_kept(folder: Path, world: int) -> None:
    alone = json.loads((folder / "scores-1-0.json").read_text())
    assert [score["encoder"] for score in alone["scores"]] == ["pretrained", "random-init", "pixels", "majority"]
    for time in range(2):
        assert json.loads((folder / f"scores-{world}-{time}.json").read_text()) == alone
    assert len(list((folder / f"kept-{world}").iterdir())) == 10


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from selfsight.exports import export as module

    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    made = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0).eval()
    target = tmp_path_factory.mktemp("enc") / "encoder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "verify_export", lambda encoder, folder: 0.0)
        module.export(made, target, {})
    return target


def words(encoder: Path, *more: Any) -> list[Any]:
    return ["eval", encoder, "--train", "digits:train", "--test", "digits:test", "--with", "knn", "--no-cache", *more]


def test_only_the_first_rank_speaks(launcher: Launcher, encoder: Path, tmp_path: Path) -> None:
    job = launcher.start(words(encoder, "--json", tmp_path / "found.json"), 2)
    assert job.wait(120) == [0, 0], job.told()
    assert "random-init" in job.told(0)
    assert job.told(1) == ""
    alone = launcher.start(words(encoder, "--json", tmp_path / "alone.json"))
    assert alone.wait(120) == [0], alone.told()
    assert (tmp_path / "found.json").read_text() == (tmp_path / "alone.json").read_text()


def test_a_rank_that_fails_ends_all(launcher: Launcher, encoder: Path) -> None:
    """One rank is given an encoder that is not there, while the other waits for its features."""
    for failing in (0, 1):
        given = [["eval", encoder if rank != failing else encoder / "gone"] for rank in range(2)]
        job = launcher.start(["eval"], 2, own={rank: [*given[rank][1:], *words(encoder)[2:]] for rank in range(2)})
        codes = job.wait(60)
        assert codes[failing] == 2, job.told()
        assert codes[1 - failing] == 76, job.told()
        assert re.search(rf"rank {failing} failed .*gone: neither a run", job.told(1 - failing))
