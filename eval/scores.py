"""Rows of scores.json: outcomes with their spread, their interval over test samples, and their difference from a floor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsight import __version__
from selfsight.eval.intervals import LEAST_UNITS, Draws, draws_of, interval, units_of
from selfsight.eval.subject import Outcome

Score = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of scores.json, and what its interval comes from."""

    score: Score
    each: Tensor | None = None
    """(M,) what every test sample contributes, 0..1."""
    draws: Draws | None = None
    """Its mean over resampled test sets, in the unit of the score."""

    @property
    def key(self) -> tuple[str, str]:
        """Evaluator and metric: a column of the table."""
        return self.score["evaluator"], self.score["metric"]

    @property
    def scale(self) -> float:
        """What a sample's 1 is worth in the score's unit."""
        return 100.0 if self.score["unit"] == "%" else 1.0


def row_of(evaluator: str, name: str, outcome: Outcome) -> Row:
    """The row of an outcome."""
    protocol = f"{outcome.protocol}; selfsight {__version__}"
    told: Score = {"encoder": name, "evaluator": evaluator, "metric": outcome.metric, "unit": outcome.unit}
    told |= {**spread(outcome.values), "protocol": protocol, "chosen": dict(outcome.chosen)}
    each = None if outcome.each is None else outcome.each.detach().double().cpu()
    return Row(told | {"detail": dict(outcome.detail)}, each)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation, and of how many."""
    return {"value": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "n": len(values)}


def of_twins(parts: Sequence[Row]) -> Row:
    """One row of several initialisations: mean and deviation over them; each chose for itself."""
    first = parts[0].score
    protocol = f"mean over {len(parts)} initialisations, each as: {first['protocol']}"
    chosen = [part.score["chosen"] for part in parts]
    values = tuple(part.score["value"] for part in parts)
    known = [part.each for part in parts if part.each is not None]
    each = torch.stack(known).mean(0) if len(known) == len(parts) else None
    return Row(first | spread(values) | {"protocol": protocol, "chosen": chosen, "detail": {}, "floor": True}, each)


def with_intervals(rows: Sequence[Row], groups: Tensor, seed: int) -> list[Row]:
    """The rows of one test set with their 95 % intervals, where their value is the mean over its samples.

    Args:
        groups: (M,) of the test samples, drawn whole.
        seed: of the test set, the same wherever that set stands, so that scores of one test set are drawn alike.
    """
    known = [row for row in rows if row.each is not None and len(row.each) == len(groups) and _averages(row)]
    if not known or units_of(groups)[1] < LEAST_UNITS:
        return list(rows)
    each = torch.stack([row.each * row.scale for row in known if row.each is not None], dim=1)
    drawn = dict(zip(map(id, known), draws_of(each, groups, seed=seed).T, strict=True))
    return [
        replace(row, score=row.score | {"interval": interval(drawn[id(row)])}, draws=drawn[id(row)])
        if id(row) in drawn
        else row
        for row in rows
    ]


def _averages(row: Row) -> bool:
    """Whether a score is the mean of what it says of its samples; of another number they tell no interval."""
    assert row.each is not None
    return abs(row.each.mean().item() * row.scale - row.score["value"]) < 1e-3 * row.scale


def over_sets(by_set: Mapping[str, Sequence[Row]], name: str) -> list[Row]:
    """Rows with the mean over all sets, of the scores that every set has; the interval takes all as drawn anew."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for rows in by_set.values():
        for row in (row for row in rows if row.score["unit"] == "%"):  # the mean of two ranks means nothing
            found.setdefault((row.score["encoder"], *row.key), []).append(row)
    return [_mean(parts, name) for parts in found.values() if len(parts) == len(by_set)]


def _mean(parts: Sequence[Row], name: str) -> Row:
    scores = [part.score for part in parts]
    told: Score = {
        key: scores[0][key] for key in ("encoder", "evaluator", "metric", "unit", "floor") if key in scores[0]
    }
    names = [score["dataset"] for score in scores]
    told |= {
        "value": mean(score["value"] for score in scores),
        "std": sum(score["std"] ** 2 for score in scores) ** 0.5 / len(scores),  # of a mean of independent parts
        "n": min(score["n"] for score in scores),
        "protocol": f"mean over {', '.join(names)}, each as told there",
        "chosen": {},
        "detail": {},
        "dataset": name,
        "mean_of": names,
        "samples": sum({score["test"]: score["samples"] for score in scores}.values()),  # of one test set once
    }
    told |= {key: " + ".join(dict.fromkeys(score[key] for score in scores)) for key in ("train", "test")}
    draws = [part.draws for part in parts if part.draws is not None]
    if len(draws) < len(parts):
        return Row(told)
    average = np.mean(draws, axis=0)
    return Row(told | {"interval": interval(average)}, draws=average)


def differences(rows: Sequence[Row], floors: Mapping[str, Sequence[str]]) -> list[Score]:
    """How far every encoder is above its floors, and above the first encoder, with a paired 95 % interval.

    Args:
        rows: of all sets.
        floors: the names of each encoder's floors, random-init and pixels.
    """
    by = {(row.score["dataset"], row.score["encoder"], *row.key): row for row in rows}
    first = next(iter(floors), "")
    made = []
    for (dataset, encoder, *column), row in by.items():
        others = (*floors[encoder], first) if encoder in floors else ()
        known = (by.get((dataset, over, *column)) for over in others if over != encoder)
        made += [_difference(row, other) for other in known if other is not None]
    return made


def _difference(row: Row, other: Row) -> Score:
    told = {key: row.score[key] for key in ("encoder", "evaluator", "metric", "unit", "dataset")}
    told |= {"over": other.score["encoder"], "value": row.score["value"] - other.score["value"], "interval": None}
    if row.draws is not None and other.draws is not None:
        told["interval"] = interval(row.draws - other.draws)
    return told
