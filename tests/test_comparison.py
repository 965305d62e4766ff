"""A page that compares runs: the same colours everywhere, scores beside floors, and clear words for folders that are none."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import CHROMIUM, Page, drawn_by_chromium

from selfsight import cli
from selfsight.comparison import Run, charts, compare, names, notes, read_runs, side_by_side, what_differs
from selfsight.errors import StorageError, UsageError
from selfsight.plainyaml import dump
from selfsight.score_tables import scores_of

Fields = dict[str, Any]


def score(encoder: str, evaluator: str, value: float, **more: Any) -> Fields:
    told = {"encoder": encoder, "evaluator": evaluator, "value": value, "std": 0.0, "n": 1, "samples": 50}
    return told | {"train": "a", "test": "b", "protocol": f"{evaluator}: so and so"} | more


SCORES = [
    score("pretrained", "knn", 71.25, interval=[70.0, 73.0]),
    score("random-init", "knn", 20.0, n=3, std=1.5),
    score("majority", "majority", 10.0),
]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run folder of a recipe, lines of metrics and scores, without checkpoint."""

    def made(name: str, recipe: Fields | None = None, lines: int = 5, scores: Any = SCORES, text: str = "") -> Path:
        where = tmp_path / name
        where.mkdir(parents=True)
        tree = {"run_dir": str(where), "objective": {"name": "mae"}, "train": {"batch_size": 8}}
        (where / "recipe.yaml").write_text(dump(tree | (recipe or {})))
        written = [
            {"step": i, "epoch": i / 10, "loss": 1 / i, "loss/floor": 2.0, "lr": 0.1} for i in range(1, lines + 1)
        ]
        (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written) + text)
        if scores is not None:
            (where / "scores.json").write_text(json.dumps({"scores": scores}))
        return where

    return made


def test_runs_have_their_colour_in_every_chart_and_the_floors_stay_out(folder: Callable[..., Path]) -> None:
    runs = read_runs([folder("one"), folder("two", lines=1)])
    made = {chart.title: chart.svg for chart in charts(runs)}
    assert list(made) == ["Loss", "Learning rate"]
    for svg in made.values():
        assert svg.count('<path class="line c0"') == svg.count('<path class="line c1"') == 1
        assert "dashed" not in svg
        assert len(re.findall(r'<circle class="dot c1 shown"', svg)) == 1  # one point is to be seen, too
    assert "one 0.3333 at step 3" in made["Loss"]


def test_losses_of_different_objectives_are_drawn_apart_and_batches_over_passes(folder: Callable[..., Path]) -> None:
    other = {"objective": {"name": "dino", "momentum": 0.9}, "train": {"batch_size": 16}}
    runs = read_runs([folder("one"), folder("two", other)])
    made = {chart.title: chart.svg for chart in charts(runs)}
    assert list(made) == ["Loss (mae)", "Loss (dino)", "Learning rate"]
    assert 'class="line c1"' in made["Loss (dino)"]
    assert "c0" not in made["Loss (dino)"]
    assert "at pass 0.3" in made["Learning rate"]
    assert [line for line in notes(runs) if "no common scale" in line or "over passes" in line] == notes(runs)
    common, rare = what_differs(runs)
    assert [(line.name, line.cells) for line in common] == [
        ("objective.name", ["mae", "dino"]),
        ("train.batch_size", ["8", "16"]),
    ]
    assert [(line.name, line.cells) for line in rare] == [("objective.momentum", ["–", "0.9"])]


def test_scores_stand_beside_each_other_over_their_floors(folder: Callable[..., Path]) -> None:
    better = [SCORES[0] | {"value": 80.0, "samples": 49}, *SCORES[1:], score("pretrained", "linear", 90.0, test="c")]
    runs = read_runs([folder("one"), folder("two", scores=better), folder("three", scores=None)])
    first, second = side_by_side(runs)
    assert (first.title, second.title) == ("a → b", "a → c")
    shown = [(line.name, [cell and cell.value for cell in line.cells], line.kind) for line in first.lines]
    assert shown == [
        ("knn", [71.25, 80.0, None], "head"),
        ("random-init", [20.0, 20.0, None], "under"),
        ("majority", [10.0, 10.0, None], "under last"),
    ]
    assert [(line.name, line.kind) for line in second.lines] == [("linear", "")]
    assert first.lines[0].cells[0].spread == ["70.0 to 73.0"]
    assert first.deviations
    told = " ".join(notes(runs))
    assert "three: has no scores" in told
    assert "b: the runs were scored on different numbers of test images" in told


def test_floors_stand_below_whatever_encoders_are_called(folder: Callable[..., Path]) -> None:
    floors = [score("random-init of mine", "knn", 20.0, floor=True), score("pixels", "knn", 30.0, floor=True)]
    runs = read_runs([folder("one", scores=[*floors, score("mine", "knn", 71.0)]), folder("two")])
    (table,) = side_by_side(runs)
    assert [(line.name, [cell and cell.value for cell in line.cells], line.kind) for line in table.lines] == [
        ("knn", [71.0, 71.25], "head"),
        ("random-init of mine", [20.0, None], "under"),
        ("pixels", [30.0, None], "under"),
        ("random-init", [None, 20.0], "under"),
        ("majority", [None, 10.0], "under last"),
    ]


def test_the_page_is_whole_and_escapes_what_it_is_given(folder: Callable[..., Path], tmp_path: Path) -> None:
    evil = {"data": {"train": "<script>alert(1)</script>s3://user:pass@bucket/x?sig=secret"}}
    page = compare([folder("one"), folder("<b>two", evil, text='{"step": 6, "lo\n')], tmp_path / "c.html")
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert not re.search(r"<script|<b>two|pass@|secret|@import|url\(", text)
    assert "1 damaged line" in text
    assert "71.2" in text and "70.0 to 73.0" in text and "25.9" not in text
    assert text.count('scope="row"') >= 4
    if CHROMIUM:
        drawn_by_chromium(page, tmp_path)


def test_names_are_as_long_as_they_must_be() -> None:
    assert names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names([Path("/a/x/run"), Path("/b/x/run")]) == ["a/x/run", "b/x/run"]


def test_a_run_of_another_release_is_compared_as_it_is(folder: Callable[..., Path]) -> None:
    runs = read_runs([folder("one", {"from_the_future": {"knob": [0.5, None]}}), folder("two")])
    assert [(line.name, line.cells) for line in what_differs(runs)[1]] == [("from_the_future.knob", ["0.5, null", "–"])]


def test_what_cannot_be_compared_is_told(
    folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = folder("one"), folder("two")
    cases: list[tuple[list[Any], str]] = [
        ([one], "2 to 8 runs, not 1"),
        ([one] * 9, "2 to 8 runs, not 9"),
        ([one, one], "is named twice"),
        ([one, tmp_path], "is no run folder"),
        ([one, tmp_path / "nowhere"], "is no run folder"),
    ]
    for runs, told in cases:
        with pytest.raises(UsageError, match=told):
            compare(runs, tmp_path / "c.html")
    for page in (tmp_path, Path(), Path("..")):
        with pytest.raises(UsageError, match="is a folder; name a file"):
            compare([one, two], page)
    with pytest.raises(StorageError, match="cannot be written"):
        compare([one, two], tmp_path / "no" / "such" / "c.html")
    (two / "scores.json").write_text('{"scores": [{"encoder": 1}]}')
    assert cli.main(["report", str(one), str(two), "--out", str(tmp_path / "c.html")]) == 74
    assert "scores.json: is damaged" in capsys.readouterr().err
    (two / "recipe.yaml").write_text("a: [")
    assert cli.main(["report", str(one), str(two), "--out", str(tmp_path / "c.html")]) == 2
    assert not (tmp_path / "c.html").exists()


def test_the_command_compares(folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(folder("one")), str(folder("two"))]
    assert cli.main(["report", *runs, "--out", str(tmp_path / "c.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "c.html")
    shutil.rmtree(runs[1])
    assert cli.main(["report", *runs, "--out", str(tmp_path / "c.html")]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_eight_long_runs_stay_a_small_page(folder: Callable[..., Path], tmp_path: Path) -> None:
    runs = [folder(f"run-{i}", lines=3000) for i in range(8)]
    page = compare(runs, tmp_path / "c.html")
    assert page.stat().st_size < 1_000_000


def test_an_empty_run_says_so(folder: Callable[..., Path], tmp_path: Path) -> None:
    runs = [folder("one", lines=0, scores=[]), folder("two", lines=0, scores=None)]
    text = compare(runs, tmp_path / "c.html").read_text()
    for told in (
        "holds nothing to draw",
        "was not scored",
        "has no scores (yet)",
        "None of them has scores",
        "Nothing: the recipes are the same",
    ):
        assert told in text, told


def test_scores_of_an_earlier_release_are_read() -> None:
    old = scores_of({"scores": [{"encoder": "pretrained", "evaluator": "knn", "value": 1, "std": 0.0, "n": 1}]})[0]
    assert (old.name, old.unit, old.shown, old.spread) == ("knn", "%", "1.0", [])
    run = Run("x", Path("x"), {}, [], [old], [])
    assert (run.objective, run.batch_size) == ("?", 0)
