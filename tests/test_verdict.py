"""Steps whose verdict is heard late: the bits of a run that waits at every step, and no step that waits for the device."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launch import Job
from poison import POISONED
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from selfsight.assemble import Parts, assemble
from selfsight.backward import Averaged, Canonical, buffers_may_differ
from selfsight.collapse import EVERY, CollapseWatch
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import DataGone, NumericError, Stopped
from selfsight.metrics import TIMING
from selfsight.objectives.configs import JointConfig, MAEConfig
from selfsight.objectives.dino import DINO
from selfsight.objectives.joint import Joint
from selfsight.objectives.mae import MAE
from selfsight.objectives.rotation import Rotation
from selfsight.objectives.vicreg import VICReg
from selfsight.processes import StopRequest, join
from selfsight.recipe import DataConfig, EncoderConfig, load
from selfsight.run_folder import read_lines
from selfsight.saver import Saver, on_the_cpu
from selfsight.train import Feeder, train
from selfsight.verdict import Verdicts, may_be_late

Fields = dict[str, Any]
SMALL: dict[str, Fields] = {
    "mae": {"objective.decoder_width": 16, "train.ema": 0.9, "optim.clip": 0.1},
    "dino": {
        "objective.outputs": 16, "objective.head_width": 8, "objective.bottleneck": 8, "encoder.heads": 2, "objective.ibot": 1.0,
    },
    "vicreg": {"objective.expander_width": 16},
    # Batch norms: running statistics change in the forward pass, before anybody knows.
    "rotation": {
        "encoder.name": "test_resnet", "encoder.pool": "mean", "encoder.patch": None, "encoder.width": None,
        "encoder.depth": None, "encoder.heads": None, "encoder.positions": "learned", "encoder.image_size": 32,
    },
}  # fmt: skip


parts_of: dict[bool, Parts] = {}  # of the last run of each kind, also of one that ended early


@pytest.fixture
def run(small_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Parts]:
    """Train `name` late or not, with bad numbers in these steps (from 1); the parts as they stand at its end."""

    def ran(late: bool, bad: set[int], name: str = "mae", stop: StopRequest | None = None, **more: Any) -> Parts:
        fields = {key: value for key, value in small_fields.items() if not key.startswith("objective.")} | SMALL[name]
        fields |= {"train.steps": 14 if name == "rotation" else 34, "run_dir": str(tmp_path / f"{name}-{late}")}
        fields |= {"train.log_every": 10}
        fields |= {"train.save_every": 15, "train.keep": 9} | {f"train.{key}": value for key, value in more.items()}
        recipe = load(f"digits/{name}", fields)
        recipe.run_dir.mkdir(exist_ok=True)
        kind = {"mae": MAE, "dino": DINO, "vicreg": VICReg, "rotation": Rotation}[name]
        forward = kind.forward

        def poisoned(self: Any, batch: Any) -> Any:
            if int(batch.positions[0]) // 8 + 1 in bad:
                batch = replace(batch, views=tuple(view * float("nan") for view in batch.views))
            return forward(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", poisoned)
            patch.setattr("selfsight.train.may_be_late", lambda *_: late)
            accelerator = join(recipe)
            parts = assemble(recipe, accelerator.device)
            parts_of[late] = parts
            train(parts, accelerator, stop)
        return parts

    return ran


def left(parts: Parts) -> dict[str, Any]:
    """All that a run leaves behind: checkpoints, records and lines."""
    folder = parts.recipe.run_dir
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {
            f"{path.relative_to(folder)}/{key}": value.numpy().tobytes() for key, value in load_file(path).items()
        }
    for path in sorted([*folder.glob("bad-steps/*"), *folder.rglob("state.json")]):
        told = json.loads(path.read_text())
        told.pop("recipe", None)
        found[str(path.relative_to(folder))] = told
    lines = read_lines(folder / "metrics.jsonl")
    return found | {"lines": [{key: line[key] for key in line if key not in TIMING} for line in lines]}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what the runs do not share."""
    return [key for key in one | other if key not in one or key not in other or one[key] != other[key]]


@pytest.mark.parametrize(
    ("name", "bad"),
    [("mae", {1, 13, 34}), ("mae", {13, 14, 20}), ("dino", {12, 13, 33}), ("vicreg", {19, 21}), ("rotation", {12})],
    ids=["first and last", "a pair and one that is logged", "a teacher", "beside a look", "running statistics"],
)
def test_a_late_run_is_one_that_waits_bit_for_bit(run: Callable[..., Parts], name: str, bad: set[int]) -> None:
    """Weights, moments, step counts, average, teacher and centre; records of bad steps, lines and what is remembered."""
    one, other = (left(run(late, bad, name)) for late in (False, True))
    assert differing(one, other) == []
    assert sum(key.startswith("bad-steps") for key in one) == len(bad)
    assert any(key.endswith("/step") for key in one)


@pytest.mark.parametrize(("bad", "more"), [({3, 12, 17, 23}, {}), ({17}, {"on_nonfinite": "stop"})])
def test_numbers_end_a_late_run_at_the_same_step(run: Callable[..., Parts], bad: set[int], more: Fields) -> None:
    """The step that is under way when it is heard is taken by nobody."""
    found = []
    for late in (False, True):
        with pytest.raises(NumericError, match=f"step {max(bad)}: the loss or the gradient is not finite") as caught:
            run(late, bad, **more)
        found.append((str(caught.value).replace(f"mae-{late}", "mae"), left(parts_of[late])))
    assert found[0][0] == found[1][0]
    assert differing(found[0][1], found[1][1]) == []
    assert f"checkpoints/step-{max(bad):08d}/state.json" in found[0][1]


def test_a_late_run_stops_after_the_step_in_which_it_is_asked(
    run: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on from there to the same end."""
    whole = left(run(False, {13}, "dino"))
    wanted = {key: value for key, value in whole.items() if "00000034" in key or "00000013" in key}
    assert len(wanted) > 20
    for step in (1, 16, 20):
        stop = StopRequest()

        def ask(point: str, at: int, stop: StopRequest = stop, step: int = step) -> None:
            stop.asked = stop.asked or (point, at) == ("learned", step)

        monkeypatch.setattr("selfsight.train.faultpoint", ask)
        with pytest.raises(Stopped, match=f"after step {step} of 34, saved"):
            run(True, {13}, "dino", stop=stop)
        assert f"checkpoints/step-{step:08d}/state.json" in left(parts_of[True])
        parts = run(True, {13}, "dino")
        found = left(parts)
        assert {key: found[key] for key in wanted} == wanted
        shutil.rmtree(parts.recipe.run_dir)


def test_running_statistics_are_those_of_the_step_after_which_a_late_run_stops(
    run: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step's forward pass has changed them by the time at which all hear of it."""
    found = []
    for late in (False, True):
        stop = StopRequest()

        def ask(point: str, at: int, stop: StopRequest = stop) -> None:
            stop.asked = stop.asked or (point, at) == ("learned", 12)

        monkeypatch.setattr("selfsight.train.faultpoint", ask)
        with pytest.raises(Stopped, match="after step 12 of 14, saved"):
            run(late, set(), "rotation", stop=stop)
        found.append(left(parts_of[late]))
    assert differing(*found) == []
    assert any("step-00000012" in key and "running_mean" in key for key in found[1])


@pytest.mark.parametrize("late", [False, True])
def test_data_that_go_away_end_a_run_that_is_saved(
    run: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """A late one ends a step earlier than the data do: it needs a batch for the step in which all hear of it."""

    def gone(point: str, at: int) -> None:
        if (point, at) == ("data", 18):
            raise DataGone("the bucket is away")

    monkeypatch.setattr("selfsight.train.faultpoint", gone)
    with pytest.raises(
        DataGone, match=f"the bucket is away\nthe run ended after step {16 if late else 17} of 34, saved"
    ):
        run(late, set())
    assert f"checkpoints/step-{16 if late else 17:08d}/state.json" in left(parts_of[late])


def test_two_late_ranks_leave_out_what_is_bad_on_one(start: Callable[..., Job], tmp_path: Path) -> None:
    """A loss that is not finite on the second rank alone, in a step that nobody waits for."""
    fields = {"train.steps": 18, "train.log_every": 10, "train.save_every": 12, "train.keep": 9, **POISONED}
    for late in ("", "1"):
        job = start(
            2, fields=fields | {"run_dir": tmp_path / f"run{late}"}, environment={"POISON": "134", "LATE": late}
        )
        assert job.wait(90) == [0, 0], job.told()
    one, other = tmp_path / "run", tmp_path / "run1"
    assert sorted(path.name for path in (other / "bad-steps").iterdir()) == [
        "step-00000017-rank-0.json",
        "step-00000017-rank-1.json",
    ]
    for path in sorted(one.glob("checkpoints/*/*.safetensors")):
        a, b = load_file(path), load_file(other / path.relative_to(one))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for rank in (0, 1):
        told = [
            [line for line in read_lines(folder / "ledger" / f"rank-{rank}.jsonl") if line] for folder in (one, other)
        ]
        assert told[0] == told[1] and len(told[0]) == 18


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_fused_adamw_leaves_a_bad_step_out_to_the_bit(found: float) -> None:
    """torch's own contract with gradient scalers, on which a late step stands: step counts, too."""
    weights = torch.nn.Parameter(torch.randn(7, 5))
    optimizer = AdamW([weights], fused=True, weight_decay=0.1)
    for _ in range(2):
        weights.grad = torch.randn(7, 5)
        optimizer.step()
    before = [weights.detach().clone(), *(value.clone() for value in optimizer.state[weights].values())]
    weights.grad = torch.full((7, 5), float("nan")) if found else torch.randn(7, 5)
    optimizer.found_inf = torch.tensor(found)  # type: ignore[attr-defined]
    optimizer.step()
    after = [weights.detach(), *optimizer.state[weights].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == bool(found)


class Waits(TorchDispatchMode):
    """Notes operations that make a host wait for a GPU: those whose result, or its size, the host must know."""

    KINDS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.phase, self.step = "", 0
        self.found: list[tuple[int, str, str]] = []
        self.calls: list[tuple[str, int]] = []
        """Questions and answers, by step."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind in str(func) for kind in self.KINDS):
            self.found.append((self.step, self.phase, str(func)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Notes them by step and phase; data are read in this process, where they wait for nobody."""
    mode = Waits()

    def at(point: str, step: int) -> None:
        mode.phase = point
        mode.step = step if point == "learn" else mode.step

    def looping(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def looped(*arguments: Any) -> Any:
            mode.phase = "loop"
            mode.calls.append((name, mode.step))
            return real(*arguments)

        return looped

    monkeypatch.setattr("selfsight.train.faultpoint", at)
    for name in ("ask", "hear"):
        monkeypatch.setattr(Verdicts, name, looping(name, getattr(Verdicts, name)))
    read = Feeder.read

    def reading(self: Feeder) -> None:
        read(self)
        mode.phase = "loop"

    monkeypatch.setattr(Feeder, "read", reading)
    with mode:
        yield mode


@pytest.mark.parametrize("name", ["mae", "dino", "vicreg"])
def test_the_loop_reads_nothing_in_a_normal_step(
    run: Callable[..., Parts], waits: Waits, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the loop reads a tensor in steps that are not logged, looked at or saved; others do.

    What objectives and the placer do is not watched here (tests/test_packing.py).
    """
    looks: list[int] = []
    look = CollapseWatch.__call__
    monkeypatch.setattr(
        CollapseWatch, "__call__", lambda self, step, *more: (looks.append(step), look(self, step, *more))[1]
    )
    run(True, set(), name)
    assert looks == [1, 10, 20, 30, 34]  # those of the first steps are of the loss alone
    of_the_loop = {step for step, phase, _ in waits.found if phase in ("loop", "update", "learned")}
    assert not of_the_loop - {*range(1, EVERY), 10, 15, 20, 30, 34}
    assert {10, 20, 34} <= of_the_loop
    order = {step: [name for name, at in waits.calls if at == step] for step in range(1, 35)}
    assert order[12] == order[13] == order[33] == ["hear", "ask"]  # of the step before, and of this one
    assert order[11] == order[21] == ["ask"] and order[9] == ["ask", "hear"] and order[10] == ["ask", "hear"]
    assert order[20] == order[34] == ["hear", "ask", "hear"]


def test_what_cannot_follow_the_device_is_waited_for() -> None:
    class Own(MAE):
        def after_step(self, step: int, steps: int) -> None:
            """Something that nobody can take back."""

    weights = [torch.nn.Parameter(torch.zeros(1))]
    fused, plain, gpu = AdamW(weights, fused=True), AdamW(weights), torch.device("cuda")
    bare: Callable[[type], Any] = lambda kind: kind.__new__(kind)  # noqa: E731 - what it is made of does not matter here
    assert may_be_late(gpu, bare(MAE), fused) and may_be_late(gpu, bare(DINO), fused)
    assert not may_be_late(torch.device("cpu"), bare(MAE), fused)
    assert not may_be_late(gpu, bare(MAE), plain)
    assert not may_be_late(gpu, bare(Own), fused)


def test_the_word_of_a_step() -> None:
    """A loss or a norm that is not finite makes it bad; reasons of the host travel with it."""
    from selfsight.finite import Step
    from selfsight.objectives.base import Loss

    told: list[int] = []

    class Bad:
        def leave_out(self, step: Step) -> str:
            told.append(step.done)
            return "enough"

    verdicts = Verdicts(Accelerator(cpu=True), Bad())  # type: ignore[arg-type]
    for number, (loss, norm) in enumerate([(1.0, 2.0), (float("nan"), 2.0), (1.0, float("inf"))]):
        losses = [Loss(torch.tensor(value), {}) for value in (0.5, loss)]
        flag: Tensor = verdicts.ask(Step(number, [], losses, torch.tensor(norm)), [False, True, False])
        assert flag.item() == (number > 0)
        assert verdicts.hear() == (number > 0, "enough" if number else "", [False, True, False])
        assert verdicts.open is None
    assert told == [1, 2]


def test_the_losses_of_a_step_keep_no_graph(small_fields: Fields) -> None:
    """It would lie in memory beside that of the next forward pass."""
    parts = assemble(load("digits/mae", small_fields), torch.device("cpu"))
    place, batches = parts.placer(torch.device("cpu")), parts.batches()
    for backward in (Averaged, partial(Canonical, parts=2)):
        losses = backward(parts.objective, Accelerator(cpu=True))([batches[0], batches[1]], place)
        assert [loss.total.requires_grad for loss in losses] == [False] * len(losses)
        assert all(not term.requires_grad for loss in losses for term in loss.terms.values())


def test_buckets_hold_the_gradients_and_buffers_travel_only_where_they_differ(small_fields: Fields) -> None:
    parts, accelerator = assemble(load("digits/mae", small_fields), torch.device("cpu")), Accelerator(cpu=True)
    Averaged(parts.objective, accelerator)
    assert accelerator.ddp_handler.to_kwargs() == {"gradient_as_bucket_view": True}
    buffers = {name for name, _ in parts.objective.named_buffers()}
    assert buffers and {*parts.objective._ddp_params_and_buffers_to_ignore} == buffers
    parts.objective.add_module("norm", torch.nn.BatchNorm1d(2))
    Averaged(parts.objective, accelerator)
    assert not parts.objective._ddp_params_and_buffers_to_ignore


def test_buffers_of_a_plugin_travel(small_fields: Fields) -> None:
    """Also of one that is a part of a joint, and of a subclass of a built-in objective."""

    class Own(MAE):
        """Of this module, which is none of the package's."""

    encoder = EncoderConfig(image_size=8, channels=1, patch=4, width=16, depth=1, heads=2)
    built = build_encoder(encoder, preprocessing_of(DataConfig(train="x"), encoder), 0)
    plain, own = (kind(built, MAEConfig(decoder_width=16, decoder_depth=1)) for kind in (MAE, Own))
    assert not buffers_may_differ(plain) and buffers_may_differ(own)
    part: dict[str, Any] = {"objective": {"name": "mae", "decoder_width": 16}}
    joint = Joint(built, JointConfig(parts={"one": part, "two": part}))
    assert not buffers_may_differ(joint)
    joint.parts["three"] = own
    assert buffers_may_differ(joint)


def test_a_save_is_left_out_before_anything_is_gathered_for_it(tmp_path: Path) -> None:
    saver, going = Saver(tmp_path, 1, 5, tmp_path / "log"), threading.Event()
    assert not saver.leaves_out(1, wait=False)
    saver.thread = threading.Thread(target=going.wait, daemon=True)
    saver.thread.start()
    assert [saver.leaves_out(step, wait) for step, wait in ((1, False), (1, True), (5, False))] == [True, False, False]
    going.set()
    saver.finish()
    assert not saver.leaves_out(1, wait=False)


def test_a_saved_copy_is_a_copy() -> None:
    weights = {"w": torch.zeros(3), "n": torch.tensor(2)}
    copied = on_the_cpu(weights)
    weights["w"] += 1
    assert copied["w"].tolist() == [0, 0, 0] and copied["n"] == 2
