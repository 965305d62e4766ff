"""Scores as tables: which columns there are, what stands in a cell, and Markdown that can be pasted into a README."""

from collections.abc import Mapping, Sequence
from typing import Any

Score = Mapping[str, Any]
Column = tuple[str, str]  # evaluator, metric
WIDE = 6  # scores that stand side by side


def columns_of(scores: Sequence[Score]) -> dict[Column, str]:
    """Every column with its head: the evaluator's name alone where that says which number it is."""
    found: dict[str, dict[str, str]] = {}
    for score in scores:
        if score["evaluator"] != "majority":
            found.setdefault(score["evaluator"], {})[metric_of(score)] = score.get("unit", "%")
    return {
        (evaluator, metric): (evaluator if len(metrics) == 1 or metric == "accuracy" else f"{evaluator} {metric}")
        for evaluator, metrics in found.items()
        for metric in metrics
    }


def metric_of(score: Score) -> str:
    """Which number of the evaluator's a score is; scores of older releases are all accuracies."""
    return score.get("metric", "accuracy")


def datasets_of(scores: Sequence[Score]) -> list[str]:
    """Sets that were scored, in order; of older releases the one."""
    return list(dict.fromkeys(score.get("dataset", score.get("test", "")) for score in scores))


def rows_of(scores: Sequence[Score], columns: Mapping[Column, str]) -> list[list[str]]:
    """Encoders down, evaluators across. Of older releases the majority class has one row for all."""
    rows = []
    for encoder in dict.fromkeys(score["encoder"] for score in scores):
        own = {(score["evaluator"], metric_of(score)): score for score in scores if score["encoder"] == encoder}
        cells = [own.get(column) or own.get(("majority", column[1])) for column in columns]
        rows.append([encoder, *map(format_score, cells)])
    return [[name, *cells] for name, (_, *cells) in zip(short([row[0] for row in rows]), rows, strict=True)]


def short(names: Sequence[str]) -> list[str]:
    """Names of encoders without the folders that all of those have which are in one: checkpoints of a run by their step."""
    paths = [name.split("/") for name in names if "/" in name]
    common = 0
    while (
        len(paths) > 1 and all(len(path) > common + 1 for path in paths) and len({path[common] for path in paths}) == 1
    ):
        common += 1
    return ["/".join(name.split("/")[common:]) if "/" in name else name for name in names]


def grid(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table; scores down and encoders across where so many scores would not stand side by side."""
    columns = columns_of(scores)
    head, rows = ["encoder", *columns.values()], rows_of(scores, columns)
    if len(columns) <= WIDE or len(rows) > len(columns):
        return head, rows
    across = [list(cells) for cells in zip(*rows, strict=True)]
    return ["score", *across[0]], [[name, *cells] for name, cells in zip(head[1:], across[1:], strict=True)]


def format_score(score: Score | None) -> str:
    """`94.2 ± 0.3`, or `-` for none; numbers that are no percentages with three digits."""
    if score is None:
        return "-"
    shown = "{:.1f}" if score.get("unit", "%") == "%" else "{:.3g}"
    value, std = shown.format(score["value"]), shown.format(score["std"])
    return value + (f" ± {std}" if score["n"] > 1 else "")


def difference_lines(found: Mapping[str, Any]) -> list[str]:
    """Whether pretraining helped, a line for each score: `knn: +63.8 points over random-init (95 %: 60.1 to 67.0)`.

    Of percentages, where more is better: of the rest the table is enough. What does not look like a difference is left out.
    """
    told = [difference for difference in found.get("differences") or () if _is_difference(difference)]
    encoders, datasets = ({difference.get(key) for difference in told} for key in ("encoder", "dataset"))
    lines = []
    for difference in told:
        name = difference["evaluator"] + ("" if difference["metric"] == "accuracy" else f" {difference['metric']}")
        where = [difference["encoder"]] if len(encoders) > 1 else []
        where += [difference["dataset"]] if len(datasets) > 1 else []
        lines.append(f"{', '.join([*where, name])}: {_difference(difference)}")
    return lines


def _is_difference(given: Any) -> bool:
    if not isinstance(given, Mapping) or given.get("unit") != "%" or not isinstance(given.get("value"), int | float):
        return False
    interval = given.get("interval")
    ends = (
        isinstance(interval, Sequence) and len(interval) == 2 and all(isinstance(end, int | float) for end in interval)
    )
    return (interval is None or ends) and {"encoder", "over", "evaluator", "metric", "dataset"} <= set(given)


def _difference(difference: Mapping[str, Any]) -> str:
    interval = difference.get("interval")
    sure = f" (95 %: {interval[0]:.1f} to {interval[1]:.1f})" if interval else ""
    return f"{difference['value']:+.1f} points over {difference['over']}{sure}"


def markdown(found: Mapping[str, Any]) -> str:
    """All of it: a table for each set, the differences, warnings, and the protocol lines."""
    scores = found["scores"]
    lines: list[str] = []
    for dataset in datasets_of(scores):
        own = [score for score in scores if score.get("dataset", score.get("test", "")) == dataset]
        head, rows = grid(own)
        lines += [f"**{_plain(dataset)}** (test, {own[0]['samples']:,} samples; % unless told)", ""]
        lines += [_line(head), "|---|" + "---:|" * (len(head) - 1), *map(_line, rows), ""]
    told = difference_lines(found)
    told += [f"**warning:** {warning}" for warning in found.get("warnings", ())]
    told += [_plain(line) for line in protocols(scores)]
    return "\n".join([*lines, *(f"- {line}" for line in told)]) + "\n"


def protocols(scores: Sequence[Score]) -> list[str]:
    """The line to cite of every score that is no floor, each once, with whose it is where others have another."""
    own = [score for score in scores if not score.get("floor") and score.get("protocol") and not score.get("mean_of")]
    whose: dict[str, dict[str, None]] = {}
    for score in own:
        whose.setdefault(score["protocol"], {})[f"{score['encoder']}, {score.get('dataset', '')}"] = None
    everybody = {name for names in whose.values() for name in names}
    return [line if len(names) == len(everybody) else f"{'; '.join(names)}: {line}" for line, names in whose.items()]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, cells))} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|")
