"""Ranks that die, fail, freeze, lag behind, or were never the same: the others say which one, and end."""

import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import Job, free_port

import selfsight as package
from selfsight import checkpoint
from selfsight.peers import Line, _server
from selfsight.processes import sources
from selfsight.run_folder import read_lines

Start = Callable[..., Job]
LONG = {"train.steps": 4000, "train.save_every": 1000, "train.log_every": 50}


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_rank_that_dies_is_named_by_the_others(start: Start, dead: int) -> None:
    job = start(3, f"learn kill rank={dead} step=4", {"train.batch_size": 12})
    codes = job.wait(30)
    assert codes == [-9 if rank == dead else 76 for rank in range(3)]
    for rank in {0, 1, 2} - {dead}:
        assert f"selfsight: rank {dead} died" in job.told(rank), job.told(rank)
        assert "Traceback" not in job.told(rank)
    if dead == 0:
        assert start(3, fields={"train.batch_size": 12}).wait(60) == [0, 0, 0]


def test_a_rank_that_fails_is_named_with_its_reason(start: Start) -> None:
    job = start(2, "learn error rank=1 step=4")
    assert job.wait(30) == [76, 70]
    assert re.search(r"rank 1 failed \(.*\): injected at learn", job.told(0))


def test_a_rank_with_bad_data_is_named_with_its_reason(start: Start) -> None:
    """An error of ours on one rank, before the first step."""
    job = start(2, own={1: ["--data.train", "/nowhere.tar"]})
    assert job.wait(30) == [2, 2]
    assert "rank 1 was started in another way than rank 0" in job.told(0)
    assert "data.train (was " in job.told(1) and "is '/nowhere.tar')" in job.told(1)


def test_a_rank_with_other_sources_is_refused(start: Start) -> None:
    job = start(2, own={1: ["--plugin", "other_sources"]})
    assert job.wait(30) == [2, 2]
    assert "rank 1 was started in another way than rank 0" in job.told(0)
    assert re.search(r"program\.selfsight \(was '\S+ \w{12}', is '\S+ another'\)", job.told(1))


def test_a_save_that_is_being_written_is_finished_when_a_peer_is_lost(start: Start, tmp_path: Path) -> None:
    faults = "save.rename sleep=4 step=5; learn kill rank=1 step=7"
    job = start(2, faults, {"train.steps": 20, "train.save_every": 5})
    assert job.wait(30) == [76, -9]
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 5]


@pytest.mark.parametrize("frozen", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_rank_is_named_at_the_timeout(start: Start, frozen: int) -> None:
    """It may not answer the launcher, either: it is killed once the other has ended."""
    job = start(2, f"learn stop rank={frozen} step=4", {"train.timeout": 2})
    codes = job.wait(30, but=[frozen])
    assert codes[1 - frozen] == 76
    assert f"rank {frozen} has been silent for 2 s (train.timeout)" in job.told(1 - frozen)


def test_ranks_that_were_all_stopped_for_a_while_go_on(start: Start) -> None:
    """As a terminal's Ctrl-Z and fg do, or a debugger."""
    job = start(2, "data sleep=0.02", {"train.steps": 60, "train.timeout": 1})
    time.sleep(0.8)
    for number, wait in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0)):
        for rank in (0, 1):
            job.signal(rank, number)
        time.sleep(wait)
    assert job.wait(60) == [0, 0], job.told()


def test_a_rank_that_is_slow_is_named_and_nothing_ends(start: Start, tmp_path: Path) -> None:
    job = start(2, "data sleep=0.1 rank=1", {"train.log_every": 2})
    assert job.wait(60) == [0, 0]
    assert re.search(r"warning: rank 1 waits 0\.1\d s a step for its data, the others 0\.0\d s", job.told(0))
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["step"] > 2]
    assert {line["slowest_rank"] for line in lines} == {1}


def test_a_rank_that_never_comes_is_said(start: Start) -> None:
    """One rank believes in two, the other in three."""
    job = start(
        2,
        fields={"train.timeout": 0.5, "train.batch_size": 6},
        environment={"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"},
    )
    assert job.wait(40) == [76, 76]
    assert re.search(r"rank 0 of 3: the others did not come to 127\.0\.0\.1:\d+ within 2\.5 s", job.told(0))


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(start: Start, tmp_path: Path, number: str) -> None:
    job = start(2, f"learn signal={number} rank=1 step=9", LONG)
    assert job.wait(30) == [75, 75]
    steps = {re.search(r"stopped on request after step (\d+) of", job.told(rank))[1] for rank in (0, 1)}  # type: ignore[index]
    assert steps == {"9"}
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 9]
    assert (tmp_path / "run" / "stopped").read_text() == "9\n"


def test_a_signal_while_loading_stops_before_the_first_step(start: Start, tmp_path: Path) -> None:
    job = start(2, "data signal=SIGTERM rank=0 step=1", LONG)
    assert job.wait(30) == [75, 75]
    assert "stopped on request after step 0 of 4,000" in job.told(0)
    assert not checkpoint.steps(tmp_path / "run" / "checkpoints")


def test_a_signal_at_a_random_time_saves_or_ends_cleanly(start: Start, tmp_path: Path) -> None:
    """While it loads, learns, or saves; started again, it goes on."""
    fields = {"train.steps": 400, "train.save_every": 3}
    for wait in (0.05, 0.3, 0.6):
        job = start(1, fields=fields)
        time.sleep(wait)
        job.signal(0, signal.SIGTERM)
        code = job.wait(30)[0]
        assert code in {0, 75, -signal.SIGTERM}, job.told()  # the last before Python has come to our handler
        assert "Traceback" not in job.told()
    assert start(1, fields=fields).wait(60) == [0]
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 400


def test_a_second_signal_ends_at_once_and_the_old_checkpoint_stands(start: Start, tmp_path: Path) -> None:
    """Inside a save that takes a minute."""
    # On a busy machine the signal may be heard a step later.
    job = start(1, "save.rename sleep=60 step=7; save.rename sleep=60 step=8; learn signal=SIGTERM step=7", LONG)
    folder = tmp_path / "run" / "checkpoints"
    for _ in range(1000):
        if list(folder.glob(".draft-step-0000000[78]/manifest.json")):
            break
        time.sleep(0.02)
    job.signal(0, signal.SIGTERM)
    assert job.wait(10) == [75]
    assert checkpoint.steps(folder) == [1]
    assert checkpoint.newest(folder)[1] == []


def test_a_signal_while_scoring_ends_at_once(start: Start, small_shards: Path, tmp_path: Path) -> None:
    """Training is over and saved; what is left is done by the next start."""
    scored = {"eval.train": small_shards, "eval.test": small_shards, "eval.k": "[5]", "eval.every": 100}
    job = start(1, "finish signal=SIGTERM", scored)
    assert job.wait(60) == [75]
    assert "training is done and saved" in job.told()
    assert not (tmp_path / "run" / "scores.json").exists()
    assert start(1, fields=scored).wait(100) == [0]
    assert (tmp_path / "run" / "scores.json").exists()


def test_what_torchrun_repeats_is_one_request(start: Start, tmp_path: Path) -> None:
    faults = "learn signal=SIGTERM step=5; learned signal=SIGTERM step=5"
    assert start(1, faults, LONG, environment={"TORCHELASTIC_RUN_ID": "x"}).wait(30) == [75]
    saved = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert saved in ([1, 5], [1, 6])  # on a busy machine the signal may be heard a step later
    assert start(1, faults.replace("5", "8"), LONG).wait(30) == [75]  # without it, the second one is meant
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == saved


def test_what_no_rank_says_is_a_line_that_is_lost() -> None:
    ours, theirs = (Line(end) for end in socket.socketpair())
    theirs.connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert ours.receive() is None
    for line in (ours, theirs):
        line.connection.close()


def test_a_rank_may_be_slow_with_its_first_words() -> None:
    ours, theirs = (Line(end) for end in socket.socketpair())
    speaking = threading.Timer(1.5, theirs.send, [{"rank": 1, "word": 7}])
    speaking.start()
    assert ours.first(10) == {"rank": 1, "word": 7}
    assert ours.first(0.1) == {}
    theirs.connection.close()
    assert ours.first(10) == {}
    ours.connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_ranks_of_one_machine_are_not_reached_from_others(host: str) -> None:
    with _server(host, 2) as server:
        assert server.getsockname()[0] == "127.0.0.1"


def test_a_signal_while_ranks_find_each_other_ends_at_once(start: Start) -> None:
    job = start(1, fields={"train.batch_size": 8}, environment={"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})  # fmt: skip
    time.sleep(1)
    job.signal(0, signal.SIGTERM)
    assert job.wait(10) == [-signal.SIGTERM]


def test_a_second_signal_is_heard_inside_a_collective(start: Start) -> None:
    """The other rank is frozen, so that the main thread hangs where Python's own handlers are never run."""
    job = start(2, "learn stop rank=1 step=4")
    time.sleep(2)
    for _ in range(2):
        job.signal(0, signal.SIGTERM)
        time.sleep(0.3)
    assert job.wait(10, but=[1])[0] == 75


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', which is no number"),
        ({"WORLD_SIZE": "2"}, "use launch.sh or torchrun"),
    ],
)
def test_half_an_environment_is_said(start: Start, environment: dict[str, str], told: str) -> None:
    job = start(1, environment=environment)
    assert job.wait(20) == [2]
    assert told in job.told()
    assert "Traceback" not in job.told()


def test_sources_are_those_of_linked_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout, data and eval are links."""
    for name in ("package", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "order.py").write_text("ROUNDS = 12")
    (tmp_path / "package" / "data").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(package, "__path__", [str(tmp_path / "package")])
    before = sources()
    (tmp_path / "elsewhere" / "order.py").write_text("ROUNDS = 11")
    assert sources() != before
