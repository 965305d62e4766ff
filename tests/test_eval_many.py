"""Several encoders and several sets in one call, without labels, and what is shown of it."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import pictures

from selfsight import cli, console
from selfsight.data.build import write_shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, StorageError, UsageError
from selfsight.eval import job
from selfsight.eval.asked import encoders_of, unique
from selfsight.eval.evaluate import evaluate
from selfsight.eval.evaluators import EVALUATORS, Evaluator
from selfsight.eval.health import rankme
from selfsight.eval.subject import Outcome, Subject
from selfsight.eval.tables import columns_of, difference_lines, format_score, grid, markdown, protocols, rows_of, short
from selfsight.recipe import DataConfig, EncoderConfig


def made(seed: int = 0, width: int = 16, **fields: Any) -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=width, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x", **fields), config), seed).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards: train and test of two and of three classes, and test without labels."""
    top = tmp_path_factory.mktemp("sets")
    sets = {"a-train": (60, 2, 0), "a-test": (30, 2, 1), "b-train": (60, 3, 2), "b-test": (33, 3, 3)}
    for name, (count, classes, seed) in sets.items():
        (top / name).mkdir()
        write_shards(iter(pictures(count, classes=classes, seed=seed)), top / name, "s")
    (top / "none").mkdir()
    write_shards(((image, None) for image, _ in pictures(30, seed=4)), top / "none", "s")
    return top


@pytest.fixture
def label_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluator that asks neither labels nor a training set, and has one twin; and one that needs an encoder."""

    def rank(subject: Subject) -> list[Outcome]:
        return [Outcome((rankme(subject.held),), "rank: of the test features", metric="RankMe", unit="")]

    def weights(subject: Subject) -> list[Outcome]:
        return [Outcome((1.0, 3.0), "weights")] if subject.encoder else []

    more = {"rank": Evaluator(rank, "", labels=False, train=False, twins=1), "weights": Evaluator(weights, "")}
    both = {**EVALUATORS, **more}
    for module in ("asked", "job", "evaluators"):
        monkeypatch.setattr(f"selfsight.eval.{module}.EVALUATORS", both)
    monkeypatch.setattr("selfsight.eval.NAMES", tuple(both))


def knn(*given: Any, **more: Any) -> dict[str, Any]:
    return evaluate(*given, **({"evaluators": ("knn",), "k": (3,)} | more))


def by(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(score["dataset"], score["encoder"]): score for score in found["scores"]}


def test_several_encoders_are_those_alone_in_one_table(folder: Path) -> None:
    sets = str(folder / "a-train"), str(folder / "a-test")
    together = by(knn({"one": made(5), "two": made(6), "wide": made(7, width=32)}, *sets))
    names = [name for _, name in together]
    assert names == [
        "one", "two", "wide", "random-init of one", "random-init of wide", "pixels", "majority",
    ]  # fmt: skip
    for name, encoder in (("one", made(5)), ("wide", made(7, width=32))):
        alone = by(knn(encoder, *sets))
        for there, here in ((name, "pretrained"), (f"random-init of {name}", "random-init"), ("pixels", "pixels")):
            assert together[sets[1], there] == alone[sets[1], here] | {"encoder": there}


def test_encoders_that_read_images_otherwise_have_their_own_pixels(folder: Path) -> None:
    sets = str(folder / "a-train"), str(folder / "a-test")
    found = knn([made(5), made(6, crop_pct=0.8), made(7, mean=(0.4,))], *sets)
    assert [name for _, name in by(found)][3:] == [
        "random-init of encoder 1", "random-init of encoder 2", "random-init of encoder 3",
        "pixels of encoder 1", "pixels of encoder 2", "majority",
    ]  # fmt: skip
    over = {(d["encoder"], d["over"]) for d in found["differences"]}
    assert over == {*((f"encoder {n}", f"random-init of encoder {n}") for n in (1, 2, 3)),
                    ("encoder 1", "pixels of encoder 1"), ("encoder 2", "pixels of encoder 2"), ("encoder 3", "pixels of encoder 1"),
                    ("encoder 2", "encoder 1"), ("encoder 3", "encoder 1")}  # fmt: skip


def test_several_sets_have_rows_each_and_their_mean(folder: Path) -> None:
    names = {"a": "a", "b": "b"}
    train, test = ({name: str(folder / f"{name}-{split}") for name in names} for split in ("train", "test"))
    found = by(knn(made(5), train, test))
    assert [dataset for dataset, _ in found] == ["a"] * 4 + ["b"] * 4 + ["mean"] * 4
    for name in names:
        alone = by(knn(made(5), train[name], test[name]))
        for encoder in ("pretrained", "random-init", "pixels", "majority"):
            ours, theirs = dict(found[name, encoder]), dict(alone[test[name], encoder])
            for score in (ours, theirs):
                score.pop("interval"), score.pop("dataset")  # every set has draws of its own
            assert ours == theirs
    mean = found["mean", "pretrained"]
    assert mean["value"] == pytest.approx((found["a", "pretrained"]["value"] + found["b", "pretrained"]["value"]) / 2)
    assert mean["samples"] == 63
    one = knn(made(5), train["b"], {"a": test["a"], "b": test["b"]})  # one training set for both
    assert {score["train"] for score in one["scores"]} == {train["b"]}


def test_lists_of_shards_are_one_set(folder: Path) -> None:
    shards = sorted(map(str, (folder / "a-train").glob("*.tar"))) + sorted(map(str, (folder / "b-train").glob("*.tar")))
    (dataset,) = {score["dataset"] for score in knn(made(5), shards, str(folder / "b-test"))["scores"]}
    assert dataset == str(folder / "b-test")


def test_without_labels_and_without_a_training_set(folder: Path, label_free: None) -> None:
    encoders = {"one": made(5), "two": made(6)}
    found = evaluate(encoders, None, str(folder / "none"), evaluators=("rank",))
    rows = [(score["encoder"], score["evaluator"], score["metric"], score["n"]) for score in found["scores"]]
    assert rows == [(name, "rank", "RankMe", 1) for name in ("one", "two", "random-init", "pixels")]
    assert found["differences"][0]["interval"] is None
    assert difference_lines(found) == []  # of RankMe more is not simply better
    with pytest.raises(
        UsageError, match=r"knn: need a training set; add --train, or choose of those that need none \(--with .*rank"
    ):
        evaluate(encoders, None, str(folder / "none"), evaluators=("rank", "knn"))
    with pytest.raises(UsageError, match="30 of 30 samples have no label"):
        evaluate(encoders, str(folder / "a-train"), str(folder / "none"), evaluators=("rank", "knn"))


def test_an_evaluator_that_cannot_speak_leaves_its_cell_empty(folder: Path, label_free: None) -> None:
    found = evaluate(
        made(5), str(folder / "a-train"), str(folder / "a-test"), evaluators=("weights", "knn", "rank"), k=(3,)
    )
    columns = columns_of(found["scores"])
    assert list(columns.values()) == ["weights", "knn", "rank"]
    cells = {row[0]: row[1:] for row in rows_of(found["scores"], columns)}
    assert cells["pretrained"][0] == "2.0 ± 1.4"
    assert cells["pixels"][0] == "-"
    assert cells["majority"] == ["-", "50.0", "-"]


def test_twins_are_as_many_as_the_evaluator_wants(folder: Path, label_free: None) -> None:
    found = evaluate(made(5), str(folder / "a-train"), str(folder / "a-test"), evaluators=("rank", "knn"), k=(3,))
    floors = {score["evaluator"]: score["n"] for score in found["scores"] if score["encoder"] == "random-init"}
    assert floors == {"rank": 1, "knn": 3}


def test_a_twin_has_one_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def look(subject: Subject) -> list[Outcome]:
        seen.append((subject.name, subject.options.seeds))
        return [Outcome((1.0,), "look")]

    for module in ("asked", "job"):
        monkeypatch.setattr(f"selfsight.eval.{module}.EVALUATORS", {"look": Evaluator(look, "")})
    monkeypatch.setattr("selfsight.eval.NAMES", ("look",))
    evaluate(made(5), str(folder / "a-train"), str(folder / "a-test"), evaluators=("look",))
    assert seen == [("pretrained", 3), *[("random-init", 1)] * 3, ("pixels", 3)]


def test_pools_are_chosen(folder: Path) -> None:
    sets = str(folder / "a-train"), str(folder / "a-test")
    assert "features: cls, fp32" in knn(made(5), *sets, pools=("cls",))["scores"][0]["protocol"]
    assert "features: mean, fp32" in knn(made(5), *sets, pools=("cls", "mean"))["scores"][0]["protocol"]
    with pytest.raises(UsageError, match="no pool gap; this encoder has mean, cls"):
        knn(made(5), *sets, pools=("cls", "gap"))


@pytest.mark.parametrize(("train", "test", "told"), [
    ({"a": "digits:train"}, {"b": "digits:test"}, "train has the sets a, test has b"),
    ({"a": "digits:train"}, "digits:test", "train has the sets a, test has digits:test"),
    ("digits:train", {"mean": "digits:test", "b": "digits:train"}, "a set cannot be called 'mean'"),
    ("digits:train", None, "name a test set"),
])  # fmt: skip
def test_sets_that_do_not_go_together_are_refused(train: Any, test: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        knn(made(), train, test)
    with pytest.raises(UsageError, match="no evaluator asked for; there are knn"):
        knn(made(), "digits:train", "digits:test", evaluators=())


def test_names(tmp_path: Path) -> None:
    assert unique(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert list(encoders_of(["https://me:secret@far.example/x?sig=1", "y", "y"])) == [
        "https://***@far.example/x?***", "y", "y (2)",
    ]  # fmt: skip
    assert list(encoders_of([tmp_path])) == list(encoders_of("x")) == ["pretrained"]
    assert encoders_of(None) == {}


def row(encoder: str, evaluator: str, value: float, **more: Any) -> dict[str, Any]:
    return {
        "encoder": encoder,
        "evaluator": evaluator,
        "value": value,
        "std": 0.0,
        "n": 1,
        "test": "t",
        "samples": 9,
    } | more


def test_names_of_floors_are_not_given_to_encoders() -> None:
    a, b = made(1), made(2)
    assert list(encoders_of(["pixels", "a"])) == ["pixels (2)", "a"]
    assert list(encoders_of(["a", "random-init of a"])) == ["a", "random-init of a (2)"]
    for name in ("majority", "random-init of a", "pixels of a"):
        with pytest.raises(UsageError, match=f"an encoder cannot be called '{name}'"):
            encoders_of({"a": a, name: b})
    (name,) = encoders_of({"https://me:secret@x.org/w": a})
    assert "secret" not in name


def test_the_callers_encoder_is_as_it_was(folder: Path) -> None:
    encoder = made(5).train()
    knn(encoder, str(folder / "a-train"), str(folder / "a-test"), evaluators=("knn", "health"))
    assert encoder.training and all(module.training for module in encoder.modules())


def test_a_set_is_drawn_alike_whatever_stands_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    real = job.with_intervals

    def watched(rows: Any, groups: Any, seed: int) -> Any:
        seeds.append(seed)
        return real(rows, groups, seed)

    monkeypatch.setattr(job, "with_intervals", watched)
    (a, a_test), (b, b_test) = [(str(folder / f"{s}-train"), str(folder / f"{s}-test")) for s in "ab"]
    knn(made(5), {"x": a, "y": b, "z": a}, {"x": a_test, "y": b_test, "z": a_test})
    knn(made(5), b, b_test)
    first, second, third, alone = seeds
    assert first == third != second == alone


def test_differences_are_over_pixels_too(folder: Path) -> None:
    found = knn({"one": made(5), "two": made(6)}, str(folder / "a-train"), str(folder / "a-test"))
    told = [(one["encoder"], one["over"]) for one in found["differences"]]
    assert told == [
        ("one", "random-init"), ("one", "pixels"), ("two", "random-init"), ("two", "pixels"), ("two", "one"),
    ]  # fmt: skip


@pytest.mark.parametrize(("more", "told"), [
    ({"evaluators": ("knn", "robust"), "k": (1000,)}, "1000"),
    ({"evaluators": ("robust",), "k": (1000,)}, "1000"),
    ({"evaluators": ("finetune",), "epochs": 0}, "epochs: 0; fine-tuning takes at least one"),
    ({"scales": (0,)}, "scales: 0; give different whole numbers"),
    ({"merge": -1}, "merge: -1 tokens a block"),
    ({"evaluators": ("linear",), "pools": ("attentive",), "scales": (1, 2)}, "take the plain tokens"),
])  # fmt: skip
def test_what_would_end_it_is_told_before_any_feature_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr("selfsight.eval.extracted.extract", lambda *args, **more: pytest.fail("features were taken"))
    with pytest.raises(UsageError, match=told):
        knn(made(5), str(folder / "a-train"), str(folder / "a-test"), **more)


def test_an_encoder_of_other_channels_is_told_before_the_first_is_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncoderConfig(image_size=8, channels=5, patch=2, width=16, depth=1, heads=2)
    five = build_encoder(config, preprocessing_of(DataConfig(train="x", mean=(0.5,) * 5, std=(0.5,) * 5), config), 0)
    monkeypatch.setattr("selfsight.eval.extracted.extract", lambda *args, **more: pytest.fail("features were taken"))
    with pytest.raises(DataError, match="the encoder takes 5"):
        knn({"one": made(5), "five": five}, str(folder / "a-train"), str(folder / "a-test"))


def test_the_line_to_cite_tells_scales_and_merging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 50)
    sets = str(folder / "a-train"), str(folder / "a-test")
    asked = ("knn", "linear", "logistic", "lda", "retrieval", "cluster", "health", "robust")
    found = knn(made(5), *sets, evaluators=asked, scales=(1, 2), merge=2)["scores"]
    for score in (score for score in found if score["encoder"] == "pretrained"):
        plain = score["evaluator"] == "robust" or score["metric"] in ("alignment", "attention distance")
        told = "images encoded plainly, without scales and merging" if plain else "mean, scales 1+2, 2 tokens merged"
        if score["evaluator"] != "linear":
            assert told in score["protocol"], score["protocol"]
        else:
            assert ", scales 1+2, 2 tokens merged a block, fp32" in score["protocol"]
    assert not any("scales 1+2" in score["protocol"] for score in found if score["encoder"] == "pixels")


def test_the_title_says_correct_of_accuracies_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for more, title in (({}, "t, % correct"), ({"metric": "mAP"}, "t, %"), ({"metric": "std", "unit": ""}, "t")):
        console.show_scores({"scores": [row("p", "knn", 90, **more)]})
        assert capsys.readouterr().out.splitlines()[0].strip() == title


def test_columns_name_the_metric_where_it_must_be_told() -> None:
    scores = [
        row("p", "knn", 90, metric="accuracy"),
        row("p", "retrieval", 80, metric="mAP"),
        row("p", "retrieval", 70, metric="recall@1"),
        row("p", "health", 12.3456, metric="RankMe", unit=""),
        row("majority", "majority", 10, metric="accuracy"),
    ]
    columns = columns_of(scores)
    assert list(columns.values()) == ["knn", "retrieval mAP", "retrieval recall@1", "health"]
    assert rows_of(scores, columns) == [["p", "90.0", "80.0", "70.0", "12.3"], ["majority", "10.0", "-", "-", "-"]]
    older = [row("p", "knn", 90), row("majority", "majority", 10)]  # scores.json of an older release
    assert rows_of(older, columns_of(older)) == [["p", "90.0"], ["majority", "10.0"]]
    assert format_score(None) == "-"
    assert format_score(row("p", "knn", 94.25, std=0.31, n=3)) == "94.2 ± 0.3"


def test_many_scores_stand_below_each_other() -> None:
    scores = [row(encoder, f"e{n}", n + 10 * m) for m, encoder in enumerate(("p", "q")) for n in range(7)]
    assert grid(scores[:6]) == (["encoder", *(f"e{n}" for n in range(6))], [["p", *(f"{n}.0" for n in range(6))]])
    head, rows = grid(scores)
    assert head == ["score", "p", "q"]
    assert rows == [[f"e{n}", f"{n}.0", f"{n + 10}.0"] for n in range(7)]
    found = {"scores": [{**score, "protocol": "how"} for score in scores]}
    assert markdown(found).splitlines()[2:5] == ["| score | p | q |", "|---|---:|---:|", "| e0 | 0.0 | 10.0 |"]
    many = [row(f"p{m}", f"e{n}", n) for m in range(9) for n in range(7)]
    assert grid(many)[0][0] == "encoder"


def test_the_line_says_whether_pretraining_helped() -> None:
    told = {"encoder": "pretrained", "evaluator": "knn", "metric": "accuracy", "unit": "%", "dataset": "t",
            "over": "random-init", "value": 63.84, "interval": [60.12, 66.98]}  # fmt: skip
    assert difference_lines({"differences": [told]}) == ["knn: +63.8 points over random-init (95 %: 60.1 to 67.0)"]
    worse = told | {"value": -1.26, "interval": None, "metric": "mAP"}
    assert difference_lines({"differences": [worse]}) == ["knn mAP: -1.3 points over random-init"]
    rubbish = [
        told | {"unit": ""},
        told | {"value": "1"},
        told | {"interval": ["a", 2]},
        told | {"interval": 3},
        {},
        "x",
    ]
    assert difference_lines({"differences": rubbish}) == difference_lines({}) == []
    two = [told, told | {"encoder": "other"}]
    assert difference_lines({"differences": two})[1].startswith("other, knn: +63.8 points")


def test_markdown_is_a_table_and_what_stands_under_it(folder: Path) -> None:
    found = knn({"one|1": made(5), "two": made(6)}, str(folder / "a-train"), str(folder / "a-test"))
    lines = markdown(found | {"warnings": ["mind the gap"]}).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[:2] == ["| encoder | knn |", "|---|---:|"]
    assert table[2].startswith("| one\\|1 | ")
    assert len(table) == 2 + 5
    assert f"**{folder / 'a-test'}** (test, 30 samples; % unless told)" in lines
    assert "- **warning:** mind the gap" in lines
    assert (
        sum(line.startswith(("- one|1", "- one\\|1")) for line in lines) == 2
    )  # two differences; a protocol serves both
    assert not any("initialisations" in line for line in lines)


def test_several_from_the_command_line(
    folder: Path, tmp_path: Path, unchecked_export: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from selfsight.exports.export import export

    names = [str(tmp_path / name) for name in ("one", "two")]
    for seed, name in enumerate(names):
        export(made(seed + 5), Path(name), {})
    sets = [word for s in "ab" for word in ("--train", str(folder / f"{s}-train"), "--test", str(folder / f"{s}-test"))]
    files = ["--json", str(tmp_path / "s.json"), "--markdown", str(tmp_path / "s.md")]
    assert cli.main(["eval", *names, *sets, "--with", "knn", "--k", "3", "--no-cache", *files]) == 0
    shown = capsys.readouterr()
    found = json.loads((tmp_path / "s.json").read_text())
    assert {score["encoder"] for score in found["scores"]} >= {*names, "random-init", "pixels", "majority"}
    assert {score["dataset"] for score in found["scores"]} == {str(folder / "a-test"), str(folder / "b-test"), "mean"}
    assert shown.out.count("random-init") == 3
    assert "points over random-init (95 %:" in shown.err
    assert (tmp_path / "s.md").read_text() == markdown(found)
    assert cli.main(["eval", names[0], *sets[:4], "--with", "knn", "--k", "3", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith(f"**{folder / 'a-test'}** (test, 30 samples")


@pytest.mark.parametrize(("words", "told"), [
    (["x", "--train", "digits:train", "--train", "digits:test", "--test", "digits:test"], "2 --train and 1 --test"),
    (["x", "--test", "digits:test", "--json", "runs/a"], "--json: runs/a is no .json file; put --json after the encoders"),
    (["x", "--test", "digits:test", "--markdown", "runs/a"], "--markdown: runs/a is no .md file"),
    (["x", "--test", "digits:test", "--json", "no/such/s.json"], "--json: no/such/s.json cannot be written; is its folder there?"),
    (["x", "--test", "digits:test", "--shots", "1,b"], "--shots: '1,b' is not a list of whole numbers"),
    (["x", "--test", "digits:test", "--with", "knn"], "knn: need a training set; add --train"),
    (["--test", "digits:test", "--train", "digits:train"], "digits:test: holds images; name an encoder"),
])  # fmt: skip
def test_wrong_commands_are_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_file_that_cannot_be_written_takes_no_scores(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = {"scores": [row("p", "knn", 91.5, protocol="how")]}
    with pytest.raises(StorageError, match="cannot be written"):
        cli._show_scores(found, argparse.Namespace(json=str(tmp_path / "gone" / "s.json"), markdown=None))
    assert "91.5" in capsys.readouterr().out


def test_older_scores_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_scores({"scores": [row("pretrained", "knn", 90, protocol="how"), row("majority", "majority", 10)]})
    shown = capsys.readouterr()
    assert "90.0" in shown.out
    assert "how" in shown.err


def test_every_evaluator_is_known_by_its_line() -> None:
    assert all(known.told for known in EVALUATORS.values())
    assert all(known.twins in (1, 3) for known in EVALUATORS.values())


def test_names_and_lines_are_as_long_as_they_must_be() -> None:
    assert short(["runs/a/checkpoints/step-1", "runs/a/checkpoints/step-2", "pixels"]) == ["step-1", "step-2", "pixels"]
    assert short(["runs/a", "runs/b/encoder", "x"]) == ["a", "b/encoder", "x"]
    assert short(["runs/a"]) == ["runs/a"] and short(["a/x", "a/x/y"]) == ["x", "x/y"]
    told = [
        {"encoder": name, "dataset": "t", "protocol": line} for name, line in (("a", "k=1"), ("b", "k=1"), ("b", "C=2"))
    ]
    assert protocols(told) == ["k=1", "b, t: C=2"]


def test_a_collapse_is_told(folder: Path) -> None:
    encoder = made(5)
    told = lambda: evaluate(encoder, None, str(folder / "a-test"), evaluators="health")["warnings"]  # noqa: E731
    assert told() == []
    encoder.backbone.patch_embed.proj.weight.data.mul_(1e-3)  # images hardly count any more
    assert any("nearly the same (cosine 1.000)" in line for line in told())
