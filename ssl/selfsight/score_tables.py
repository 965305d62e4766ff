"""Scores as tables that a phone can show: a row for each evaluator's metric, a column for each encoder, floors beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

from selfsight.errors import StorageError
from selfsight.marks import Mark, strip

FLOORS = {
    "random-init": "the same encoder, untrained",
    "pixels": "no encoder: raw pixels",
    "majority": "always the commonest class",
}
HEALTH = "health"


@dataclass(frozen=True)
class Score:
    """A row of scores.json, of this release or an earlier one."""

    encoder: str
    evaluator: str
    value: float
    std: float = 0.0
    n: int = 1
    metric: str = "accuracy"
    unit: str = "%"
    interval: tuple[float, float] | None = None
    train: str = ""
    test: str = ""
    samples: int = 0
    protocol: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    marked: bool = False
    """As a floor, by its row; those of earlier releases are known by their names."""

    @property
    def name(self) -> str:
        """Of its row."""
        return self.evaluator if self.metric == "accuracy" else f"{self.evaluator} {self.metric}"

    @property
    def floor(self) -> bool:
        """Whether it is there to compare with."""
        return self.marked or self.encoder in FLOORS

    @property
    def shown(self) -> str:
        """The value alone: percentages with one decimal, other numbers with three digits and their unit."""
        return _number(self.value, self.unit) + ("" if self.unit in ("%", "") else f" {self.unit}")

    @property
    def deviation(self) -> str:
        """`± 0.3` over seeds, if there are several."""
        return f"± {_number(self.std, self.unit)}" if self.n > 1 else ""

    @property
    def spread(self) -> list[str]:
        """The 95 % interval over test samples, if there is one, and how many seeds."""
        interval = [" to ".join(_number(end, self.unit) for end in self.interval)] if self.interval else []
        return [*interval, *([f"n {self.n}"] if self.n > 1 else [])]


class Row(NamedTuple):
    """A metric of an evaluator."""

    name: str
    cells: list[Score | None]
    strip: str
    """The same on a scale, as SVG; empty for what is not a percentage."""


class Table(NamedTuple):
    """Scores of one pair of sets."""

    train: str
    test: str
    samples: int
    encoders: list[str]
    rows: list[Row]
    protocols: list[str]
    intervals: bool
    """Whether any score has one."""

    @property
    def deviations(self) -> bool:
        """Whether any score has one."""
        return any(cell and cell.deviation for row in self.rows for cell in row.cells)

    @property
    def scaled(self) -> bool:
        """Whether any row is drawn on a scale."""
        return any(row.strip for row in self.rows)


def scores_of(found: Mapping[str, Any], where: str = "scores.json") -> list[Score]:
    """The rows of a scores.json.

    Raises:
        StorageError: something in it is not what it should be.
    """
    try:
        warnings(found), list(found.get("differences") or ())
        return [_score(row) for row in found.get("scores", ())]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise StorageError(
            f"{where}: is damaged; remove it, and `selfsight eval` or the run's own command scores again"
        ) from None


def _score(row: Mapping[str, Any]) -> Score:
    interval = row.get("interval")
    low_high = None if interval is None else (float(interval[0]), float(interval[1]))
    texts = {name: str(row[name]) for name in ("metric", "unit", "train", "test", "protocol") if name in row}
    numbers = {
        "std": float(row.get("std") or 0.0),
        "n": int(row.get("n") or 1),
        "samples": int(row.get("samples") or 0),
    }
    detail = dict(row.get("detail") or {})
    return Score(
        str(row["encoder"]),
        str(row["evaluator"]),
        float(row["value"]),
        interval=low_high,
        detail=detail,
        marked=bool(row.get("floor")),
        **numbers,  # type: ignore[arg-type]
        **texts,  # type: ignore[arg-type]
    )


def tables(scores: Iterable[Score]) -> list[Table]:
    """A table for each pair of sets; what is said of health is not among them."""
    return _by_sets([score for score in scores if score.evaluator != HEALTH])


def health_tables(scores: Iterable[Score]) -> list[Table]:
    """What the features themselves say, without labels."""
    return _by_sets([score for score in scores if score.evaluator == HEALTH])


def _by_sets(scores: list[Score]) -> list[Table]:
    sets = dict.fromkeys((score.train, score.test) for score in scores)
    return [_table([score for score in scores if (score.train, score.test) == pair]) for pair in sets]


def _table(scores: list[Score]) -> Table:
    own = [score for score in scores if score.evaluator != "majority"]
    majority = next((score for score in scores if score.evaluator == "majority"), None)
    encoders = [*dict.fromkeys(score.encoder for score in own), *(["majority"] if majority else [])]
    rows = []
    for name in dict.fromkeys(score.name for score in own):
        by = {score.encoder: score for score in own if score.name == name}
        kind = next(iter(by.values()))
        if majority and kind.metric == "accuracy":
            by["majority"] = majority
        label = kind.metric if kind.evaluator == HEALTH else name
        rows.append(Row(label, [by.get(encoder) for encoder in encoders], _strip(by.values())))
    protocols = list(dict.fromkeys(score.protocol for score in own if not score.floor and score.protocol))
    first = next((score for score in own if score.samples), scores[0])
    spread = any(score.interval for score in own)
    return Table(first.train, first.test, first.samples, encoders, rows, protocols, spread)


def _strip(scores: Iterable[Score]) -> str:
    marks = []
    for score in scores:
        if score.unit != "%" or not isfinite(score.value):
            return ""
        low, high = score.interval or (score.value - score.std, score.value + score.std)
        marks.append(Mark(score.encoder, score.value, low, high, not score.floor))
    return strip(marks)


def _number(value: float, unit: str) -> str:
    return (f"{value:.1f}" if unit == "%" else f"{value:.3g}").replace("-", "−")


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What `evaluate` warned of, such as test images that are in train."""
    told = found.get("warnings") or ()
    return [str(line) for line in ([told] if isinstance(told, str) else told)]
