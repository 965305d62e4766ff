"""The loop: resumed runs repeat the uninterrupted one bit for bit; ranks and micro-batches compute the same."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from safetensors.torch import load_file

from selfsight import checkpoint
from selfsight.assemble import Parts, assemble
from selfsight.collapse import LIMITS, Limits
from selfsight.encoder import build_encoder
from selfsight.errors import DataError, NumericError, Stopped, UsageError
from selfsight.loading import load_encoder
from selfsight.metrics import TIMING, Meter
from selfsight.objectives.mae import MAE
from selfsight.processes import StopRequest, join
from selfsight.recipe import load
from selfsight.run_folder import read_lines
from selfsight.train import due, pretrain, train
from selfsight.weights import load_weights

pytestmark = pytest.mark.usefixtures("unchecked_export")
Fields = dict[str, Any]
Runner = Callable[..., subprocess.CompletedProcess[str]]


def learned(folder: Path) -> list[dict[str, Any]]:
    """The metrics without the wall-clock fields."""
    return [
        {key: value for key, value in line.items() if key not in TIMING}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def weights(folder: Path, step: int, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> bool:
    """Equal but for rounding. The key's bias has no gradient (softmax ignores it), so that AdamW scales up pure rounding."""
    return (
        all(torch.allclose(a[key], b[key], atol=tolerance) for key in a if not key.endswith("qkv.bias"))
        and a.keys() == b.keys()
    )


def words(fields: Fields) -> list[str]:
    return [word for key, value in fields.items() for word in (f"--{key}", "null" if value is None else str(value))]


def test_a_run_leaves_what_was_promised(
    small_fields: Fields, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 50)
    folder = Path(small_fields["run_dir"])
    scored = {"eval.train": str(small_shards), "eval.test": str(small_shards), "eval.every": 4, "eval.k": [5, 10]}
    scores = pretrain("digits/mae", small_fields | scored)
    assert sorted(os.listdir(folder)) == [
        "checkpoints",
        "encoder",
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "scores.json",
    ]
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) - {"energy_kwh"} == {"step", "epoch", "loss", "loss/floor", "lr", "grad_norm", *TIMING[:4]}
    assert [line["step"] for line in lines if "knn" in line] == [4, 6]
    assert all(1 <= line["rankme"] <= 16 for line in lines if "rankme" in line)
    assert lines[-1]["epoch"] == pytest.approx(6 * 8 / 120)
    assert checkpoint.steps(folder / "checkpoints") == [3, 6]
    assert scores == json.loads((folder / "scores.json").read_text())
    assert {s["encoder"] for s in scores["scores"]} == {"pretrained", "random-init", "pixels", "majority"}
    before = (folder / "scores.json").stat().st_mtime_ns
    assert pretrain("digits/mae", small_fields | scored) == scores  # finished: nothing is done again
    assert (folder / "scores.json").stat().st_mtime_ns == before


def test_the_resolved_recipe_repeats_the_run(small_fields: Fields, tmp_path: Path) -> None:
    first = Path(small_fields["run_dir"])
    pretrain("digits/mae", small_fields)
    pretrain(first / "recipe.yaml", {"run_dir": str(tmp_path / "again")})
    assert learned(first) == learned(tmp_path / "again")
    assert same(weights(first, 6), weights(tmp_path / "again", 6))


def test_a_finished_run_that_goes_on_is_exported_again(small_fields: Fields) -> None:
    folder = Path(small_fields["run_dir"])
    for steps in (6, 8):
        pretrain("digits/mae", small_fields | {"train.steps": steps}, allow_change=("train.steps",))
        exported = load_file(folder / "encoder" / "model.safetensors")
        trained = {name.rpartition(".")[2]: tensor for name, tensor in weights(folder, steps).items()}
        assert torch.equal(exported["cls_token"], trained["cls_token"])
        assert (folder / "scores.json").exists() and f"step {steps}" in (folder / "report.html").read_text()


def test_a_killed_run_goes_on_bit_for_bit(
    small_fields: Fields, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 while it trains, then the same command: every line and weight of the uninterrupted run."""
    fields = small_fields | {"train.steps": 40, "train.save_every": 7, "train.ema": 0.9, "train.workers": 1}
    fields |= {"train.accumulate": 2, "optim.clip": 0.1, "encoder.drop_path": 0.3, "encoder.depth": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    alone = {"train.workers": 0}  # so that the number of workers is seen to change nothing, too
    pretrain("digits/mae", fields | alone | {"run_dir": str(whole)})
    command = [sys.executable, "-m", "selfsight", "pretrain", "digits/mae", *words(fields | {"run_dir": killed})]
    marked = {**os.environ, "OMP_NUM_THREADS": "1", "SELFSIGHT_TEST_MARK": str(tmp_path)}
    victim = subprocess.Popen(command, env=marked, stderr=subprocess.DEVNULL)
    wait_for_step(killed, 25, victim)
    victim.kill()
    victim.wait()
    assert victim.returncode == -signal.SIGKILL
    assert not survivors(str(tmp_path))
    pretrain("digits/mae", fields | alone | {"run_dir": str(killed)})
    assert "goes on from step" in capsys.readouterr().err
    assert learned(killed) == learned(whole)
    assert len(learned(whole)) == 40
    for name in ("model", "optim", "ema"):
        assert same(weights(killed, 40, name), weights(whole, 40, name))
    exported = [(folder / "encoder" / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert exported[0] == exported[1]


def survivors(mark: str) -> list[str]:
    """Processes that were started with this mark and live on 10 seconds later: loader workers left behind."""
    found: list[str] = []
    for _ in range(100):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text())
            except OSError:  # it has just ended
                continue
        if not found:
            break
        time.sleep(0.1)
    return found


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[Any]) -> None:
    for _ in range(2400):
        lines = read_lines(folder / "metrics.jsonl")
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)
    pytest.fail(f"did not reach step {step} in 2 minutes")


def test_a_signal_saves_and_says_run_me_again(small_fields: Fields) -> None:
    """To the whole process group, as terminals and SLURM do; the loader's workers get it, too."""
    folder = Path(small_fields["run_dir"])
    fields = words(small_fields | {"train.steps": 100_000, "train.save_every": 50_000, "train.workers": 1})
    command = [sys.executable, "-m", "selfsight", "pretrain", "digits/mae", *fields]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_step(folder, 20, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == Stopped.exit_code == 75, told
    last = read_lines(folder / "metrics.jsonl")[-1]["step"]
    assert checkpoint.steps(folder / "checkpoints")[-1] == last
    assert f"stopped on request after step {last} of 100,000, saved; run the same command to go on" in told
    assert "Traceback" not in told
    assert not (folder / "run.lock").exists()
    assert (folder / "stopped").read_text() == f"{last}\n"  # what a requeueing script looks for


def test_two_ranks_learn_what_one_learns(small_fields: Fields, tmp_path: Path) -> None:
    """launch.sh, gloo, two processes: the same global batches, losses to 1e-5, weights to rounding."""
    fields = small_fields | {"train.steps": 12}
    pretrain("digits/mae", fields | {"run_dir": str(tmp_path / "one")})
    done = subprocess.run(
        [ROOT / "launch.sh", "digits/mae", *words(fields | {"run_dir": tmp_path / "two"})], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PROCESSES": "2", "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stderr
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=1e-5) for key in a)
    assert close(weights(tmp_path / "one", 12), weights(tmp_path / "two", 12), 1e-4)


def test_micro_batches_are_the_batch(small_fields: Fields, tmp_path: Path) -> None:
    for accumulate in (1, 4):
        pretrain(
            "digits/mae", small_fields | {"run_dir": str(tmp_path / str(accumulate)), "train.accumulate": accumulate}
        )
    for a, b in zip(learned(tmp_path / "1"), learned(tmp_path / "4"), strict=True):
        assert all(a[key] == pytest.approx(b[key], abs=1e-5) for key in a)


def test_the_loop_is_a_plain_loop(small_fields: Fields) -> None:
    """Six steps by hand, with nothing of the loop but the parts, give the loop's losses and weights."""
    fields = small_fields | {"optim.clip": 0.05, "optim.lr": 0.01}
    pretrain("digits/mae", fields)
    parts = assemble(load("digits/mae", fields), torch.device("cpu"))
    batches, lines = parts.batches(), learned(parts.recipe.run_dir)
    place = parts.placer(torch.device("cpu"))
    decayed = [
        p for n, p in parts.objective.named_parameters() if p.requires_grad and p.ndim > 1 and not n.endswith("token")
    ]
    others = [p for p in parts.objective.parameters() if p.requires_grad and all(p is not d for d in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(6):
        loss = parts.objective(place(batches[step])).total
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parts.objective.parameters(), 0.05)
        rate = lines[step]["lr"]
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert loss.item() == pytest.approx(lines[step]["loss"], rel=1e-5)
        assert norm.item() == pytest.approx(lines[step]["grad_norm"], rel=1e-4)
    assert close(parts.objective.state_dict(), weights(parts.recipe.run_dir, 6), 1e-5)


def test_bf16_recomputation_and_compilation_run(small_fields: Fields) -> None:
    pretrain("digits/mae", small_fields | {"train.precision": "bf16", "train.checkpoint_blocks": True})
    losses = [line["loss"] for line in learned(Path(small_fields["run_dir"]))]
    assert np.isfinite(losses).all()


def test_the_average_is_what_is_exported(small_fields: Fields) -> None:
    pretrain("digits/mae", small_fields | {"train.ema": 0.5})
    folder = Path(small_fields["run_dir"])
    exported = load_file(folder / "encoder" / "model.safetensors")
    average = {name.removeprefix("backbone."): value for name, value in weights(folder, 6, "ema").items()}
    assert same(exported, average)
    live = {n.removeprefix("encoder.backbone."): v for n, v in weights(folder, 6).items() if n.startswith("encoder.")}
    assert not same(exported, live)


def test_a_teacher_that_moves_is_saved_resumed_and_scored(small_fields: Fields, tmp_path: Path) -> None:
    fields = {key: value for key, value in small_fields.items() if not key.startswith("objective.")}
    fields |= {"objective.outputs": 16, "objective.head_width": 8, "objective.bottleneck": 8, "encoder.heads": 2}
    recipe = load("digits/dino", fields | {"train.epochs": None})

    recipe.run_dir.mkdir()

    def run() -> Parts:
        accelerator = join(recipe)
        parts = assemble(recipe, accelerator.device)
        train(parts, accelerator)
        return parts

    parts, checkpoints = run(), recipe.run_dir / "checkpoints"
    first = weights(recipe.run_dir, 6)
    assert any(name.startswith("teacher.backbone.") for name in first)
    assert not torch.equal(first["teacher.backbone.cls_token"], first["encoder.backbone.cls_token"])
    assert first["center"].any()
    shutil.rmtree(checkpoints / "step-00000006")
    run()
    assert same(weights(recipe.run_dir, 6), first)
    scored = load_encoder(recipe.run_dir)
    teacher = parts.objective.scored
    assert parts.scored is teacher is not parts.encoder
    assert all(torch.equal(a, b) for a, b in zip(scored.parameters(), teacher.parameters(), strict=True))
    other = build_encoder(recipe.encoder, scored.preprocessing, seed=9)
    load_weights(other, str(checkpoints / "step-00000006"), recipe.encoder.name)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), teacher.parameters(), strict=True))


def test_the_alarm_stops_a_run_that_is_told_to(small_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "embedding", Limits(std=2.0))  # no vectors are so different
    fields = {key: value for key, value in small_fields.items() if not key.startswith("objective.")}
    told = {"objective.expander_width": 16, "train.on_collapse": "stop", "train.steps": 100, "train.log_every": 25}
    recipe = load("digits/vicreg", fields | told)
    recipe.run_dir.mkdir()
    accelerator = join(recipe)
    with pytest.raises(NumericError, match="step 50: collapse: the embedding vectors"):  # 25 is no look
        train(assemble(recipe, accelerator.device), accelerator)
    lines = read_lines(recipe.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [25]
    assert {"watch/embedding/std", "watch/embedding/cosine", "watch/embedding/rank"} <= set(lines[0])


def test_continuing_from_weights(small_fields: Fields, tmp_path: Path) -> None:
    pretrain("digits/mae", small_fields)
    first = Path(small_fields["run_dir"])
    fields = small_fields | {
        "run_dir": str(tmp_path / "next"),
        "encoder.weights": str(first / "encoder"),
        "train.steps": 1,
        "optim.lr": 1e-12,
    }
    pretrain("digits/mae", fields)
    before, after = (
        load_file(first / "encoder" / "model.safetensors"),
        load_file(tmp_path / "next" / "encoder" / "model.safetensors"),
    )
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_a_gradient_that_is_not_finite_touches_nothing(small_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MAE.forward

    def poisoned(self: MAE, batch: Any) -> Any:
        loss = real(self, batch)
        return loss._replace(total=loss.total * (float("nan") if 32 in batch.positions else 1.0))

    monkeypatch.setattr(MAE, "forward", poisoned)
    with pytest.raises(
        NumericError, match=r"step 5: the loss or the gradient is not finite, .*; the weights are those of step 4"
    ):
        pretrain("digits/mae", small_fields | {"train.on_nonfinite": "stop"})
    folder = Path(small_fields["run_dir"])
    assert all(torch.isfinite(value).all() for value in weights(folder, 5).values())
    assert [line["step"] for line in learned(folder)] == [1, 2, 3, 4, 5]


def test_another_recipe_is_refused_and_named(small_fields: Fields, tmp_path: Path) -> None:
    pretrain("digits/mae", small_fields)
    before = (Path(small_fields["run_dir"]) / "recipe.yaml").read_text()
    with pytest.raises(UsageError, match=r"another recipe: optim.lr \(was 0.003, is 0.1\); seed \(was 0, is 1\)"):
        pretrain("digits/mae", small_fields | {"optim.lr": 0.1, "seed": 1})
    with pytest.raises(UsageError, match=r"another recipe: data.train \(was '\w+', is '\w+'\)"):
        pretrain("digits/mae", small_fields | {"data.train": "digits:train"})
    assert (Path(small_fields["run_dir"]) / "recipe.yaml").read_text() == before
    pretrain("digits/mae", small_fields | {"train.workers": 1, "train.log_every": 2})  # these may change


def test_a_run_that_cannot_start_leaves_no_folder(small_fields: Fields) -> None:
    folder = Path(small_fields["run_dir"])
    with pytest.raises(UsageError):
        pretrain("digits/mae", small_fields | {"train.batch_size": 1000})
    assert not folder.exists()
    folder.mkdir()  # somebody's own
    with pytest.raises(UsageError):
        pretrain("digits/mae", small_fields | {"train.batch_size": 1000})
    assert folder.exists()


def test_too_little_data_and_uneven_batches_are_said_before_the_model(
    small_fields: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"train.batch_size: 121 images, but .* has only 120"):
        pretrain("digits/mae", small_fields | {"train.batch_size": 121})
    with pytest.raises(DataError, match="no shards match"):
        pretrain("digits/mae", small_fields | {"data.train": "/nowhere/*.tar"})
    with pytest.raises(UsageError, match="torch sees no GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        pretrain("digits/mae", small_fields | {"train.device": "cuda"})


def test_bad_samples_are_recorded_and_a_budget_ends_the_run(small_fields: Fields, tmp_path: Path) -> None:
    import shutil

    from selfsight.data.shards import Shards

    def rotten(name: str, samples: list[int]) -> str:
        shutil.copytree(small_fields["data.train"], tmp_path / name)
        shards = Shards(str(tmp_path / name))
        for sample in samples:
            shard, record = shards._locate(sample)
            with shards.paths[shard].open("r+b") as file:
                file.seek(int(record["offset"]) + 40)
                file.write(b"rot")
        return str(tmp_path / name)

    fields = small_fields | {"train.steps": 15}
    pretrain("digits/mae", fields | {"data.train": rotten("few", [3, 60])})
    noted = read_lines(Path(small_fields["run_dir"]) / "quarantine.jsonl")
    assert sorted(line["sample"] for line in noted) == [3, 60]
    with pytest.raises(DataError, match=r"\d+ bad samples among \d+ read.*quarantine.jsonl"):
        pretrain(
            "digits/mae", fields | {"run_dir": str(tmp_path / "r2"), "data.train": rotten("many", list(range(40)))}
        )


def test_the_clock_leaves_out_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter, alone = Meter(10, torch.device("cpu")), Accelerator(cpu=True)

    def passes(seconds: float) -> None:
        now[0] += seconds

    with meter.waiting():
        passes(1)
    passes(3)
    meter.step()
    with meter.pause():
        passes(100)
    read = meter.read(alone)
    assert (read["images_per_second"], read["data_wait"]) == (2.5, 0.25)
    with meter.pause():
        passes(50)
    passes(2)
    meter.step()
    read = meter.read(alone)
    assert (read["images_per_second"], read["data_wait"]) == (5.0, 0.0)


def test_repeats_are_one_request_and_a_later_signal_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ended = [100.0], []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "torchrun's")
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", ended.append)
    stop = StopRequest()
    for later in (0.0, 0.05, 4.0):
        now[0] = 100.0 + later
        stop.hear()
    assert (stop.asked, ended) == (True, [])
    now[0] = 106.0
    stop.hear()
    assert ended == [75]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    stop = StopRequest()  # nobody repeats here
    stop.hear()
    assert (stop.asked, ended) == (True, [75])
    stop.hear()
    assert ended == [75, 75]


def test_a_signal_is_heard_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(500):
            if stop.asked:
                break
            time.sleep(0.01)
        assert stop.asked
        with pytest.raises(Stopped, match="training is done and saved"):
            stop.at_once()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_recipe_takes_no_overrides(small_fields: Fields) -> None:
    with pytest.raises(UsageError, match="a Recipe is complete"):
        pretrain(load("digits/mae", small_fields), {"train.steps": 1})


def test_tensorboard_gets_the_metrics(small_fields: Fields) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain("digits/mae", small_fields | {"track": ["tensorboard"]})
    folder = Path(small_fields["run_dir"])
    found = next(path for path in folder.rglob("events.out.tfevents.*") if path.parent.parent.name != "1")
    loaded = events.EventAccumulator(str(found.parent))
    loaded.Reload()
    assert [event.value for event in loaded.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in learned(folder)]
    )


def test_a_tracker_that_is_not_installed_is_said(small_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.metrics.get_available_trackers", lambda: [])
    with pytest.raises(UsageError, match=r"wandb is not installed; pip install 'selfsight\[track\]'"):
        pretrain("digits/mae", small_fields | {"track": ["wandb"]})


def test_due() -> None:
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
