"""`selfsight bench`: phases make up the step, a trial changes one thing, nothing is written, arithmetic is right."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import words as as_words

from selfsight import bench_search as subject
from selfsight import bench_switches, bench_trials, cli
from selfsight.assemble import assemble
from selfsight.bench import PLAIN, Found, advice
from selfsight.bench_cadence import cadence
from selfsight.bench_look import first_look, loader_rate, probe
from selfsight.bench_search import Budget, fitting, measured_as, try_all
from selfsight.bench_step import Built, build, changed, time_steps
from selfsight.bench_switches import Situation, candidates
from selfsight.bench_table import as_object, show
from selfsight.bench_timed import PHASES, Timed, with_communication, within_noise
from selfsight.bench_trials import Trial, helpful, micro_batches, repeated
from selfsight.data.decode import Form
from selfsight.data.shards import Shards
from selfsight.data.synthetic import SAMPLES, synthetic
from selfsight.errors import StorageError, UsageError
from selfsight.processes import join
from selfsight.recipe import Recipe, load
from selfsight.run_folder import differences
from selfsight.timeline import Timeline

CPU = torch.device("cpu")


@pytest.fixture
def recipe(small_fields: dict[str, Any]) -> Recipe:
    return load("digits/mae", small_fields | {"train.threads": 1})


@pytest.fixture
def built(recipe: Recipe) -> Built:
    return build(recipe, join(recipe), 1)


class Clock:
    """Seconds that pass one at each look."""

    def __init__(self, tick: float = 1.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def timed(rate: float, spread: float = 0.0, images: int = 8, **seconds: float) -> Timed:
    rates = (rate * (1 - spread), rate, rate * (1 + spread))
    step = images / rate
    phases = dict.fromkeys(PHASES, 0.0) | (seconds or {"forward": step / 2, "backward": step / 2})
    return Timed(phases, images, rates, 2**30, 3)


def test_a_timeline_gives_each_second_to_the_phase_that_was_marked() -> None:
    now = [0.0]
    line = Timeline(CPU, lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    passes(100)  # what was before does not count
    line.restart()
    for _ in range(2):
        line.mark("data")
        passes(1)
        line.mark("forward")
        passes(2)
        line.mark("data")
        passes(4)
        line.step("rest")
    passes(50)  # nor does what no step has ended
    line.mark("data")
    passes(50)
    assert line.steps() == [7, 57 - 50]
    assert {name: spent for name, spent in line.phases().items() if spent} == {"data": 10, "forward": 4}


def test_phases_make_up_the_step(built: Built, recipe: Recipe) -> None:
    """Each look at the clock is a second: every phase is seen, in every micro-batch, and nothing is lost between them."""
    found = time_steps(built, changed(recipe, {"train.accumulate": 2}), 40.0, Clock())
    assert set(found.phases) == set(PHASES)
    assert found.images == 8
    # A step: its start, [transfer, forward, backward] twice, norm, data, update; then looks at the clock, until the next one's first mark.
    once = {name: spent for name, spent in found.phases.items() if name != "optimizer"}
    assert once == {"transfer": 1 + 2, "forward": 2, "backward": 2, "data": 1, "communication": 0}
    assert 1 + 1 + 1 <= found.phases["optimizer"] <= 1 + 1 + 3
    assert sum(found.phases.values()) == pytest.approx(found.step_seconds, rel=0.1)
    assert found.images_per_second == pytest.approx(8 / found.step_seconds)
    assert sum(found.share.values()) == pytest.approx(1)
    assert not built.parts.objective._forward_hooks  # the model is as it was


def test_a_deterministic_step_is_not_divided(recipe: Recipe) -> None:
    other = changed(recipe, {"train.deterministic": 2})
    found = time_steps(build(other, join(other), 1), other, 20.0, Clock())
    assert found.phases["forward"] == found.phases["transfer"] == 0
    assert found.phases["backward"] > 0


def test_the_time_ends_it_and_the_first_steps_do_not_count(built: Built, recipe: Recipe) -> None:
    few, many = (time_steps(built, recipe, seconds, Clock(0.01)) for seconds in (0.0, 1.5))
    assert few.steps == 2
    assert 8 < many.steps < 30


def test_steps_are_those_of_training(built: Built, recipe: Recipe) -> None:
    """Weights move as the first steps of a run move them."""
    from selfsight.train import train

    found = time_steps(built, recipe, 0.0)
    own = changed(recipe, {"train.steps": recipe.train.steps})
    parts = assemble(own, CPU)
    parts.recipe.run_dir.mkdir(parents=True)
    taken = 1 + found.steps
    assert taken == 3
    halted = replace(parts, steps=6)
    own_steps = []

    def stop_after(step: int, steps: int) -> None:
        own_steps.append({name: p.detach().clone() for name, p in parts.objective.named_parameters()})

    parts.objective.after_step = stop_after  # type: ignore[method-assign]
    train(halted, join(own))
    for name, parameter in built.parts.objective.named_parameters():
        assert torch.equal(parameter, own_steps[taken - 1][name]), name


def test_a_smaller_batch_tells_of_a_larger_one() -> None:
    small = timed(4.0, images=8, data=0.5, transfer=0.0, forward=0.5, backward=0.5, optimizer=0.5, communication=0.0)
    large = small.scaled(32)
    assert large.phases == {"data": 2, "transfer": 0, "forward": 2, "backward": 2, "optimizer": 0.5, "communication": 0}
    assert large.step_seconds == pytest.approx(6.5)
    assert small.scaled(8) == small


def test_communication_is_what_the_backward_pass_saves_without_it() -> None:
    whole, alone = timed(1.0, forward=3.0, backward=5.0), timed(1.0, forward=3.0, backward=4.0)
    found = with_communication(whole, alone)
    assert (found.phases["backward"], found.phases["communication"]) == (4.0, 1.0)
    assert with_communication(alone, whole).phases["communication"] == 0


def test_operations_do_not_depend_on_what_is_done_again(recipe: Recipe) -> None:
    counted = []
    for again in (0, 1):
        other = changed(recipe, {"train.checkpoint_blocks": bool(again)})
        parts = assemble(other, CPU)
        counted.append(probe(parts, join(other), parts.batches()[0]).flops_per_image)
        assert all(parameter.grad is None for parameter in parts.objective.parameters())
        assert parts.encoder.checkpoint_blocks == again
    assert counted[0] == counted[1] > 0


def test_the_loader_alone(built: Built, recipe: Recipe) -> None:
    """A second before the first batch of 8 and one after each: two of them in three seconds."""
    assert loader_rate(built, recipe, 3.0, Clock()) == pytest.approx(16 / 3)


def found_of(recipe: Recipe, **other: Any) -> Found:
    given: dict[str, Any] = {
        "recipe": recipe, "told": "digits/mae", "hardware": "abacus", "ranks": 2, "threads": 1, "workers": 3, "precision": "fp32",
        "timed": 8, "base": timed(100.0), "every": {"evaluation": 0.02, "logging": 0.0, "saving": None}, "loader": 50.0,
        "flops_per_image": 2e9, "peak": 4e11, "memory": 4 * 2**30, "steps": 1000, "epochs": 8.0, "trials": [], "best": {},
        "notes": [],
    }  # fmt: skip
    return Found(**(given | other))


def test_the_arithmetic_of_the_answer(recipe: Recipe) -> None:
    told = as_object(found_of(recipe))
    assert told["step_seconds"] == pytest.approx(0.08)
    assert told["mfu"] == pytest.approx(100 / 2 * 2e9 / 4e11)
    assert told["hours"] == pytest.approx(1000 * 0.1 / 3600)  # with its evaluation
    assert told["cadence"]["evaluation"] == pytest.approx(0.2)
    assert told["hours_per_million_images"] == pytest.approx(1e6 / 8 * 0.1 / 3600)
    assert told["loader"]["step_share"] == 2
    assert told["memory"] == {"peak": 1024, "total": 4096}
    assert (told["images"], told["bound"], told["command"]) == (8000, "compute", "selfsight pretrain digits/mae")
    waits = timed(100.0, data=0.02, forward=0.06)
    assert as_object(found_of(recipe, base=waits))["bound"] == "data"
    assert as_object(found_of(recipe, steps=None))["hours"] is None


def test_a_person_reads_what_a_script_does(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [
        Trial({"train.workers": 2}, False, timed(150.0)),
        Trial({"train.precision": "bf16"}, True, timed(102.0)),
        Trial({"train.compile": True}, False, None, "no compiler"),
        Trial({"train.threads": 2}, False, timed(206.0, spread=0.44)),
    ]
    show(as_object(found_of(recipe, trials=trials, best={"train.workers": 2, "train.compile": True})))
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.startswith("│")}
    assert "1.50" in rows["train.workers 2"] and "noise" not in rows["train.workers 2"]
    assert "within noise; changes what is learned" in rows["train.precision bf16"]
    assert "44%" in rows["train.threads 2"] and "unsteady" in rows["train.threads 2"]
    assert "no compiler" in rows["train.compile true"]
    assert "selfsight pretrain digits/mae --train.workers 2 --train.compile true" in shown
    assert "25.0%: 2 GFLOP an image" in rows["MFU"]
    assert "a peak of 1.0 of 4.0 GiB, in steps of 8 images" in rows["memory"]


EVERYWHERE = Situation(True, 8, 4, 2, "fp32", True, True, True, True)


@pytest.mark.parametrize(
    "now", [EVERYWHERE, EVERYWHERE._replace(gpu=False), EVERYWHERE._replace(precision="bf16", jpegs=False)]
)
def test_a_trial_differs_in_its_switch_alone(recipe: Recipe, now: Situation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_switches, "require_decoder", lambda device: None)
    plain = changed(recipe, {"train.accumulate": 2, "train.batch_size": 64, "train.workers": 2, "train.threads": 4})
    todo = candidates(plain, now)
    assert todo
    for change in todo:
        [(name, value)] = change.items()
        other = differences(plain.model_dump(mode="json"), changed(plain, change).model_dump(mode="json"))
        assert set(other) == {name}, change
        assert (
            changed(plain, change).model_dump(mode="json")["train" if "train" in name else "data"][name.split(".")[1]]
            == value
        )


def names_tried(recipe: Recipe, **now: Any) -> set[str]:
    return {name for change in candidates(recipe, EVERYWHERE._replace(**now)) for name in change}


def test_only_what_may_help_is_tried(recipe: Recipe) -> None:
    assert "train.compile" not in names_tried(recipe, compiles=False)
    assert "train.threads" not in names_tried(recipe)
    assert "train.threads" in names_tried(recipe, gpu=False)
    assert "train.workers" not in names_tried(recipe, data_bound=False)
    assert "data.repeat" not in names_tried(recipe, data_bound=False)
    assert "data.fast_decode" not in names_tried(recipe, jpegs=False)
    assert "train.batch_size" not in names_tried(recipe, whole=False)
    assert "train.cuda_graphs" not in names_tried(recipe)
    assert "train.cuda_graphs" in names_tried(changed(recipe, {"train.compile": True}))
    assert "train.checkpoint_blocks" not in names_tried(recipe)
    assert {"train.precision": "tf32"} in candidates(recipe, EVERYWHERE)
    assert {"train.precision": "fp32"} in candidates(recipe, EVERYWHERE._replace(gpu=False, precision="bf16"))
    assert candidates(recipe, EVERYWHERE._replace(gpu=False, workers=1, cores=2))[:2] == [
        {"train.workers": 0},
        {"train.workers": 2},
    ]


@pytest.mark.parametrize(
    ("change", "learns"),
    [({"train.workers": 1}, False), ({"train.threads": 2}, False), ({"train.compile": True}, False), ({"train.accumulate": 2}, False),
     ({"train.batch_size": 16}, True), ({"train.precision": "bf16"}, True), ({"data.repeat": 2}, True)],
)  # fmt: skip
def test_what_changes_what_is_learned_is_told(
    built: Built, recipe: Recipe, change: dict[str, Any], learns: bool
) -> None:
    assert bench_trials.changes_what_is_learned(built.parts, recipe, changed(recipe, change)) == learns


def test_a_trial_that_cannot_be_is_told_and_ends_nothing(
    built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench_trials.run(built, recipe, {"train.accumulate": 3}, 0.0).why_not.endswith(
        "is not a multiple of accumulate 3"
    )
    assert bench_trials.run(built, recipe, {"train.batch_size": 256}, 0.0).why_not == "more images than there are"

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_trials, "time_steps", full)
    assert bench_trials.run(built, recipe, {"train.accumulate": 2}, 0.0).why_not == "does not fit in memory"


def test_a_trial_takes_a_model_of_its_own_where_it_must(
    built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped = []
    monkeypatch.setattr(bench_trials, "time_steps", lambda made, other, seconds: stepped.append(made) or timed(1.0))
    bench_trials.run(built, recipe, {"train.accumulate": 2}, 0.0)
    bench_trials.run(built, recipe, {"train.precision": "bf16"}, 0.0)
    assert stepped[0] is built
    assert stepped[1] is not built and stepped[1].accelerator.mixed_precision == "bf16"


def test_noise_is_that_of_both() -> None:
    base = timed(100.0)
    assert within_noise(timed(102.0), base)
    assert not within_noise(timed(110.0), base) and not within_noise(timed(90.0), base)
    assert within_noise(timed(110.0, spread=0.2), base)
    assert within_noise(timed(110.0), timed(100.0, spread=0.2))


def test_what_helps_is_the_best_of_each_that_learns_the_same() -> None:
    trials = [
        Trial({"train.workers": 1}, False, timed(120.0)),
        Trial({"train.workers": 2}, False, timed(140.0)),
        Trial({"train.workers": 4}, False, timed(130.0)),
        Trial({"train.precision": "bf16"}, True, timed(300.0)),
        Trial({"train.threads": 1}, False, timed(50.0)),
        Trial({"train.accumulate": 2}, False, timed(101.0)),
        Trial({"train.compile": True}, False, None, "no time"),
    ]
    base = timed(100.0)
    assert helpful(trials, base) == {"train.workers": 2}
    trials.append(Trial({"train.compile": True}, False, timed(120.0)))
    both = {"train.workers": 2, "train.compile": True}
    assert helpful(trials, base) == both
    assert helpful([*trials, Trial(both, False, timed(130.0), together=True)], base) == {"train.workers": 2}
    assert helpful([*trials, Trial(both, False, timed(150.0), together=True)], base) == both


def test_parts_of_unsteady_times_must_not_overlap() -> None:
    shaky = timed(200.0, spread=0.44)  # from 112
    assert not within_noise(shaky, timed(100.0)) and not within_noise(timed(100.0), shaky)
    assert within_noise(shaky, timed(100.0)._replace(rates=(100.0, 100.0, 115.0)))
    drifted = timed(100.0).and_again(timed(220.0))
    assert within_noise(timed(206.0), drifted) and within_noise(shaky, drifted)


def tried_by(
    built: Built,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[str, list[float]],
    left: float = 60.0,
    seconds_again: float = 0.0,
) -> tuple[list[Trial], Timed, list[str]]:
    """What try_all makes of these rates: of each switch, of several together, and of the recipe as it is (`again`)."""
    later, asked, begun = {name: iter(several) for name, several in rates.items()}, list[str](), [0.0]

    def next_of(name: str) -> Timed:
        begun[0] += seconds_again if "again" in asked else 0.0
        asked.append(name)
        return timed(next(later[name]))

    def run(made: Built, own: Recipe, change: dict[str, Any], seconds: float) -> Trial:
        return Trial(change, False, next_of(" ".join(name.split(".")[1] for name in change)))

    monkeypatch.setattr(subject, "run", run)
    monkeypatch.setattr(subject, "time_steps", lambda *_: next_of("again"))
    changes: list[dict[str, Any]] = [{f"train.{name}": 2} for name in rates if name != "again" and " " not in name]
    monkeypatch.setattr(subject, "candidates", lambda recipe, now: changes)
    budget = Budget(60.0, lambda: begun[0])
    begun[0] = 60.0 - left
    trials, base = try_all(built, recipe, timed(100.0), EVERYWHERE, budget, lambda *_: None)
    return trials, base, asked


@pytest.mark.parametrize("left", [60.0, 0.01])  # late or not
def test_what_was_faster_than_a_slow_moment_is_not_faster(
    built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, left: float
) -> None:
    """The machine was slow while the recipe was timed, and twice as fast ever after."""
    trials, base, asked = tried_by(built, recipe, monkeypatch, {"threads": [206.0], "again": [210.0]}, left)
    assert asked == ["threads", "again"]
    assert helpful(trials, base) == {}
    assert as_object(found_of(recipe, trials=trials, base=base))["trials"][0]["within_noise"]


def test_a_gain_is_seen_twice(built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    lucky = {"threads": [206.0, 58.0], "again": [100.0]}
    trials, base, asked = tried_by(built, recipe, monkeypatch, lucky)
    assert asked == ["threads", "again", "threads"] and helpful(trials, base) == {}
    true = {"threads": [206.0, 200.0], "again": [100.0]}
    trials, base, asked = tried_by(built, recipe, monkeypatch, true)
    assert helpful(trials, base) == {"train.threads": 2} and len(trials) == 1
    apart = {"threads": [206.0, 58.0], "workers": [150.0, 150.0], "workers threads": [90.0], "again": [100.0]}
    trials, base, asked = tried_by(built, recipe, monkeypatch, apart)
    assert asked == ["threads", "workers", "again", "workers threads", "threads", "workers"]
    assert helpful(trials, base) == {"train.workers": 2}
    both = {"threads": [206.0], "workers": [150.0], "workers threads": [250.0], "again": [100.0]}
    trials, base, asked = tried_by(built, recipe, monkeypatch, both)
    assert helpful(trials, base) == {"train.threads": 2, "train.workers": 2}


@pytest.mark.parametrize(
    ("seconds", "again"),  # of what is tried again: time is up after the third, or after the first
    [(0.0, ["accumulate workers threads", "threads", "workers"]), (60.0, ["accumulate workers threads"])],
)
def test_a_gain_that_was_seen_once_is_not_advised(
    built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, seconds: float, again: list[str]
) -> None:
    rates = {"threads": [206.0, 58.0], "workers": [150.0, 58.0], "accumulate": [130.0], "again": [100.0]}
    rates["accumulate workers threads"] = [90.0]
    trials, base, asked = tried_by(built, recipe, monkeypatch, rates, seconds_again=seconds)
    assert asked == ["threads", "workers", "accumulate", "again", *again]
    assert helpful(trials, base) == {}
    assert helpful(trials, base, once=True)
    shown = as_object(found_of(recipe, trials=trials, base=base))["trials"]
    assert [trial["timed_again"] for trial in shown] == [trial.again for trial in trials]


def test_switches_that_fail_together_are_not_advised() -> None:
    one, other = {"train.workers": 2}, {"train.accumulate": 2}
    failed = Trial(one | other, False, None, "does not fit in memory", together=True)
    alone = [Trial(one, False, timed(150.0)), Trial(other, False, timed(120.0))]
    assert helpful([*alone, failed], timed(100.0)) == one


def test_micro_batches_double_and_show_the_same_images(built: Built) -> None:
    assert list(micro_batches(3, 30)) == [3, 6, 12, 24]
    host = built.parts.batches()[0]
    twice = repeated(host, 19)
    assert twice.views[0].shape == (19, *host.views[0].shape[1:])
    assert torch.equal(twice.views[0][8:16], host.views[0])
    assert twice.positions.tolist() == list(range(19))


def test_the_largest_micro_batch_is_the_last_that_fits(built: Built) -> None:
    host, seen = built.parts.batches()[0], list[int]()

    def backward(hosts: list[Any], place: Any) -> None:
        seen.append(len(hosts[0].ids))
        if len(hosts[0].ids) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")

    backward.forget = lambda: None  # type: ignore[attr-defined]
    limited = replace(built, backward=backward)  # type: ignore[arg-type]
    found = bench_trials.largest_micro_batch(limited, host, 8, lambda: True)
    assert found and found[0] == 32 and seen == [8, 16, 32, 64]
    assert bench_trials.largest_micro_batch(limited, host, 64, lambda: True) is None
    seen.clear()
    assert (bench_trials.largest_micro_batch(limited, host, 8, lambda: False) or (0,))[0] == 8


def test_a_batch_that_does_not_fit_is_cut(built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(made: Built, other: Recipe, seconds: float) -> Timed:
        if other.train.accumulate < 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return timed(1.0)

    monkeypatch.setattr(subject, "time_steps", steps)
    notes: list[str] = []
    own, _ = fitting(built, recipe, 1.0, Budget(60.0), notes)
    assert own.train.accumulate == 4 and own.train.batch_size == 8
    assert "8 images at once do not fit in memory" in notes[0] and "train.accumulate 4" in notes[1]
    with pytest.raises(UsageError, match="do not fit in the GPU's memory"):
        fitting(
            replace(built, accelerator=SimpleNamespace(num_processes=2, device=CPU)), recipe, 1.0, Budget(60.0), notes
        )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("compute", "loader", "batch"),
    [(0.001, 1e6, 64), (0.1, 1e6, 16), (0.001, 10.0, 16), (100.0, 1e6, 2), (0.5, 1e6, 8)],
)
def test_a_step_that_takes_too_long_is_cut(
    built: Built, recipe: Recipe, compute: float, loader: float, batch: int
) -> None:
    """A tenth of a second an image leaves room for 20 of them in a thirtieth of a minute, by halves 16. Of slower ones up
    to 16 are taken if a tenth of a minute is enough."""
    own = measured_as(built, changed(recipe, {"train.batch_size": 64}), compute, loader, 60.0)
    assert (own.train.batch_size, own.train.accumulate) == (batch, 1)


def broken_off(made: Built, *_: Any) -> Timed:
    """A step that ran out of memory in its backward pass."""
    for parameter in made.trained:
        parameter.grad = torch.ones_like(parameter)
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("way", ["fitting", "run"])
def test_a_step_that_ran_out_of_memory_leaves_nothing(
    built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    objective, forgotten = built.parts.objective, []
    monkeypatch.setattr(objective, "forget_step", lambda: forgotten.append(True))
    tries = iter([broken_off, lambda *_: timed(1.0)])
    owner = subject if way == "fitting" else bench_trials
    monkeypatch.setattr(owner, "time_steps", lambda *given: next(tries)(*given))
    freed = []
    monkeypatch.setattr("selfsight.bench_step.gc.collect", lambda: freed.append(sys.exc_info()[0]))
    if way == "fitting":
        fitting(built, recipe, 1.0, Budget(60.0), [])
    else:
        bench_trials.run(built, recipe, {"train.accumulate": 2}, 0.0)
    assert forgotten and all(parameter.grad is None for parameter in objective.parameters())
    assert freed == [None]  # an error that is being handled holds the graph


def test_a_rank_that_runs_out_of_memory_ends_all(built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_trials, "time_steps", broken_off)
    ranks = replace(built, accelerator=SimpleNamespace(num_processes=2, device=CPU))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"train.workers: does not fit in this GPU's memory .* the other ranks wait"):
        bench_trials.run(ranks, recipe, {"train.workers": 2}, 0.0)


def test_what_takes_more_memory_is_not_tried_on_several_gpus(recipe: Recipe) -> None:
    plain = changed(recipe, {"train.accumulate": 4, "train.batch_size": 64, "train.checkpoint_blocks": True})
    more = {"train.accumulate", "train.batch_size", "train.checkpoint_blocks"}
    assert more <= names_tried(plain)
    assert not more & names_tried(plain, ranks=2)
    assert {"train.accumulate", "train.batch_size"} <= names_tried(plain, ranks=2, gpu=False)


def test_graphs_go_with_the_compiler(recipe: Recipe) -> None:
    both = changed(recipe, {"train.compile": True, "train.cuda_graphs": True})
    off = {"train.compile": False, "train.cuda_graphs": False}
    assert off in candidates(both, EVERYWHERE)
    changed(both, off)
    base, trials = timed(100.0), [Trial(off, False, timed(120.0)), Trial({"train.workers": 2}, False, timed(110.0))]
    assert helpful(trials, base) == off | {"train.workers": 2}  # none of them was tried with the other


def test_a_slow_machine_tries_threads_and_precision_before_it_has_no_time(
    built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = EVERYWHERE._replace(gpu=False, whole=False, compiles=False)
    assert [*candidates(recipe, slow)[0]] == ["train.threads"]
    monkeypatch.setattr(
        subject, "run", lambda built, recipe, change, seconds: Trial(change, False, timed(100.0, images=400))
    )
    now = [0.0]
    budget = Budget(60.0, lambda: now[0])
    base, nothing = timed(100.0, images=400), lambda *_: None  # steps of four seconds
    monkeypatch.setattr(subject, "time_steps", lambda *_: base)
    for spent, several in ((70.0, 2), (79.0, 1), (110.0, 0)):  # a switch takes 12 seconds; two may be late by 60 and 30
        now[0] = spent
        found, _ = try_all(built, recipe, base, slow, budget, nothing)  # type: ignore[arg-type]
        assert [bool(trial.timed) for trial in found] == [True] * several + [False] * (len(found) - several)
        assert len(found) > 3 and "no time" in found[-1].why_not


def test_a_first_look_is_short_where_images_are_slow(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    eight = changed(recipe, {"train.batch_size": 64})
    assert first_look(eight, join(eight)).images == 8
    monkeypatch.setattr("selfsight.bench_look.LONG", 0.0)
    assert first_look(eight, join(eight)).images == 2


def test_an_extrapolation_is_said(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    show(as_object(found_of(recipe, timed=2)))
    assert "a step of 8 images (worked out from steps of 2)" in capsys.readouterr().out
    show(as_object(found_of(recipe)))
    assert "worked out" not in capsys.readouterr().out


def test_what_keeps_figures_from_being_sure_is_told(built: Built) -> None:
    steady, few = advice(built, timed(1.0), [], 9.0, PLAIN), advice(built, timed(1.0, images=2), [], 9.0, PLAIN)
    assert not steady
    assert "an extrapolation: a step of 8 images" in few[0] and "steps of 2 were timed" in few[0]
    [noisy] = advice(built, timed(1.0, spread=0.3), [], 9.0, PLAIN)
    assert "varies by 30% either way" in noisy
    trials = [
        Trial({"train.threads": 2}, False, timed(2.0, spread=0.44)),
        Trial({"train.workers": 0}, False, timed(1.1)),
    ]
    [shaky] = advice(built, timed(1.0), trials, 9.0, PLAIN)
    assert "the speed of train.threads 2 varies by more than 10%" in shaky


def test_advice_on_data_follows_from_what_was_timed(built: Built, recipe: Recipe) -> None:
    waits, faster, slower = timed(100.0, data=0.02, forward=0.06), timed(150.0), timed(93.0)

    def told(workers: int, trials: list[Trial], loader: float) -> str:
        made = replace(built, parts=replace(built.parts, recipe=changed(recipe, {"train.workers": workers})))
        [note] = advice(made, waits, trials, loader, PLAIN)
        return note

    more, others = ({"train.workers": number} for number in (2, 0))
    shared = told(1, [Trial(more, False, slower), Trial(others, False, slower)], 100 / 0.15)
    assert "workers and training share the cores, since alone the loader makes a batch in 15% of a step" in shared
    assert "no other number of either that was tried is faster" in shared
    assert "more --seconds compare other train.workers" in told(1, [Trial(more, False, None, "no time")], 100 / 0.15)
    assert told(1, [Trial({"train.threads": 2}, False, faster)], 1000.0).endswith("train.threads 2 shortens that")
    assert told(1, [Trial(more, False, faster)], 100 / 0.15).endswith("train.workers 2 shortens that")
    assert "share" not in told(1, [], 110.0) and "share the cores" not in told(0, [], 1000.0)
    assert "more train.workers" not in told(1, [Trial(more, False, slower)], 110.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_full_disk_leaves_no_draft_of_random_images(
    recipe: Recipe, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(images: Any, folder: Path, *_: Any) -> None:
        (folder / "half.tar").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfsight.data.synthetic.write_shards", full)
    with pytest.raises(StorageError, match="No space left on device"):
        synthetic(recipe.data, recipe.encoder)
    assert not [*cache.rglob("*.tar")] and not [*cache.glob("synthetic-*")]


def test_a_folder_in_the_way_of_random_images_is_told(recipe: Recipe, cache: Path) -> None:
    shard = synthetic(recipe.data, recipe.encoder)
    shard.rename(shard.parent / "other.tar")
    with pytest.raises(StorageError, match="in the way of random images; remove it"):
        synthetic(recipe.data, recipe.encoder)
    assert [folder.name for folder in cache.glob("synthetic-*")] == [shard.parent.name]


def test_compiling_is_left_out_of_the_budget() -> None:
    now = [0.0]
    budget = Budget(60.0, lambda: now[0])
    now[0] = 50
    budget.excuse(30)
    budget.excuse(-5)
    assert budget.left == 40


def test_what_comes_every_so_many_steps(built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    host = built.parts.batches()[0]
    found = cadence(built, changed(recipe, {"train.save_every": 1000}), host, 1e6, 10.0)
    assert all(value is not None and value > 0 for value in found.values())
    rare = cadence(built, changed(recipe, {"eval.every": 10**9}), host, 1e6, 10.0)["evaluation"]
    assert rare is not None and found["evaluation"] is not None and 0 < rare < found["evaluation"] / 1000
    assert cadence(built, recipe, host, 1.0, 10.0)["evaluation"] is None  # too slow to be tried
    assert not recipe.run_dir.exists()


def test_a_few_images_tell_of_a_long_evaluation(built: Built, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """120 images at a second each and 5 for the start, seen in 30 and in 60 of them."""
    clock = Clock(0.0)
    monkeypatch.setattr("selfsight.bench_cadence.time", SimpleNamespace(perf_counter=clock))

    def score(self: Any, encoder: Any, device: Any) -> dict[str, float]:
        clock.now += 5 + len(self.ids)
        return {}

    monkeypatch.setattr("selfsight.eval.online.OnlineHealth.score", score)
    found = cadence(built, changed(recipe, {"eval.every": 1}), built.parts.batches()[0], 60.0, 1.0)
    assert found["evaluation"] == pytest.approx(125)


KEYS = {
    "recipe", "hardware", "ranks", "threads", "precision", "batch_size", "timed_batch_size", "images_per_second", "spread",
    "step_seconds", "share", "cadence", "loader", "flops_per_image", "matmul_peak", "mfu", "memory", "steps", "epochs", "images",
    "hours", "hours_per_million_images", "bound", "trials", "command", "faster", "notes",
}  # fmt: skip


@pytest.fixture
def words(small_fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("selfsight.speed.SIDE", {"cpu": 256})
    given = small_fields | {"train.threads": 1}
    return ["bench", "digits/mae", *as_words(given)]


def test_the_command_prints_one_object_and_writes_nothing(
    words: list[str], small_fields: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subject, "candidates", lambda recipe, now: [{"train.accumulate": 2}, {"train.precision": "bf16"}]
    )
    data = Path(small_fields["data.train"])
    before = sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))
    assert cli.main([*words, "--json", "--seconds", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == KEYS
    assert set(told["share"]) == set(PHASES) and sum(told["share"].values()) == pytest.approx(1, abs=1e-3)
    assert [trial["change"] for trial in told["trials"]] == [{"train.accumulate": 2}, {"train.precision": "bf16"}]
    assert all("ratio" in trial or trial["why_not"].startswith("no time") for trial in told["trials"])
    assert told["steps"] == 6 and told["images"] == 48
    assert not Path(small_fields["run_dir"]).exists()
    assert before == sorted((path, path.stat().st_mtime_ns) for path in data.rglob("*"))


def test_random_images_need_no_data(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "candidates", lambda recipe, now: [])
    given = [
        "--data.train",
        "/nowhere/x.tar",
        "--eval.train",
        "/nowhere/y.tar",
        "--train.steps",
        "null",
        "--train.epochs",
        "2",
    ]
    assert cli.main([*words, *given, "--synthetic", "--json", "--seconds=1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["hours"] is None and told["epochs"] is None and told["hours_per_million_images"] > 0
    assert "random images" in told["notes"][0]
    assert cli.main([*words, *given, "--json"]) == 65
    told = capsys.readouterr().err
    assert "/nowhere/x.tar" in told and "--synthetic times the recipe with random images" in told


def test_random_images_are_as_large_as_they_are_asked_for(recipe: Recipe) -> None:
    small = Shards(str(synthetic(recipe.data, recipe.encoder)))
    assert len(small) == SAMPLES
    from selfsight.data.decode import decode

    assert decode(small.read(100_000), Form(1)).shape == (1, 8, 8)
    assert small.read(0) != small.read(1) and small.read(0) == small.read(64)
    with pytest.raises(UsageError, match="8 bits with 1 or 3 channels"):
        synthetic(recipe.data, recipe.encoder.model_copy(update={"channels": 5}))


def test_wrong_words_are_told_as_by_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "digits/mea"]) == 2
    assert "no such recipe; nearest: recipes/digits/mae.yaml" in capsys.readouterr().err
    assert cli.main(["bench", "digits/mae", "--train.worker", "1"]) == 2
    assert "did you mean train.workers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["bench", "digits/mae", "--seconds", "soon"])
    assert "'soon' is not a whole number" in capsys.readouterr().err
    for words, option in (["--synthetc"], "--synthetic"), (["--second", "5"], "--seconds"), (["--jso=1"], "--json"):
        assert cli.main(["bench", "digits/mae", *words]) == 2
        assert f"no such option; did you mean {option}?" in capsys.readouterr().err
    assert cli.main(["pretrain", "digits/mae", "--second", "5"]) == 2
    assert "--seconds" not in capsys.readouterr().err
    assert cli.main(["bench", "nosuch"]) == 2
    assert capsys.readouterr().err == "selfsight: nosuch: no such recipe; `selfsight recipes` lists all\n"
    with pytest.raises(SystemExit):
        cli.main(["bench", "digits/mae", "cifar10/mae"])
    told = capsys.readouterr().err
    assert "usage: selfsight bench RECIPE" in told and "unrecognized arguments: cifar10/mae" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they are possible")
def test_what_pretrain_refuses_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--train.compile", "true", "--train.cuda_graphs", "true"]) == 2
    assert "train.cuda_graphs: are a GPU's; leave it off on a CPU" in capsys.readouterr().err


def test_the_proposed_command_names_a_field_once(recipe: Recipe) -> None:
    told = "digits/mae --train.checkpoint_blocks true --data.train 'a b'"
    best = {"train.checkpoint_blocks": "auto", "train.workers": 2}
    assert as_object(found_of(recipe, told=told, best=best))["command"] == (
        "selfsight pretrain digits/mae --train.checkpoint_blocks auto --data.train 'a b' --train.workers 2"
    )


def test_an_interruption_ends_it_at_once(
    words: list[str], small_fields: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []

    def interrupted(*_: Any, **__: Any) -> Any:
        try:
            yield from ()
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr("selfsight.bench_step.feed", interrupted)
    assert cli.main(words) == 130
    assert closed and "interrupted" in capsys.readouterr().err
    assert not Path(small_fields["run_dir"]).exists()


@pytest.mark.slow
def test_two_ranks_time_one_run(launcher: Any, small_fields: dict[str, Any]) -> None:
    fields = small_fields | {"train.threads": 1, "train.timeout": 20}
    job = launcher.start(["bench", "digits/mae", *as_words(fields), "--json", "--seconds", "1"], 2)
    assert job.wait(60) == [0, 0], job.told()
    told = json.loads(job.told(0)[job.told(0).index("{\n") :])  # torch may warn before it
    assert told["ranks"] == 2 and told["batch_size"] == 8
    assert 0 <= told["share"]["communication"] < 1
    assert "{" not in job.told(1)
    assert not Path(small_fields["run_dir"]).exists()
