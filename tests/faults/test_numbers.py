"""Losses, gradients and weights that are not finite, and losses that run away."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import Job
from poison import POISONED
from safetensors.torch import load_file

from selfsight import checkpoint
from selfsight.divergence import PATIENCE, WARM, DivergenceWatch
from selfsight.errors import NumericError
from selfsight.finite import MOST, WINDOW, BadSteps, Step
from selfsight.objectives.base import Objective
from selfsight.objectives.dino import DINO
from selfsight.objectives.mae import MAE
from selfsight.objectives.vicreg import VICReg
from selfsight.past import Past
from selfsight.recipe import load
from selfsight.run_folder import read_lines
from selfsight.train import pretrain

Start = Callable[..., Job]
Fields = dict[str, Any]


@pytest.fixture(autouse=True)
def _quick(unchecked_export: None) -> None:
    """No run here needs its export looked at."""


def poison(monkeypatch: pytest.MonkeyPatch, positions: set[int], value: float = float("nan")) -> None:
    """Make the loss of batches that hold one of these positions `value` times itself."""
    real = MAE.forward

    def poisoned(self: MAE, batch: Any) -> Any:
        loss = real(self, batch)
        return loss._replace(total=loss.total * (value if positions & set(batch.positions.tolist()) else 1.0))

    monkeypatch.setattr(MAE, "forward", poisoned)


def weights(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def test_a_bad_step_touches_not_a_byte(small_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 of 5 is bad: weights, optimizer and average after it are those before it, and training goes on."""
    poison(monkeypatch, {3 * 8 + 5})
    folder = Path(small_fields["run_dir"])
    each = {"train.save_every": 1, "train.keep_every": 1, "train.ema": 0.9, "train.steps": 5}
    pretrain("digits/mae", small_fields | each)
    for name in ("model", "optim", "ema"):
        before, after, later = (weights(folder, step, name) for step in (3, 4, 5))
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not all(torch.equal(after[key], later[key]) for key in after)
    lines = read_lines(folder / "metrics.jsonl")
    assert [line.get("left_out") for line in lines] == [None, None, None, 1, None]
    assert "loss" not in lines[3] and "grad_norm" not in lines[3]  # JSON knows no NaN
    (bundle,) = (folder / "bad-steps").iterdir()
    told = json.loads(bundle.read_text())
    assert (bundle.name, told["step"], told["seed"]) == ("step-00000004-rank-0.json", 4, 0)
    assert [sample["position"] for sample in told["samples"]] == list(range(24, 32))
    assert re.fullmatch(r"small-000000\.tar@\d+|small-00000[12]\.tar@\d+", told["samples"][0]["where"])
    assert told["losses"][0]["loss"] == "nan" and told["norm"] == "nan"


def test_all_ranks_agree_before_the_update(start: Start, tmp_path: Path) -> None:
    """A loss that is not finite on one rank only, with finite gradients on all."""
    poisoned = {"train.steps": 8, "train.save_every": 1, "train.keep_every": 1, **POISONED}
    for world in (1, 2):
        job = start(world, fields=poisoned | {"run_dir": tmp_path / str(world)}, environment={"POISON": "20"})
        assert job.wait(60) == [0] * world, job.told()
        before, after = (weights(tmp_path / str(world), step) for step in (2, 3))
        assert all(torch.equal(before[key], after[key]) for key in before)
    names = sorted(path.name for path in (tmp_path / "2" / "bad-steps").iterdir())
    assert names == ["step-00000003-rank-0.json", "step-00000003-rank-1.json"]
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in "12")
    assert [line.get("left_out") for line in one] == [line.get("left_out") for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-5)


def test_a_gradient_that_is_not_finite_under_a_finite_loss(
    small_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MAE.forward

    def hooked(self: MAE, batch: Any) -> Any:
        loss = real(self, batch)
        if 8 in batch.positions:
            loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(MAE, "forward", hooked)
    pretrain("digits/mae", small_fields)
    lines = read_lines(Path(small_fields["run_dir"]) / "metrics.jsonl")
    assert [line.get("left_out") for line in lines] == [None, 1, None, None, None, None]
    assert "loss" in lines[1]


def test_more_than_a_few_end_the_run(small_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {8 * step for step in (2, 4, 5, 7)})
    with pytest.raises(NumericError, match=r"step 8: .* not finite.*, as those of 4 of the last 100 steps"):
        pretrain("digits/mae", small_fields | {"train.steps": 12})
    folder = Path(small_fields["run_dir"]) / "checkpoints"
    assert checkpoint.steps(folder)[-1] == 8  # what there is is saved
    with pytest.raises(NumericError, match=r"step 9: .* not finite"):  # it remembers
        poison(monkeypatch, {64})
        pretrain("digits/mae", small_fields | {"train.steps": 12})


class Normed(Objective):
    """Has running statistics, as some backbones do."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.norm = torch.nn.BatchNorm1d(3)


def bad_steps(folder: Path, **train: Any) -> BadSteps:
    recipe = load("digits/mae", {"run_dir": str(folder)} | {f"train.{key}": value for key, value in train.items()})
    return BadSteps(SimpleNamespace(recipe=recipe, past=Past(), objective=Normed()), rank=0)  # type: ignore[arg-type]


def bad_step(number: int) -> Step:
    return Step(number, [], [], torch.tensor(float("nan")))


def test_bad_steps_long_ago_are_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = bad_steps(tmp_path)
    for number in range(1, 20):
        assert bad.leave_out(bad_step(number * (WINDOW // MOST + 1))) == ""
    assert len(bad.parts.past.left_out) == 19
    assert "it is left out (1 of 3 in 100 steps)" in " ".join(capsys.readouterr().err.split())
    assert bad_steps(tmp_path, on_nonfinite="stop").leave_out(bad_step(5)).startswith("step 5: ")


@pytest.mark.parametrize("told", [None, 1.0, 0.0])
def test_running_statistics_are_as_if_a_bad_step_had_not_been(tmp_path: Path, told: float | None) -> None:
    """Known to the host (None), or to the device alone; of a good step they stay."""
    bad = bad_steps(tmp_path)
    objective = bad.objective
    assert isinstance(objective, Normed)
    objective.norm(torch.randn(4, 3))
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    bad.keep()
    objective.norm(torch.full((4, 3), float("nan")))
    assert objective.norm.running_mean is not None and objective.norm.running_mean.isnan().all()
    bad.undo() if told is None else bad.put_back(torch.tensor(told))
    same = all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert same == (told != 0.0)


def test_vectors_that_are_not_finite_are_left_out_too(small_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is watched for collapse comes of the same forward pass as the loss."""
    forward = VICReg.forward

    def poisoned(self: VICReg, batch: Any) -> Any:
        if 16 in batch.positions:
            batch = replace(batch, views=tuple(view * float("nan") for view in batch.views))
        return forward(self, batch)

    monkeypatch.setattr(VICReg, "forward", poisoned)
    fields = {key: value for key, value in small_fields.items() if "decoder" not in key}
    pretrain("digits/vicreg", fields | {"objective.expander_width": 16})
    lines = read_lines(Path(small_fields["run_dir"]) / "metrics.jsonl")
    assert [line.get("left_out") for line in lines] == [None, None, 1, None, None, None]
    assert ["watch/embedding/std" in line for line in lines] == [True, True, False, True, True, True]


def test_all_ranks_wait_for_the_last_save_of_a_run_that_ends_so(start: Start, tmp_path: Path) -> None:
    fields = {"train.steps": 8, "train.on_nonfinite": "stop", **POISONED}
    job = start(2, "save.copy sleep=4 step=3", fields, environment={"POISON": "20"})
    assert job.wait(60) == [70, 70], job.told()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 3


def test_a_resumed_run_leaves_out_the_same_step(start: Start, tmp_path: Path) -> None:
    """Exact resume would loop for ever over a bad step, if it were not left out again."""
    fields = {"train.steps": 8, "train.save_every": 2, **POISONED}
    for name, faults in (("whole", ""), ("killed", "update kill step=4")):
        folder = {"run_dir": tmp_path / name}
        start(1, faults, fields | folder, environment={"POISON": "20"}).wait(60)
    again = start(1, "", fields | {"run_dir": tmp_path / "killed"}, environment={"POISON": "20"})
    assert again.wait(60) == [0], again.told()
    for name in ("model", "optim"):
        a, b = (weights(tmp_path / folder, 8, name) for folder in ("whole", "killed"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    state = json.loads((tmp_path / "killed" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["past"]["left_out"] == [3]


def test_what_an_objective_noted_of_a_bad_step_is_forgotten(
    small_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DINO's centre moves by the outputs of its own step: two views of 8 images, also after a step that was left out."""
    forward, after_step, counted = DINO.forward, DINO.after_step, []

    def poisoned(self: DINO, batch: Any) -> Any:
        loss = forward(self, batch)
        return loss._replace(total=loss.total * (float("nan") if 16 in batch.positions else 1.0))

    def counting(self: DINO, step: int, steps: int) -> None:
        counted.append((step, self.seen[0][1].item()))
        after_step(self, step, steps)

    monkeypatch.setattr(DINO, "forward", poisoned)
    monkeypatch.setattr(DINO, "after_step", counting)
    fields = {key: value for key, value in small_fields.items() if "decoder" not in key}
    fields |= {"objective.outputs": 16, "objective.head_width": 8, "objective.bottleneck": 8, "encoder.heads": 2}
    pretrain("digits/dino", fields)
    assert counted == [(step, 16) for step in (1, 2, 4, 5, 6)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    good = {"model": {"w": torch.ones(3)}}
    checkpoint.save(tmp_path, 1, {}, good, keep=2)
    bad = {"model": {"w": torch.ones(3), "v": torch.tensor([0.0, value])}}
    with pytest.raises(NumericError, match="model: v is not finite, so that nothing was saved"):
        checkpoint.save(tmp_path, 2, {}, bad, keep=2)
    assert checkpoint.steps(tmp_path) == [1]


def test_a_poisoned_weight_ends_the_run_and_the_last_good_one_stays(start: Start, tmp_path: Path) -> None:
    """Nothing finite comes of a weight that is not, so that every step is left out until the patience ends."""
    job = start(1, fields={"train.steps": 30, **POISONED}, environment={"POISON_WEIGHT": "5"})
    assert job.wait(60) == [70], job.told()
    newest, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "step-00000003"
    assert "is not finite, so that nothing was saved; the checkpoint before is untouched" in job.told()


def test_a_loss_that_runs_away_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = DivergenceWatch(Past())
    for look in range(20):
        watch(10 * look, 1.0 + 0.01 * (look % 2), quiet=False)
    assert capsys.readouterr().err == ""
    for look in range(20, 20 + PATIENCE):
        assert capsys.readouterr().err == ""
        watch(10 * look, 1.9, quiet=False)
    assert "warning: step 220: the loss is 1.9, far above the 1.00" in " ".join(capsys.readouterr().err.split())
    watch(500, 30.0, quiet=False)
    assert capsys.readouterr().err == ""


def test_losses_that_fall_or_wobble_raise_no_alarm() -> None:
    past = Past()
    watch = DivergenceWatch(past)
    draws = torch.Generator().manual_seed(0)
    for look in range(2000):
        watch(look, 5 * 0.995**look + 0.5 + 0.1 * torch.randn((), generator=draws).item(), quiet=True)
    assert past.told == [] and past.looks > 1990


def test_two_high_losses_are_no_alarm() -> None:
    past = Past()
    watch = DivergenceWatch(past)
    for look in range(WARM + 10):
        watch(look, 1.0, quiet=True)
    for loss in (1.9, 1.9, 1.0, 1.9, 1.9, 1.0):
        watch(99, loss, quiet=True)
    assert past.told == []


def test_a_loss_far_above_that_of_untrained_weights_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    watch = DivergenceWatch(Past())
    for step, loss in ((1, 1.0), (10, 1.9), (20, 2.1)):
        assert capsys.readouterr().err == ""
        watch(step, loss, quiet=False)
    assert "step 20: the loss is 2.1, above the 1 of untrained weights" in " ".join(capsys.readouterr().err.split())


def test_a_rate_a_hundred_times_too_high_raises_the_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe as it is shipped; at its own rate nothing is said."""
    fields = {"train.steps": 30, "train.epochs": None, "train.workers": 0, "eval.train": None, "eval.test": None}
    fields |= {"train.batch_size": 32}
    own = load("digits/rotation", fields | {"run_dir": "x"}).optim.lr
    for factor in (1, 100):
        pretrain("digits/rotation", fields | {"run_dir": str(tmp_path / str(factor)), "optim.lr": factor * own})
        assert ("of untrained weights" in capsys.readouterr().err) == (factor == 100)


def test_the_first_steps_are_compared_with_untrained_weights_only(capsys: pytest.CaptureFixture[str]) -> None:
    """A loss that doubles is told at once; one that trembles leaves no past behind by which the next looks would judge."""
    past = Past()
    watch = DivergenceWatch(past)
    for step, loss in enumerate((1.0, 0.9, 1.5, 1.9, 0.5, 1.9, 1.9, 1.9, 1.9), start=1):
        watch(step, loss, quiet=False)
    assert (past.looks, past.mean, past.high) == (1, 1.0, 0)
    assert not past.told
    watch(9, 2.1, quiet=False)
    assert "above the 1 of untrained weights" in capsys.readouterr().err
