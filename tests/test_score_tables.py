"""Scores as tables: rows are metrics, columns encoders; whatever scores.json may hold, and what it should not."""

import re
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfsight.details import confusion, detail_charts
from selfsight.errors import StorageError
from selfsight.finish import read_scores
from selfsight.marks import Mark, dots, matrix, scatter, strip
from selfsight.score_tables import (
    Score,
    health_tables,
    scores_of,
    tables,
    warnings,
)

Row = dict[str, Any]


def row(encoder: str, evaluator: str, value: float, **more: Any) -> Row:
    told = {"encoder": encoder, "evaluator": evaluator, "metric": "accuracy", "unit": "%", "value": value, "std": 0.0}
    return told | {"n": 1, "train": "a", "test": "b", "samples": 7, "protocol": f"{encoder} {evaluator}"} | more


ROWS = [
    row("pretrained", "knn", 90.04, interval=[88.0, 92.0]),
    row("pretrained", "linear", 91.0, std=0.25, n=3),
    row("pretrained", "fewshot", 50.0, metric="1-shot"),
    row("pretrained", "health", 12.345, metric="RankMe", unit=""),
    row("pretrained", "health", -0.5, metric="uniformity", unit="nats"),
    row("random-init", "knn", 20.0, std=2.0, n=3),
    row("random-init", "health", 3.0, metric="RankMe", unit=""),
    row("majority", "majority", 10.0),
]


def test_rows_are_metrics_and_columns_encoders() -> None:
    (table,) = tables(scores_of({"scores": ROWS}))
    assert table.encoders == ["pretrained", "random-init", "majority"]
    shown = {
        line.name: [cell and (cell.shown, cell.deviation, cell.spread) for cell in line.cells] for line in table.rows
    }
    assert shown == {
        "knn": [("90.0", "", ["88.0 to 92.0"]), ("20.0", "± 2.0", ["n 3"]), ("10.0", "", [])],
        "linear": [("91.0", "± 0.2", ["n 3"]), None, ("10.0", "", [])],
        "fewshot 1-shot": [("50.0", "", []), None, None],  # the commonest class answers for accuracy alone
    }
    assert table.protocols == ["pretrained knn", "pretrained linear", "pretrained fewshot"]
    assert (table.samples, table.intervals, table.deviations, table.scaled) == (7, True, True, True)
    (health,) = health_tables(scores_of({"scores": ROWS}))
    assert health.encoders == ["pretrained", "random-init"]
    assert [(line.name, [cell and cell.shown for cell in line.cells]) for line in health.rows] == [
        ("RankMe", ["12.3", "3"]),
        ("uniformity", ["−0.5 nats", None]),
    ]
    assert not health.scaled


def test_several_sets_are_several_tables() -> None:
    found = tables(scores_of({"scores": [*ROWS, row("pretrained", "knn", 1.0, test="mean over 2")]}))
    assert [(table.test, len(table.rows)) for table in found] == [("b", 3), ("mean over 2", 1)]
    assert tables([]) == []


@pytest.mark.parametrize(
    "found",
    [
        {"scores": [{"encoder": "x"}]},
        {"scores": [{"encoder": "x", "evaluator": "y", "value": "high"}]},
        {"scores": [3]},
        {"scores": 3},
        {"scores": [row("x", "y", 1.0, interval="ab")]},
        {"scores": [row("x", "y", 1.0, n="many")]},
        {"scores": [row("x", "y", 1.0, detail=[3])]},
        {"scores": [row("x", "y", 1.0, n=float("inf"))]},
        {"scores": ROWS, "warnings": 3},
        {"scores": ROWS, "differences": 3},
    ],
)
def test_damaged_scores_are_told(found: Row) -> None:
    with pytest.raises(StorageError, match=r"scores\.json: is damaged"):
        scores_of(found)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", "{", "[" * 100_000, '{"scores": null}', '{"scores": [], "warnings": 3}']
)
def test_a_file_of_something_else_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(StorageError, match=r"scores\.json: is damaged"):
        read_scores(tmp_path / "scores.json")


def test_floors_are_told_by_their_rows() -> None:
    found = scores_of({"scores": [row("random-init of a", "knn", 1.0, floor=True), row("pixels", "knn", 1.0), ROWS[0]]})
    assert [score.floor for score in found] == [True, True, False]


def test_warnings_are_lines_if_they_are_there() -> None:
    assert warnings({"warnings": ["12 of 20"]}) == ["12 of 20"]
    assert warnings({"warnings": "one"}) == ["one"]
    assert warnings({}) == []


def test_the_matrix_is_of_the_strongest_probe_and_names_the_worst_pairs() -> None:
    counts = [[8, 2, 0], [0, 9, 1], [3, 0, 7]]
    detail = {"confusion": counts, "classes": ["cat", "dog", "<owl>"]}
    scores = scores_of(
        {
            "scores": [
                row("pretrained", "knn", 1.0, detail={"confusion": [[1, 0], [0, 1]]}),
                row("pretrained", "linear", 1.0, detail=detail),
                row("random-init", "finetune", 1.0, detail=detail),
            ]
        }
    )
    found = confusion(scores)
    assert found is not None
    assert found.title == "What linear confuses"
    assert found.pairs == ["<owl> taken for cat: 3 of 10", "cat taken for dog: 2 of 10", "dog taken for <owl>: 1 of 10"]
    assert found.svg.count("<rect") == 9
    assert found.svg.count('class="right"') == 3
    assert "<title>&lt;owl&gt; taken for cat: 3</title>" in found.svg
    assert confusion(scores[:1]) is not None
    assert confusion(scores[2:]) is None
    assert confusion([Score("pretrained", "knn", 1.0, detail={"confusion": [[1, 2], [3]]})]) is None


def test_rows_are_the_truth() -> None:
    drawn = matrix([[0, 5], [0, 5]], ["a", "b"], "")
    cells = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)"[^>]*><title>([^<]*)', drawn)
    assert cells == [("wrong", "223.0", "46.0", "a taken for b: 5"), ("right", "223.0", "223.0", "b taken for b: 5")]


def test_many_classes_are_named_in_pairs_alone() -> None:
    counts = [[10 if i == j else int(j == i + 1) * i for j in range(60)] for i in range(60)]
    found = confusion([Score("pretrained", "knn", 1.0, detail={"confusion": counts})])
    assert found is not None
    assert found.svg == ""
    assert found.pairs[0] == "58 taken for 59: 58 of 68"
    assert len(found.pairs) == 8
    full = matrix([[i + j for j in range(50)] for i in range(50)], [str(i) for i in range(50)], "")
    assert len(full) < 600_000


def test_details_are_drawn() -> None:
    scores = [
        Score("pretrained", "robust", 50.0, metric="blur", detail={"curve": [[3, 10.0], [1, 90.0]], "x": "severity"}),
        Score("pixels", "robust", 50.0, metric="blur", detail={"curve": [[1, 50.0], [3, 10.0]], "x": "severity"}),
        Score("pretrained", "health", 5.0, metric="distance", detail={"attention_distance": [[1.0, 3.0], [4.0, 8.0]]}),
        Score("random-init", "health", 5.0, metric="distance", detail={"attention_distance": [[1.0, 3.0]]}),
    ]
    curve, distance = detail_charts(scores)
    assert curve.title == "robust blur"
    assert "pretrained 90 % at severity 1" in curve.svg
    assert curve.svg.count("dashed") == 1
    assert curve.hint == "Over severity. Dotted, from above: pixels."
    assert "block 2, head 1: 4 px" in distance.svg
    assert distance.svg.count("<circle") == 4
    assert detail_charts([Score("pretrained", "knn", 1.0)]) == []
    flat = detail_charts([Score("pretrained", "health", 1.0, detail={"attention_distance": [2.0, 3.0]})])
    assert flat[0].svg.count("<circle") == 2


@given(st.lists(st.floats(-10, 110), min_size=1, max_size=5))
def test_a_scale_is_from_0_to_100(values: list[float]) -> None:
    drawn = strip([Mark(f"e{i}", value, value - 1, value + 1, i == 0) for i, value in enumerate(values)])
    places = [float(x) for x in re.findall(r'c?x[12]?="([\d.-]+)"', drawn)]
    assert all(4 <= x <= 176 for x in places)
    assert drawn.count("<circle") == 1
    assert drawn.count('class="floor"') == len(values) - 1


def test_a_scale_puts_values_in_order() -> None:
    drawn = strip(
        [Mark("mine", 50.0, 40.0, 60.0, True), Mark("zero", 0.0, 0, 0, False), Mark("all", 100.0, 0, 0, False)]
    )
    assert re.findall(r'cx="([\d.]+)"', drawn) == ["90.0"]
    assert drawn.index("whisker") > drawn.rindex('class="floor"')  # one's own lies above
    assert re.findall(r'class="floor" x1="([\d.]+)"', drawn) == ["4.0", "176.0"]
    assert re.findall(r'whisker c0" x1="([\d.]+)" x2="([\d.]+)"', drawn) == [("72.8", "107.2")]


def test_maps_keep_their_shape() -> None:
    drawn = scatter([(0.0, 0.0), (10.0, 0.0), (0.0, 5.0)], [0, 1, 1], ["class a", "class b"], "map")
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert places[1][0] - places[0][0] == pytest.approx(2 * (places[2][1] - places[0][1]))
    assert drawn.count("<title>class b</title>") == 2
    assert scatter([(1.0, 1.0)] * 3, [0] * 3, [], "one place").count("<circle") == 3


def test_layers_without_numbers_are_no_chart() -> None:
    assert dots([[float("nan")], []], "") == ""
    assert dots([[1.0], []], "").count("<circle") == 1


@pytest.mark.parametrize(
    "rubbish", [3, "abc", ["x"], [[1, "y"]], [[1], [2]], [None], {"a": 1}, [[inf, 1], [1, 1]], [[nan]], [[-1]]]
)
def test_details_of_another_shape_are_left_out(rubbish: Any) -> None:
    detail = {"curve": rubbish, "confusion": rubbish, "attention_distance": rubbish}
    scores = [Score("pretrained", "knn", 1.0, detail=detail)]
    drawn = {chart.title: chart.svg for chart in detail_charts(scores)}
    assert set(drawn) <= {"Attention distance", "knn"}
    assert not re.search("nan|inf", "".join(drawn.values()))
    assert confusion(scores) is None


@pytest.mark.parametrize("classes", [5, {"a": 1}, "ab", []])
def test_classes_that_are_no_list_are_numbered(classes: Any) -> None:
    found = confusion([Score("pretrained", "knn", 1.0, detail={"confusion": [[1, 2], [0, 1]], "classes": classes})])
    assert found is not None
    assert found.pairs == ["0 taken for 1: 2 of 3"]
