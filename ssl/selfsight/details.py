"""What evaluators give with their scores, drawn: what is confused, curves over a severity, how far attention looks."""

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

from selfsight.charts import Series, line_chart
from selfsight.curves import Chart
from selfsight.marks import MOST_CLASSES, dots, matrix
from selfsight.score_tables import Score

MOST_PAIRS = 8  # confused pairs that are named
_CONFUSED_BY = ("finetune", "linear", "logistic", "knn")  # whose matrix is shown, the first that is there
_DISTANCE = "attention_distance"


class Confusion(NamedTuple):
    """What is taken for what."""

    title: str
    svg: str
    """Empty where there are too many classes to draw."""
    pairs: list[str]


def confusion(scores: Sequence[Score]) -> Confusion | None:
    """The matrix of the strongest probe that has one, and its most confused pairs."""
    known = [s for s in scores if not s.floor and s.detail.get("confusion")]
    known.sort(key=lambda s: _CONFUSED_BY.index(s.evaluator) if s.evaluator in _CONFUSED_BY else len(_CONFUSED_BY))
    if not known:
        return None
    score = known[0]
    counts = _counts(score.detail["confusion"])
    classes = score.detail.get("classes")
    names = [str(name) for name in (classes if isinstance(classes, list) and classes else range(len(counts)))]
    if not counts or len(names) != len(counts) or any(len(row) != len(counts) for row in counts):
        return None
    wrong = sorted(((n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j), reverse=True)
    pairs = [
        f"{names[i]} taken for {names[j]}: {n:,} of {sum(counts[i]):,}"
        for n, i, j in sorted(wrong, key=lambda w: (-w[0], w[1:]))[:MOST_PAIRS]
    ]
    title = f"What {score.name} confuses"
    return Confusion(title, matrix(counts, names, title) if len(names) <= MOST_CLASSES else "", pairs)


def detail_charts(scores: Sequence[Score]) -> list[Chart]:
    """Curves that evaluators give with their scores, all encoders in one chart, and distances of attention."""
    made = []
    curved = [score for score in scores if score.detail.get("curve")]
    for name in dict.fromkeys(score.name for score in curved):
        own = [score for score in curved if score.name == name]
        lines = [Series(score.encoder, _points(score.detail["curve"]), score.floor) for score in own]
        x, first = str(own[0].detail.get("x", "x")), own[0]
        below = sorted((line for line in lines if line.dashed and line.points), key=lambda line: -line.points[0][1])
        floors = f" Dotted, from above: {', '.join(line.name for line in below)}." if below else ""
        if drawn := line_chart(lines, f" {first.unit}".rstrip(), name, x):
            made.append(Chart(name, drawn, f"Over {x}.{floors}", first.shown))
    for score in scores:
        layers = score.detail.get(_DISTANCE)
        if not score.floor and isinstance(layers, Sequence) and layers:
            heads = _table_of([layer if isinstance(layer, Sequence) else [layer] for layer in layers])
            drawn = dots(heads, "Attention distance", " px")
            hint = "Pixels, of each head of each block: short looks at neighbours, long across the image."
            made.append(Chart("Attention distance", drawn, hint, score.shown))
    return made


def _points(curve: Any) -> list[tuple[float, float]]:
    return sorted((row[0], row[1]) for row in _table_of(curve) if len(row) == 2)


def _counts(rows: Any) -> list[list[int]]:
    table = _table_of(rows)
    return [[int(n) for n in row] for row in table] if all(0 <= n < inf for row in table for n in row) else []


def _table_of(rows: Any) -> list[list[float]]:
    """Rows of numbers; nothing, if a file that somebody else wrote has something else there."""
    try:
        return [[float(value) for value in row] for row in rows]
    except (TypeError, ValueError):
        return []
