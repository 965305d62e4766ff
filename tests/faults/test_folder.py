"""The run folder: full and read-only disks, logs and trackers that fail, locks of the living and the dead."""

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import contend
from launch import Job

from selfsight import checkpoint
from selfsight.errors import StorageError, UsageError
from selfsight.ledger import Ledger
from selfsight.metrics import MetricsLog, end_trackers, start_trackers
from selfsight.objectives.base import Loss
from selfsight.run_folder import LOCK, OWNER, RunLock, is_dead, read_lines, require_writable, this_process
from selfsight.saver import FAILURES, Saver

Start = Callable[..., Job]
SAVES = {"train.steps": 12, "train.save_every": 2}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this process may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True)
    if made.returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_said_before_data_and_model(start: Start, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(240 * 1024))
    job = start(1, fields={"run_dir": small_disk / "run", "data.train": "/nowhere.tar"})
    assert job.wait(30) == [74]
    assert re.search(r"run: cannot be written \(No space left on device\)", job.told())


def test_a_disk_too_small_for_a_checkpoint_fails_in_the_first_step(start: Start, small_disk: Path) -> None:
    job = start(1, fields={"run_dir": small_disk / "run", "encoder.width": 64})
    assert job.wait(30) == [74]
    assert re.search(r"a checkpoint needs \d+ MiB, 0 MiB are free", job.told())


@pytest.mark.parametrize("blocked", ["a file", "below a file"])
def test_a_place_that_cannot_be_written_is_said_first(start: Start, tmp_path: Path, blocked: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if blocked == "a file" else tmp_path / "file" / "run"
    job = start(1, fields={"run_dir": folder, "data.train": "/nowhere.tar"})
    assert job.wait(30) == [74]
    assert f"{folder}: cannot be written (" in job.told()


def test_a_read_only_disk_is_said_first(start: Start, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    job = start(1, fields={"run_dir": small_disk / "run", "data.train": "/nowhere.tar"})
    assert job.wait(30) == [74]
    assert "cannot be written (Read-only file system)" in job.told()


@pytest.mark.parametrize("point", ["save.write", "save.state", "save.manifest", "save.sync", "save.rename"])
def test_a_save_that_fails_is_said_and_training_goes_on(start: Start, tmp_path: Path, point: str) -> None:
    job = start(1, f"{point} errno=ENOSPC step=6 hit=1", SAVES)
    assert job.wait(60) == [0], job.told()
    told = re.search(
        r"warning: .*step-00000006: the checkpoint could not be written \((.*)\).*training goes on", job.told()
    )
    if told is None:  # it was left out, because that of step 4 was still being written
        assert "step 6 is left out" in job.told()
    else:
        assert told[1] == "No space left on device"
        assert f"(1 of {FAILURES} failures in a row)" in job.told()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name == "step-00000012"  # type: ignore[union-attr]


def test_saves_that_keep_failing_end_the_run_with_the_old_one_whole(start: Start, tmp_path: Path) -> None:
    faults = "; ".join(f"save.rename errno=EIO step={step}" for step in range(2, 300))
    job = start(2, faults, {"train.steps": 300, "train.save_every": 2})
    assert job.wait(60) == [74, 74], job.told()
    assert "could not be written (Input/output error); older ones are untouched" in job.told(0)
    assert "rank 0 cannot save" in job.told(1)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoint.steps(folder) == [1]
    assert checkpoint.newest(folder)[1] == []


def test_training_waits_for_the_copy_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that hangs: the next one is left out, and what was copied is what is written."""
    writing, go_on = threading.Event(), threading.Event()
    real = checkpoint.save

    def slow(*arguments: Any) -> Path:
        writing.set()
        assert go_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    saver, weight = Saver(tmp_path, 2, None, tmp_path / "log"), torch.ones(3)
    saver.save(1, {}, {"model": {"w": weight}}, wait=False)
    assert writing.wait(20)
    weight.fill_(2.0)  # the next step's update
    saver.save(2, {}, {"model": {"w": weight}}, wait=False)
    go_on.set()
    saver.finish()
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.load(tmp_path / "step-00000001").tensors["model"]["w"].tolist() == [1.0] * 3
    saver.save(3, {}, {"model": {"w": weight}}, wait=True)
    assert checkpoint.load(tmp_path / "step-00000003").tensors["model"]["w"].tolist() == [2.0] * 3


def test_a_step_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, weight = Saver(tmp_path, 2, None, tmp_path / "log"), torch.ones(3)
    saver.save(4, {}, {"model": {"w": weight}}, wait=False)
    saver.finish()
    monkeypatch.setattr(checkpoint, "save", lambda *_: pytest.fail("written again"))
    saver.save(4, {}, {"model": {"w": weight}}, wait=True)
    assert checkpoint.verify(tmp_path / "step-00000004") is None


@pytest.mark.parametrize("wait", [True, False])
def test_whatever_goes_wrong_in_a_save_is_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wait: bool
) -> None:
    def broken(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(checkpoint, "save", broken)
    saver = Saver(tmp_path, 2, None, tmp_path / "log")
    if wait:
        with pytest.raises(StorageError, match="step 3: MemoryError: no room"):
            saver.save(3, {}, {"model": {"w": torch.ones(3)}}, wait=True)
    else:
        saver.save(3, {}, {"model": {"w": torch.ones(3)}}, wait=False)
        saver.finish()
        assert "training goes on (1 of 3 failures in a row)" in capsys.readouterr().err


def test_a_run_whose_last_save_fails_is_not_done(start: Start, tmp_path: Path) -> None:
    job = start(1, "save.write error step=6")
    assert job.wait(60) == [74], job.told()
    assert "injected at save.write" in job.told()
    assert not (tmp_path / "run" / "encoder").exists()
    assert start(1).wait(60) == [0]


def test_a_disk_that_is_away_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the run would go back, and the next save would remove the newest."""
    for step in (3, 6):
        checkpoint.save(tmp_path, step, {}, {"model": {"w": torch.ones(3)}}, keep=2)

    def away(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "digest", away)
    with pytest.raises(StorageError, match=r"step-00000006: cannot be read \(Input/output error\)"):
        checkpoint.newest(tmp_path)


def test_a_milestone_is_waited_for(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 2, 10, tmp_path / "log")
    for step in (10, 20, 30, 40):
        saver.save(step, {}, {"model": {"w": torch.ones(3)}}, wait=False)
    saver.finish()
    assert checkpoint.steps(tmp_path) == [10, 20, 30, 40]


def test_a_log_that_cannot_be_written_does_not_stop_training(start: Start, tmp_path: Path) -> None:
    job = start(1, "metrics errno=ENOSPC step=2; metrics errno=ENOSPC step=3")
    assert job.wait(60) == [0]
    assert job.told().count("cannot be written (No space left on device); training goes on without it") == 1
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 4, 5, 6]


def test_a_tracker_that_fails_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator = Accelerator(cpu=True)

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(accelerator, "log", down)
    log = MetricsLog(tmp_path / "metrics.jsonl", accelerator)
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    assert log.lost == {"line": 0, "trackers": 2}
    assert [line["step"] for line in read_lines(log.path)] == [1, 2]
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("a tracker failed (ConnectionError: no route to host)") == 1


def test_trackers_that_cannot_start_or_finish_do_not_stop_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, left = Accelerator(cpu=True), []

    def down(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(accelerator, "init_trackers", down)
    start_trackers(accelerator, "project", {})
    monkeypatch.setattr(accelerator, "trackers", [SimpleNamespace(finish=down)])
    monkeypatch.setattr(type(accelerator.state), "destroy_process_group", lambda self: left.append(1), raising=False)
    end_trackers(accelerator)
    told = " ".join(capsys.readouterr().err.split())
    assert "the trackers cannot start (ConnectionError: no route to host)" in told
    assert "a tracker could not finish (ConnectionError: no route to host)" in told
    assert left == [1]


def test_labelled_data_that_fail_leave_out_the_score_and_not_the_training(
    start: Start, small_shards: Path, tmp_path: Path
) -> None:
    data = copy_of(small_shards, tmp_path / "labelled")
    shard = sorted(data.glob("*.tar"))[0]
    body = bytearray(shard.read_bytes())
    place = body.index(b"\x89PNG") + 60
    body[place] ^= 1
    shard.write_bytes(body)
    job = start(2, fields={"eval.train": data, "eval.k": "[5]", "eval.every": 2})
    assert job.wait(60) == [0, 0], job.told()
    assert "warning: the online score is left out: small-000000.tar@" in job.told(0)
    assert not any("knn" in line for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_a_ledger_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSIGHT_LEDGER", "1")
    ledger = Ledger(tmp_path, 0)
    assert ledger.path is not None
    ledger.path.unlink()
    ledger.path.mkdir()
    loss = [Loss(torch.tensor(1.0), {})]
    ledger.write(1, [], loss, torch.tensor(1.0), torch.nn.Linear(1, 1))
    assert ledger.path is None


def test_a_file_may_grow_no_more(tmp_path: Path) -> None:
    """A real limit of the kernel's, in a process of its own."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from selfsight.run_folder import require_writable\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "from selfsight.errors import StorageError\n"
        "try: require_writable(Path(sys.argv[1]))\nexcept StorageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{tmp_path / 'run'}: cannot be written (File too large)\n"
    require_writable(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1024


# -- locks


def test_a_second_start_in_the_folder_is_refused_and_the_first_goes_on(start: Start) -> None:
    first = start(1, "learn sleep=2 step=3")
    for _ in range(200):
        if "starts; 6 steps" in first.told():
            break
        time.sleep(0.05)
    second = start(1)
    assert second.wait(30) == [2]
    assert f"in use by process {first.pids[0]} on {socket.gethostname()}" in second.told()
    assert first.wait(30) == [0]


def test_a_lock_of_the_dead_is_taken_over(start: Start, tmp_path: Path) -> None:
    assert start(1, "learn kill step=3").wait(30) == [-9]
    assert (tmp_path / "run" / LOCK).exists()
    assert start(1).wait(30) == [0]
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock, as some of clusters are."""

    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def written(folder: Path, **changes: Any) -> None:
    (folder / OWNER).write_text(json.dumps(this_process() | changes))


def test_without_locks_the_file_is_the_lock(tmp_path: Path, no_locks: None) -> None:
    with RunLock(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text()) == this_process()
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on"), RunLock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"boot": "another"}, {"pid": 2**22 + 1}, {"started": "1"}],
    ids=["the machine was started again", "no such process", "the number is another process's now"],
)
def test_without_locks_the_provably_dead_are_followed(tmp_path: Path, no_locks: None, changes: dict[str, Any]) -> None:
    written(tmp_path, **changes)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_without_locks_one_of_another_machine_is_never_dead(tmp_path: Path, no_locks: None) -> None:
    written(tmp_path, host="elsewhere", pid=2**22 + 1, boot="another")
    with pytest.raises(UsageError, match="on elsewhere; wait for it"), RunLock(tmp_path):
        pass
    assert not is_dead({"host": "elsewhere"})
    assert is_dead({"host": socket.gethostname(), "boot": this_process()["boot"]})


def test_without_locks_only_one_of_many_gets_the_folder(tmp_path: Path) -> None:
    """Eight processes at once, over the file of a dead owner."""
    written(tmp_path, boot="another")
    none = "import errno, fcntl\ndef flock(*_): raise OSError(errno.ENOSYS, 'no locks')\nfcntl.flock = flock"
    assert contend(tmp_path, 8, none) == ["in"] + ["out"] * 7
    assert list(tmp_path.iterdir()) == []


def test_other_failures_of_a_lock_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match="cannot be written"), RunLock(tmp_path):
        pass


# -- the data


def copy_of(shards: Path, folder: Path) -> Path:
    """A copy that a test may harm."""
    shutil.copytree(shards, folder)
    return folder


def test_data_that_are_gone_end_the_run_saved_and_it_goes_on_when_they_are_back(
    start: Start, small_shards: Path, tmp_path: Path
) -> None:
    """On one of two ranks; both end at the same step."""
    data = copy_of(small_shards, tmp_path / "data")
    fields = {"data.train": data, "train.steps": 200, "train.save_every": 100, "plugin": "harm"}
    harm = {"HARM_STEP": "30", "HARM_RANK": "1", "HARM_KIND": "gone"}
    job = start(2, "data sleep=0.01", fields, environment=harm)
    assert job.wait(60) == [75, 75], job.told()
    assert re.search(r"/nowhere/small-00000\d\.tar: the data cannot be reached any more", job.told(1))
    assert "another rank cannot go on with its data" in job.told(0)
    (saved,) = (int(found) for found in re.findall(r"the run ended after step (\d+) of 200, saved", job.told(0)))
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == saved
    assert start(2, fields=fields | {"train.steps": 200}).wait(60) == [0, 0]


@pytest.mark.parametrize("world", [1, 2])
def test_shards_that_are_replaced_end_the_run_on_all_ranks(
    start: Start, small_shards: Path, tmp_path: Path, world: int
) -> None:
    data = copy_of(small_shards, tmp_path / "data")
    fields = {"data.train": data, "train.steps": 200, "train.save_every": 100, "plugin": "harm"}
    harm = {"HARM_STEP": "30", "HARM_RANK": "0", "HARM_KIND": "replaced"}
    job = start(world, fields=fields, environment=harm)
    assert job.wait(60) == [65] * world, job.told()
    assert "is another file than when the run started" in job.told()
    (saved,) = {int(found) for found in re.findall(r"the run ended after step (\d+) of 200, saved", job.told())}
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == saved >= 29
