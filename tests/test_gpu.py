"""The GPU's own step: late steps, steps that wait for nothing, and copies beside what is computed. Written without a GPU at
hand; those that need one skip themselves, and what can run on a CPU too does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsight import switches
from selfsight.assemble import Parts, assemble
from selfsight.backward import deterministic
from selfsight.data.loader import HostBatch
from selfsight.data.placer import arrived, sent
from selfsight.objectives.mae import MAE
from selfsight.processes import join
from selfsight.recipe import load
from selfsight.saver import on_the_cpu
from selfsight.train import train
from selfsight.verdict import Verdicts

Fields = dict[str, Any]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: what its queue and its copies do")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
BAD = {13, 14, 33}
STEPS = 34


@pytest.fixture
def learned(small_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Parts]:
    """Train a small MAE on a device, late or not, with bad numbers in these steps (from 1)."""

    def run(device: str, late: bool, bad: set[int]) -> Parts:
        fields = small_fields | {"run_dir": str(tmp_path / f"{device}-{late}"), "train.device": device}
        fields |= {"train.steps": STEPS, "train.log_every": 10, "train.save_every": 40, "train.ema": 0.9}
        recipe = load("digits/mae", fields | {"optim.clip": 0.1, "train.precision": "fp32"})
        recipe.run_dir.mkdir()
        forward = MAE.forward

        def poisoned(self: MAE, batch: Any) -> Any:
            if int(batch.positions[0]) // 8 + 1 in bad:
                batch = replace(batch, views=tuple(view * float("nan") for view in batch.views))
            return forward(self, batch)

        with monkeypatch.context() as patch:
            patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            patch.setattr(MAE, "forward", poisoned)
            patch.setattr("selfsight.train.may_be_late", lambda *_: late)
            # Free memory may differ between two runs, and with it how many blocks are recomputed.
            patch.setattr(switches, "free_memory", lambda _: 2**40)
            accelerator = join(recipe)
            assert accelerator.device.type == device
            parts = assemble(recipe, accelerator.device)
            # Some of a GPU's kernels sum in another order every time, and two runs are to be compared to the bit.
            with deterministic():
                train(parts, accelerator)
        return parts

    return run


def state(parts: Parts) -> dict[str, Tensor]:
    """Weights, average, moments and step counts."""
    assert parts.average
    found = dict(parts.objective.state_dict())
    found |= {f"average {name}": value for name, value in parts.average.state_dict().items()}
    for parameter, name in parts.names.items():
        found |= {f"{kind} {name}": value for kind, value in parts.optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_a_late_run_learns_what_one_that_waits_learns(device: str, learned: Callable[..., Parts]) -> None:
    waiting, late = (learned(device, late, BAD) for late in (False, True))
    assert waiting.past.left_out == late.past.left_out == sorted(BAD)
    one, other = state(waiting), state(late)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    counts = {int(value) for name, value in other.items() if name.startswith("step ")}
    assert counts == {STEPS - len(BAD)}


@contextmanager
def refused(device: str) -> Iterator[None]:
    """Within it, an operation that makes the host wait for the GPU raises."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_steps_that_are_not_logged_make_nobody_wait(
    device: str, learned: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first operation of such a step to its last one; what is heard is an event's, which the mode allows."""
    watched: list[int] = []
    guard: list[Any] = []

    def at(point: str, step: int) -> None:
        if point == "learn" and 22 <= step <= 28:
            guard.append(refused(device))
            guard[-1].__enter__()
        if point == "update" and guard:
            guard.pop().__exit__(None, None, None)
            watched.append(step)

    monkeypatch.setattr("selfsight.train.faultpoint", at)
    try:
        learned(device, True, set())
    finally:
        while guard:
            guard.pop().__exit__(None, None, None)
    assert watched == [*range(22, 29)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_saved_copy_has_the_values_of_its_moment(device: str) -> None:
    """Whatever is queued before it is in it, and what is queued behind it is not."""
    size = 4096 if device == "cuda" else 64
    factor = torch.full((size, size), 1 / size, device=device)
    weights = {
        "w": torch.zeros(size, size, device=device),
        "transposed": torch.arange(6.0, device=device).view(2, 3).t(),
    }
    weights["n"] = torch.tensor(2, device=device)
    for _ in range(20):  # keeps a GPU busy while the copy is asked for
        weights["w"] = weights["w"] @ factor + 1
    copied = on_the_cpu(weights)
    assert all(not value.is_pinned() for value in copied.values())
    for value in weights.values():
        value.add_(7)
    assert torch.allclose(copied["w"], torch.full((size, size), 20.0))
    assert copied["transposed"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]] and copied["n"] == 2


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_whole_under_a_busy_queue(device: str) -> None:
    """Copies of batches ahead, whose memory is used again and again while the GPU is far behind."""
    on, rows = torch.device(device), 512 if device == "cuda" else 4
    factor = torch.full((2048, 2048), 1 / 2048, device=on) if device == "cuda" else torch.ones(2, 2)
    empty, sums, ahead = torch.empty(0, dtype=torch.int64), [], []

    def made(number: int) -> HostBatch:
        view = torch.full((rows, 3, 64, 64), number, dtype=torch.uint8)
        return HostBatch((view.pin_memory() if device == "cuda" else view,), empty, empty, empty, [])

    busy = factor
    for number in range(24):
        ahead.append(sent(made(number), on))
        if len(ahead) < 3:
            continue
        for _ in range(10 if device == "cuda" else 1):
            busy = busy @ factor
        (view,) = arrived(ahead.pop(0).views, on)
        assert view.device.type == device
        sums.append((view.float() - (number - 2)).abs().amax())  # queued; read only at the end
        del view
    assert torch.stack(sums).tolist() == [0.0] * 22


@GPU
def test_an_answer_is_heard_in_the_devices_order() -> None:
    """The word on a norm that is still being computed."""
    from accelerate import Accelerator

    from selfsight.finite import Step
    from selfsight.objectives.base import Loss

    class Bad:
        def leave_out(self, step: Step) -> str:
            return "enough"

    verdicts, device = Verdicts(Accelerator(), Bad()), torch.device("cuda")  # type: ignore[arg-type]
    factor = torch.full((4096, 4096), 1 / 4096, device=device)
    for bad in (False, True, False):
        busy = factor
        for _ in range(20):
            busy = busy @ factor
        norm = busy.sum() / (0.0 if bad else 1.0)
        with refused("cuda"):
            told = verdicts.ask(Step(1, [], [Loss(norm.detach(), {})], norm), [True, False])
        assert verdicts.hear() == (bad, "enough" if bad else "", [True, False])
        assert told.item() == bad
