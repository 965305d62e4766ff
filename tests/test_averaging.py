"""Averages of weights against the written-out mean, and the greedy soup against the paper's recipe spelled out."""

import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import look_in_this_process, pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from selfsight import checkpoint, cli
from selfsight.data.build import write_shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.eval.features import extract
from selfsight.eval.knn import held_out, knn
from selfsight.exports import averaging
from selfsight.exports.averaging import Soup, held_out_knn, sources
from selfsight.exports.card import Facts, facts_of
from selfsight.loading import load_encoder
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.train import pretrain

TINY: dict[str, Any] = {"image_size": 8, "patch": 4, "width": 16, "depth": 1, "heads": 2, "channels": 1}


def make(seed: int = 0, data: dict[str, Any] | None = None, **fields: Any) -> Encoder:
    config = EncoderConfig(**(TINY | fields))
    return build_encoder(config, preprocessing_of(DataConfig(train="x", **(data or {})), config), seed).eval()


def uniform(encoders: Sequence[Encoder], names: Sequence[str]) -> Soup:
    return averaging.uniform(names, dict(zip(names, encoders, strict=True)).__getitem__)


def greedy(encoders: Sequence[Encoder], names: Sequence[str], score: Callable[[Encoder], float]) -> Soup:
    return averaging.greedy(names, dict(zip(names, encoders, strict=True)).__getitem__, score)


@given(st.lists(st.integers(0, 99), min_size=2, max_size=4, unique=True))
@settings(max_examples=10, deadline=None)
def test_the_uniform_average_is_the_mean_of_every_tensor(seeds: list[int]) -> None:
    encoders = [make(seed, registers=1) for seed in seeds]
    before = [{n: t.clone() for n, t in e.state_dict().items()} for e in encoders]
    made = uniform(encoders, list(map(str, seeds)))
    for name, tensor in made.encoder.state_dict().items():
        wanted = sum(state[name].double() for state in before) / len(seeds)  # type: ignore[arg-type]
        assert torch.equal(tensor, wanted.float())
    assert all(
        torch.equal(t, state[n]) for e, state in zip(encoders, before, strict=True) for n, t in e.state_dict().items()
    )
    assert made.notes == (f"weights: the mean of {len(seeds)}: {', '.join(map(str, seeds))}",)


def test_whole_numbers_and_flags_are_not_averaged() -> None:
    encoders = [make(seed) for seed in range(3)]
    for i, encoder in enumerate(encoders):
        encoder.register_buffer("count", torch.tensor(10 + i))
        encoder.register_buffer("flag", torch.tensor(i == 0))
    state = uniform(encoders, ["a", "b", "c"]).encoder.state_dict()
    assert (state["count"], state["count"].dtype, bool(state["flag"])) == (10, torch.int64, True)


REFUSED = [
    ({"depth": 2}, {}, r"b is of another architecture than a; tensors that differ: .*blocks\.1\..* and 6 more"),
    ({"width": 32}, {}, "tensors that differ: .*attn"),
    ({"heads": 4}, {}, r"b is not like a: heads \(was 2, is 4\)"),
    ({"pool": "cls"}, {}, "pool"),
    ({}, {"mean": (0.1,)}, "mean"),
]


@pytest.mark.parametrize(("fields", "data", "told"), REFUSED)
def test_what_is_not_alike_is_not_averaged(fields: dict[str, Any], data: dict[str, Any], told: str) -> None:
    for method in (lambda e, n: uniform(e, n), lambda e, n: greedy(e, n, lambda _: 0.0)):
        with pytest.raises(UsageError, match=told):
            method([make(), make(1, data, **fields)], ["a", "b"])


@pytest.mark.parametrize("method", ["uniform", "greedy"])
def test_few_encoders_are_held_at_a_time(method: str) -> None:
    made: list[weakref.ref[Encoder]] = []
    most = 0

    def load(name: str) -> Encoder:
        nonlocal most
        encoder = make(int(name))
        made.append(weakref.ref(encoder))
        most = max(most, sum(ref() is not None for ref in made))
        return encoder

    names = [str(i) for i in range(6)]
    soup = averaging.uniform(names, load) if method == "uniform" else averaging.greedy(names, load, lambda _: 0.0)
    assert soup.taken == tuple(names)
    assert most <= 3


def test_a_source_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "encoder").mkdir(parents=True)
    (tmp_path / "a" / "encoder" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    for other in ("a", str(tmp_path / "a"), "a/encoder", "b/../a"):
        with pytest.raises(UsageError, match="is a, which would count twice"):
            sources("a", ["c", other])
    assert sources("a", ["c", "b"]) == ["a", "c", "b"]


def test_one_is_no_average() -> None:
    with pytest.raises(UsageError, match="needs two at least"):
        uniform([make()], ["a"])


def weight_of(encoder: Encoder) -> float:
    return round(float(encoder.backbone.norm.bias[0].detach()), 6)


def marked(*values: float) -> list[Encoder]:
    """Encoders that a score can tell by one number, whose mean is the number's mean."""
    made = [make() for _ in values]
    for encoder, value in zip(made, values, strict=True):
        encoder.backbone.norm.bias.data.fill_(value)
    return made


@given(st.lists(st.integers(0, 40), min_size=2, max_size=5), st.lists(st.integers(0, 5), min_size=41, max_size=41))
@settings(max_examples=15, deadline=None)
def test_the_greedy_soup_is_the_papers_recipe(values: list[int], scores: list[int]) -> None:
    def scored(value: float) -> float:
        return scores[int(value)]

    order = sorted(range(len(values)), key=lambda i: -scored(values[i]))
    soup: list[int] = []
    for i in order:  # recipe 1: if ValAcc(average(ingredients + {theta_i})) >= ValAcc(average(ingredients)), add
        tried = [values[j] for j in [*soup, i]]
        kept = [values[j] for j in soup]
        if not soup or scored(round(float(np.mean(tried)), 6)) >= scored(round(float(np.mean(kept)), 6)):
            soup.append(i)
    names = [f"{i}" for i in range(len(values))]
    made = greedy(marked(*values), names, lambda encoder: scored(weight_of(encoder)))
    assert made.taken == tuple(names[i] for i in soup)
    assert weight_of(made.encoder) == pytest.approx(np.mean([values[i] for i in soup]), abs=1e-5)
    assert f"greedy soup of {len(soup)} of {len(values)}" in made.notes[0]


def test_a_soup_is_never_worse_than_its_best() -> None:
    scores = {1.0: 5.0, 3.0: 4.0, 2.0: 4.9}
    made = greedy(marked(1, 3), ["a", "b"], lambda encoder: scores[weight_of(encoder)])
    assert made.taken == ("a",)
    assert "held-out kNN 5.00 (best alone 5.00)" in made.notes[0]


def test_who_does_not_lower_the_score_is_taken() -> None:
    scores = {1.0: 5.0, 3.0: 6.0, 2.0: 6.0, 5.0: 5.0, 3.5: 5.5, 4.0: 5.9}  # b alone; b and a; b, a and c: 5.9 < 6
    made = greedy(marked(1, 3, 8), ["a", "b", "c"], lambda encoder: scores.get(weight_of(encoder), 4.0))
    assert made.taken == ("b", "a")
    made = greedy(marked(1, 3, 11), ["a", "b", "c"], lambda encoder: scores.get(weight_of(encoder), 4.0))
    assert made.taken == ("b", "a")  # all three, whose mean is 5.0, are better than c alone, and worse than b and a


def test_the_score_is_knn_of_the_held_out_tenth(tmp_path: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 2, 300).tolist()  # which no feature tells, so that neighbours matter
    write_shards(((image, label) for (image, _), label in zip(pictures(300), labels, strict=True)), tmp_path, "x")
    encoder = make()
    device = torch.device("cpu")
    found = held_out_knn(str(tmp_path), device)(encoder)
    from selfsight.data.shards import Shards

    features = extract(encoder, Shards(str(tmp_path)), device)
    vectors, (fit, choose) = features.vectors["mean"], held_out(len(features.labels))
    near = knn(vectors[fit], features.labels[fit], vectors[choose], features.labels[choose], k=(10,))
    assert found == pytest.approx(near.accuracy)
    assert found < 90


def test_labels_are_needed(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    write_shards(iter([(image, None) for image, _ in pictures(20)]), tmp_path / "none", "x")
    with pytest.raises(UsageError, match="have no label"):
        held_out_knn(str(tmp_path / "none"), torch.device("cpu"))


def test_lists_of_labels_are_refused_by_their_option(tmp_path: Path) -> None:
    write_shards(((image, [label, 2]) for image, label in pictures(40)), tmp_path, "x")
    with pytest.raises(UsageError, match=r"--average greedy: .* has lists of labels.*give --labels SPEC"):
        held_out_knn(str(tmp_path), torch.device("cpu"))


def test_the_last_checkpoints_of_a_run(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    last = [str(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (3, 6, 9)]
    assert sources(str(tmp_path), []) == last
    assert sources(str(tmp_path), ["2"]) == last[1:]
    assert sources("x", ["a", "2"]) == ["x", "a", "2"]
    for words in (["4"], ["1"]):
        with pytest.raises(UsageError, match="has 3 checkpoints; name at least two"):
            sources(str(tmp_path), words)
    with pytest.raises(UsageError, match="has 0 checkpoints"):
        sources(str(tmp_path / "none"), [])


@pytest.fixture(scope="module")
def run_of_dino(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages") / "run"
    fields = {
        "run_dir": str(folder), "data.train": str(small_shards), "encoder.width": 16, "encoder.depth": 1,
        "train.epochs": None, "train.steps": 6, "train.batch_size": 8, "train.log_every": 1, "train.save_every": 3,
        "train.workers": 0, "eval.train": None, "eval.test": None,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)
        pretrain("digits/dino", fields)
    return folder


def test_student_and_teacher_of_a_run(run_of_dino: Path) -> None:
    saved = checkpoint.load(run_of_dino / "checkpoints" / "step-00000006")
    for weights, start in (("student", "encoder."), ("teacher", "teacher."), (None, "teacher.")):
        for source in (run_of_dino, run_of_dino / "checkpoints" / "step-00000006"):
            state = load_encoder(source, weights).state_dict()
            assert all(torch.equal(t, saved.tensors["model"][start + n]) for n, t in state.items())
    for source in (run_of_dino, run_of_dino / "checkpoints" / "step-00000006"):
        with pytest.raises(UsageError, match="weights 'techer': there are student and teacher"):
            load_encoder(source, "techer")
    with pytest.raises(UsageError, match="chooses in a run or a checkpoint"):
        load_encoder(run_of_dino / "encoder", "student")


def test_a_running_average_is_the_teacher() -> None:
    saved = checkpoint.Checkpoint({"step": 3}, {"model": {"encoder.w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}})
    assert checkpoint.encoder_tensors(saved) == checkpoint.encoder_tensors(saved, "teacher") == {"w": torch.zeros(1)}
    assert checkpoint.encoder_tensors(saved, "student") == {"w": torch.ones(1)}
    saved = checkpoint.Checkpoint({"step": 3}, {"model": {"encoder.w": torch.ones(1)}})
    with pytest.raises(UsageError, match="step 3: has no teacher"):
        checkpoint.encoder_tensors(saved, "teacher")


@pytest.mark.parametrize("method", ["uniform", "greedy"])
def test_the_command_averages_the_checkpoints_of_a_run(
    run_of_dino: Path,
    small_shards: Path,
    tmp_path: Path,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    look_in_this_process(monkeypatch)
    words = ["export", str(run_of_dino), str(tmp_path / "soup"), "--weights", "student", "--average", method]
    labels = ["--labels", str(small_shards)] if method == "greedy" else []
    assert cli.main([*words, *labels]) == 0
    told = capsys.readouterr().err
    card = (tmp_path / "soup" / "README.md").read_text()
    if method == "uniform":
        parts = [load_encoder(run_of_dino / "checkpoints" / f"step-0000000{s}", "student").state_dict() for s in (3, 6)]
        mean = {name: (parts[0][name].double() + parts[1][name].double()) / 2 for name in parts[0]}
        made = load_encoder(tmp_path / "soup").state_dict()
        assert all(torch.equal(made[name], tensor.float()) for name, tensor in mean.items())
        assert "weights: the mean of 2" in told and "- weights: the mean of 2" in card
    else:
        assert "weights: greedy soup of" in told
    ours = json.loads((tmp_path / "soup" / "config.json").read_text())["selfsight"]
    assert (ours["weights"], ours["steps"], ours["recipe"]["objective"]["name"]) == ("student", 6, "dino")
    assert "- weights: student" in card and "pretrained with dino" in card and "- versions: torch" in card


def test_greedy_asks_for_labels(run_of_dino: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["greedy"], "give --labels SPEC"),
        (["mean", "x"], "'mean' is neither of uniform, greedy"),
        (["uniform", "9"], "has 2 checkpoints"),
    ):
        assert cli.main(["export", str(run_of_dino), str(tmp_path / "no"), "--average", *words]) == 2
        assert told in capsys.readouterr().err


# -- what a run tells its card


def test_the_card_of_a_run_has_its_hardware_and_hours(run_of_dino: Path) -> None:
    card = (run_of_dino / "encoder" / "README.md").read_text()
    for line in (
        "pretrained with dino",
        "- hardware: ",
        "- versions: torch ",
        "- steps: 6",
        "- device-hours: ",
        "No scores are recorded here.",
    ):
        assert line in card, line
    (run_of_dino / "encoder" / "README.md").write_text("# My own words")  # no part of what the manifest watches
    load_encoder(run_of_dino)


def test_hours_are_those_that_the_log_counts(tmp_path: Path) -> None:
    assert facts_of(tmp_path) == Facts()
    for spent, hours in (({"device_hours": 2.5}, 2.5), ({"device_hours": "x"}, None), ({}, None)):
        lines = [{"step": 10, "device_hours": 1.0}, {"step": 15, "images_per_second": 4.0, **spent}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert facts_of(tmp_path).hours == hours
    (tmp_path / "scores.json").write_text('{"scores": 3}')
    assert facts_of(tmp_path, license="MIT").scores == ()


@pytest.fixture
def scored_run(run_of_dino: Path, tmp_path: Path, unchecked_export: None) -> Path:
    run = shutil.copytree(run_of_dino, tmp_path / "run")
    row = {"encoder": "pretrained", "evaluator": "knn", "value": 50.0, "std": 0.0, "n": 1, "protocol": "kNN: k=3"}
    row |= {"interval": [40.0, 60.0], "detail": {"confusion": [[1]]}}
    scores = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps(scores | {"scores": [row]}))
    return run


def exported(source: Path, target: Path, *words: str) -> str:
    assert cli.main(["export", str(source), str(target), *words]) == 0
    return (target / "README.md").read_text()


ROW = "| pretrained | knn | accuracy |  | 50.0% | 40.0 to 60.0 |"


def test_scores_go_with_the_weights_that_were_scored(scored_run: Path, tmp_path: Path) -> None:
    for i, source in enumerate((scored_run, scored_run / "encoder", tmp_path / "0", tmp_path / "1")):
        card = exported(source, tmp_path / f"{i}", *["--to", "transformers"] * (i == 3))
        assert ROW in card and "- kNN: k=3" in card and "- source: `run`" in card and "- device-hours: " in card
    for i, words in enumerate((["--weights", "student"], ["--image-size", "16"], ["--half", "bf16"]), 4):
        card = exported(scored_run, tmp_path / f"{i}", *words)
        assert "No scores are recorded" in card and "the run's scores are of the encoder that it exported" in card
        assert "No scores are recorded" in exported(tmp_path / f"{i}", tmp_path / f"{i}-again")
    told = json.loads((tmp_path / "1" / "config.json").read_text())["selfsight"]["scores"]
    assert [row["value"] for row in told] == [50.0] and "detail" not in told[0]


def test_scores_of_other_weights_are_told_as_such(scored_run: Path, tmp_path: Path) -> None:
    """Whoever puts another encoder into a run's folder."""
    exported(scored_run, tmp_path / "other", "--weights", "student")
    shutil.rmtree(scored_run / "encoder")
    shutil.copytree(tmp_path / "other", scored_run / "encoder")
    card = exported(scored_run, tmp_path / "out")
    assert "50.0" not in card and "the run's scores are of other weights than its encoder has" in card


def test_the_encoder_of_a_run_is_not_replaced(scored_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (scored_run / "encoder" / "manifest.json").read_text()
    assert cli.main(["export", str(scored_run), str(scored_run / "encoder"), "--average", "uniform"]) == 2
    assert "is the encoder of a run, of which its scores and its report are" in capsys.readouterr().err
    assert (scored_run / "encoder" / "manifest.json").read_text() == before


def test_notes_and_licence_stay_with_the_weights(scored_run: Path, tmp_path: Path) -> None:
    exported(scored_run, tmp_path / "a", "--average", "uniform", "--license", "MIT")
    card = exported(tmp_path / "a", tmp_path / "b", "--half", "bf16")
    card = exported(tmp_path / "b", tmp_path / "c", "--image-size", "16")
    for line in ("- weights: the mean of 2: ", "- weights rounded to bf16", "- made for images of 16 pixels"):
        assert card.count(line) == 1, line
    assert "license: mit" in card and "No licence was given" not in card
    assert "license: apache-2.0" in exported(tmp_path / "c", tmp_path / "d", "--license", "Apache-2.0")
    ours = json.loads((tmp_path / "d" / "config.json").read_text())
    assert ours["selfsight"]["license"] == ours["pretrained_cfg"]["license"] == "Apache-2.0"


def test_a_soup_names_its_sources_and_what_they_share(scored_run: Path, tmp_path: Path) -> None:
    for name, words in (("a", []), ("b", ["--weights", "student"])):
        exported(scored_run, tmp_path / name, "--license", "MIT", *words)
    card = exported(tmp_path / "a", tmp_path / "soup", "--average", "uniform", str(tmp_path / "b"))
    for line in (
        "license: mit",
        "pretrained with dino",
        "## Recipe",
        "- source: `a, b`",
        "- weights: the mean of 2: a, b",
        "- recipe, data, steps and hours are those of a alone",
    ):
        assert line in card, line
    exported(tmp_path / "b", tmp_path / "c", "--license", "GPL-3.0-only")
    card = exported(tmp_path / "a", tmp_path / "soup2", "--average", "uniform", str(tmp_path / "c"))
    assert "license: unknown" in card


def test_a_token_is_asked_for_first(
    run_of_dino: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert cli.main(["export", str(run_of_dino), str(tmp_path / "out"), "--push", "me/enc"]) == 2
    assert "no token" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_config_is_told_by_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for body in ("{", "[]", '{"selfsight": 3}', "{}"):
        (tmp_path / "config.json").write_text(body)
        assert cli.main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
        assert "config.json is neither selfsight's nor timm's" in capsys.readouterr().err
