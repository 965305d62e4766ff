"""Checkpoints are whole or not there, and locks know the living from the dead."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import contend

from selfsight import checkpoint
from selfsight.errors import StorageError, UsageError
from selfsight.optim import make_moments
from selfsight.run_folder import LOCK, RunLock, cut_lines_after, differences, read_lines, this_process


def tensors(value: float = 1.0) -> dict[str, checkpoint.Tensors]:
    return {"model": {"a.weight": torch.full((3, 4), value)}, "optim": {"a.weight/step": torch.tensor(value)}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 12, {"recipe": {"seed": 3}}, tensors(2.5), keep=2)
    assert path.name == "step-00000012"
    saved = checkpoint.load(path)
    assert saved.state == {"format": 1, "step": 12, "recipe": {"seed": 3}}
    assert torch.equal(saved.tensors["model"]["a.weight"], torch.full((3, 4), 2.5))
    assert saved.tensors["optim"]["a.weight/step"].shape == ()
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "optim.safetensors", "state.json"]


def test_old_ones_are_pruned_by_step_and_not_by_time(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        checkpoint.save(tmp_path, step, {}, tensors(), keep=2)
    assert checkpoint.steps(tmp_path) == [10, 20]
    os.utime(tmp_path / "step-00000020", (0, 0))
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000020", [])


def test_a_damaged_future_does_not_push_out_the_present(tmp_path: Path) -> None:
    for step in (5, 900, 1000):
        checkpoint.save(tmp_path, step, {}, tensors(), keep=9)
    for step in (900, 1000):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, 10, {}, tensors(), keep=2)
    assert checkpoint.steps(tmp_path) == [5, 10]
    checkpoint.save(tmp_path, 10, {}, tensors(), keep=2)
    assert checkpoint.steps(tmp_path) == [5, 10]


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_one_is_passed_over_loudly(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint.save(tmp_path, 1, {}, tensors(), keep=2)
    newest = checkpoint.save(tmp_path, 2, {}, tensors(), keep=2)
    file = newest / name
    raw = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        middle = len(raw) // 2
        file.write_bytes(
            {"flip": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :], "cut": raw[:middle], "empty": b""}[
                damage
            ]
        )
    if name == "manifest.json" and damage == "flip" and checkpoint.verify(newest) is None:
        pytest.fail("a flipped bit of the manifest was not seen")
    found, told = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(told) == 1
    assert "step-00000002" in told[0]
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(StorageError, match="no checkpoint can be trusted"):
        checkpoint.newest(tmp_path)


def test_drafts_and_strangers_are_no_checkpoints(tmp_path: Path) -> None:
    for name in (".draft-step-00000009", "step-9", "step-00000009.tmp", "step-abc"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(tmp_path / "nowhere") == (None, [])


@pytest.mark.parametrize("failing", ["save_file", "sync", "digest"])
def test_a_full_disk_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    checkpoint.save(tmp_path, 1, {}, tensors(), keep=2)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, failing, full)
    with pytest.raises(
        StorageError, match=r"could not be written \(No space left on device\); older ones are untouched"
    ):
        checkpoint.save(tmp_path, 2, {}, tensors(), keep=2)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000001", [])
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_space_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="a checkpoint needs 0 MiB, 0 MiB are free"):
        checkpoint.save(tmp_path, 1, {}, tensors(), keep=2)


def test_the_rename_comes_after_every_fsync_and_the_pruning_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename, remove = checkpoint.sync, Path.rename, shutil.rmtree
    monkeypatch.setattr(checkpoint, "sync", lambda path: (done.append(f"sync {path.name}"), sync(path))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (done.append("rename"), rename(self, target))[1])
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **o: (done.append(f"remove {Path(path).name}"), remove(path, **o))[1]
    )
    for step in (1, 2, 3):
        done.clear()
        checkpoint.save(tmp_path, step, {}, tensors(), keep=2)
    at = done.index("rename")
    assert {
        f"sync {name}"
        for name in ("model.safetensors", "optim.safetensors", "state.json", "manifest.json", ".draft-step-00000003")
    } <= set(done[:at])
    assert done[at + 1 :] == [f"sync {tmp_path.name}", "remove step-00000001"]


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path, 1, {}, tensors(), keep=2)
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    with pytest.raises(StorageError, match="newer release"):
        checkpoint.load(path)


def test_the_optimizer_goes_round() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    packed = {key: value.clone() for key, value in checkpoint.pack_optimizer(optimizer, names).items()}
    assert set(packed) == {f"{p}/{m}" for p in ("weight", "bias") for m in ("step", "exp_avg", "exp_avg_sq")}
    for early in (False, True):
        fresh = torch.optim.AdamW(model.parameters(), fused=True)
        if early:
            make_moments(fresh)
        checkpoint.unpack_optimizer(fresh, names, packed)
        assert all(
            torch.equal(a, b)
            for a, b in zip(checkpoint.pack_optimizer(fresh, names).values(), packed.values(), strict=True)
        )
    with pytest.raises(StorageError, match="knows 'other', which this run does not train"):
        checkpoint.unpack_optimizer(fresh, names, {"other/step": torch.tensor(1.0)})
    with pytest.raises(StorageError, match=r"bias/exp_avg has shape \[1\], this run's has \[2\]"):
        checkpoint.unpack_optimizer(fresh, names, {"bias/exp_avg": torch.ones(1)})
    model.bias.requires_grad_(False)
    fresh = torch.optim.AdamW([model.weight], fused=True)
    checkpoint.unpack_optimizer(fresh, names, packed)
    assert [*fresh.state] == [model.weight]


# -- the run folder


def test_a_living_owner_keeps_the_folder(tmp_path: Path) -> None:
    code = f"import sys; from pathlib import Path; from selfsight.run_folder import RunLock\nwith RunLock(Path({str(tmp_path)!r})): print('in', flush=True); sys.stdin.read()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "in\n"
    with pytest.raises(UsageError, match=f"in use by process {owner.pid} on "), RunLock(tmp_path):
        pass
    owner.kill()
    owner.communicate()
    assert (tmp_path / LOCK).exists()
    with RunLock(tmp_path):  # provably dead: taken over
        assert json.loads((tmp_path / LOCK).read_text()) == this_process()
    assert not (tmp_path / LOCK).exists()


def test_only_one_of_many_gets_the_folder(tmp_path: Path) -> None:
    """Twelve processes at once, over the lock of a dead owner: one is in, the others are told."""
    (tmp_path / LOCK).write_text("")
    assert contend(tmp_path, 12) == ["in"] + ["out"] * 11


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), RunLock(tmp_path / "file" / "run"):
        pass


def test_lines_after_a_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_lines_after(path, 5)
    path.write_text('{"step": 1}\n{"step": 5}\n{"st\n{"step": 6}\n{"ste')
    assert [line["step"] for line in read_lines(path)] == [1, 5, 6]
    cut_lines_after(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 5}\n'


def test_differences_are_named() -> None:
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": None, "f": 1}
    assert differences(old, new) == {"b.c": "b.c (was 2, is 4)", "f": "f (was None, is 1)"}
