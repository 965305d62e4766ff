"""A run that is killed, wherever, and started again is the run that nobody killed."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos
import pytest
from chaos import Histories, compare, disagreements, lines, samples
from launch import Job, Launcher, words
from safetensors.torch import load_file

from selfsight import checkpoint
from selfsight.run_folder import read_lines

Start = Callable[..., Job]
GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"


@pytest.fixture
def histories(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Histories:
    monkeypatch.setattr(chaos, "STEPS", 12)
    monkeypatch.setitem(chaos.FIELDS, "train.steps", 12)
    return Histories(launcher, tmp_path, seed=random.randrange(2**32))  # another one each time: a failure prints it


@pytest.mark.parametrize("objective", ["mae", pytest.param("dino", marks=pytest.mark.slow)])
def test_kills_at_random_change_nothing(histories: Histories, objective: str) -> None:
    while histories.found["kills"] < 3:  # a fault may lie behind the last step
        histories.run(objective, [1], 4, {})
    assert not any(histories.found[name] for name in ("runs_lost", "ids_differing", "weights_differing", "surprises"))


def test_kills_of_one_of_two_ranks_change_nothing(histories: Histories) -> None:
    histories.run("simmim", [2], 3, {})
    assert not any(histories.found[name] for name in ("runs_lost", "ids_differing", "weights_differing", "surprises"))


@pytest.mark.parametrize("objective", ["mae", pytest.param("joint", marks=pytest.mark.slow)])
def test_ranks_may_change_at_every_start(histories: Histories, objective: str) -> None:
    """Elastic: 1, 2 or 4 ranks, deterministic: the same ids, inputs and weights bit for bit."""
    histories.run(objective, [1, 2, 4], 2, {"train.deterministic": 4})
    assert not any(histories.found[name] for name in ("runs_lost", "ids_differing", "weights_differing", "surprises"))


def test_without_deterministic_mode_other_ranks_get_the_same_inputs(start: Start, tmp_path: Path) -> None:
    for world in (1, 3):
        fields = {"run_dir": tmp_path / str(world), "train.batch_size": 12}
        assert start(world, fields=fields).wait(60) == [0] * world
    assert disagreements(samples(lines(tmp_path / "1")), samples(lines(tmp_path / "3"))) == 0


def test_the_comparison_finds_what_differs(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: another seed is another run, and a run that lacks steps is not the run."""
    monkeypatch.setattr(chaos, "STEPS", 6)
    for name, seed in (("a", 0), ("b", 1)):
        assert start(fields={"run_dir": tmp_path / name, "seed": seed}).wait(60) == [0]
    found = compare(tmp_path / "a", tmp_path / "b", 1)
    assert found["ids_differing"] > 20
    assert found["weights_differing"] == 1
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    ledger = tmp_path / "c" / "ledger" / "rank-0.jsonl"
    ledger.write_text("\n".join(ledger.read_text().splitlines()[:-1]))
    assert compare(tmp_path / "a", tmp_path / "c", 1)["ids_differing"] == 8
    assert compare(tmp_path / "a", tmp_path / "a", 1).total() == 0


PHASES = [
    "save.copy",
    *[f"save.write hit={hit}" for hit in (1, 2, 3)],
    "save.state",
    "save.manifest",
    *[f"save.sync hit={hit}" for hit in (1, 4, 6)],
    "save.rename",
    "save.renamed",
    "save.prune",
    "save.done",
]


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_inside_a_save_leaves_the_old_or_the_new(start: Start, tmp_path: Path, phase: str) -> None:
    """At step 6 of 6: 3 stays, or 6 is whole; never neither. The next start removes what was left half made."""
    point, _, hit = phase.partition(" ")
    folder = tmp_path / "run" / "checkpoints"
    step = 1 if point == "save.prune" else 6  # that of the checkpoint that is removed
    assert start(faults=f"{point} kill step={step} {hit}", fields={"train.ema": 0.9}).wait(60) == [-9]
    newest, told = checkpoint.newest(folder)
    assert newest is not None
    assert newest.name == ("step-00000006" if phase in {"save.renamed", "save.prune", "save.done"} else "step-00000003")
    assert not told
    assert checkpoint.load(newest).state["step"] == int(newest.name[-8:])
    (folder / ".draft-step-00000099").mkdir()  # of a start that saved at other steps
    assert start(fields={"train.ema": 0.9}).wait(60) == [0]
    assert checkpoint.steps(folder) == [3, 6]
    assert not list(folder.glob(".*"))


def test_the_first_start_that_is_killed_in_its_first_save_starts_anew(start: Start, tmp_path: Path) -> None:
    assert start(faults="save.rename kill step=1").wait(60) == [-9]
    assert start().wait(60) == [0]
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", "flip"), ("optim.safetensors", "cut"), ("state.json", "gone"), ("manifest.json", "flip")],
)
def test_a_damaged_newest_is_passed_over_and_made_again(start: Start, tmp_path: Path, name: str, damage: str) -> None:
    assert start().wait(60) == [0]
    folder = tmp_path / "run" / "checkpoints"
    before = (folder / "step-00000006" / "model.safetensors").read_bytes()
    file = folder / "step-00000006" / name
    body = bytearray(file.read_bytes())
    if damage == "flip":
        body[len(body) // 2] ^= 1
    file.write_bytes(body[:-1] if damage == "cut" else body)
    if damage == "gone":
        file.unlink()
    job = start()
    assert job.wait(60) == [0]
    assert f"{file.parent}: " in job.told() and "going back one" in job.told()
    assert "goes on from step 3" in job.told()
    assert (folder / "step-00000006" / "model.safetensors").read_bytes() == before


def test_progress_is_one_integer(start: Start, tmp_path: Path) -> None:
    """The loader has no state but the step: no file of a checkpoint grows with the position or the data."""
    assert start().wait(60) == [0]
    folder = tmp_path / "run" / "checkpoints"
    states = [json.loads((folder / f"step-{step:08d}" / "state.json").read_text()) for step in (3, 6)]
    assert states[0].pop("step") == 3 and states[1].pop("step") == 6
    for state in states:
        state.pop("past")
    assert states[0] == states[1]
    assert len(json.dumps(6)) <= 200


def test_milestones_stay(start: Start, tmp_path: Path) -> None:
    fields = {"train.steps": 12, "train.save_every": 2, "train.keep_every": 4}
    assert start(fields=fields).wait(60) == [0]
    kept = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert kept in ([4, 8, 12], [4, 8, 10, 12])  # the save of 10 is left out if that of 8 is still being written


def test_a_checkpoint_of_an_older_release_goes_on(launcher: Launcher, tmp_path: Path) -> None:
    """Format 1, as the first release wrote it: loaded, resumed, and the next losses are those that it had."""
    shutil.copytree(GOLDEN, tmp_path / "old")
    run, data = tmp_path / "old" / "run", tmp_path / "old" / "data"
    job = launcher.start(["pretrain", run / "recipe.yaml", *words({"run_dir": run, "data.train": data})])
    assert job.wait(60) == [0], job.told()
    assert "goes on from step 2" in job.told()
    old, new = (read_lines(folder / "metrics.jsonl") for folder in (GOLDEN / "run", run))
    assert [line["step"] for line in new] == [1, 2, 3, 4]
    assert [line["loss"] for line in new] == pytest.approx([line["loss"] for line in old], rel=1e-4)
    assert set(load_file(run / "encoder" / "model.safetensors"))


def test_a_changed_field_is_refused_unless_it_is_allowed(start: Start, tmp_path: Path) -> None:
    assert start(faults="update kill step=5").wait(60) == [-9]
    refused = start(fields={"optim.lr": 0.5, "train.batch_size": 4})
    assert refused.wait(60) == [2]
    assert re.search(r"optim\.lr \(was [0-9.]+, is 0\.5\); train\.batch_size \(was 8, is 4\)", refused.told())
    assert "--allow-change KEY" in refused.told()
    allowed = start(fields={"optim.lr": 0.5, "allow-change": "optim.lr"})
    assert allowed.wait(60) == [0], allowed.told()
    assert re.search(r"goes on with a change: optim\.lr \(was [0-9.]+, is 0\.5\)", allowed.told())


def test_other_libraries_are_said(start: Start, tmp_path: Path) -> None:
    assert start(faults="update kill step=5").wait(60) == [-9]
    folder = checkpoint.newest(tmp_path / "run" / "checkpoints")[0]  # that of step 3 may not have been through
    assert folder is not None
    state = json.loads((folder / "state.json").read_text())
    state["libraries"]["pillow"] = "1.0"
    (folder / "state.json").write_text(json.dumps(state))
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {
        "size": (folder / "state.json").stat().st_size,
        "sha256": checkpoint.digest(folder / "state.json"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    job = start()
    assert job.wait(60) == [0]
    assert "warning: pillow (was '1.0', is " in job.told()
