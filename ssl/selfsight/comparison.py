"""A page of several runs: the same charts with a line for each, scores side by side, and what differs in the recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selfsight import plainyaml
from selfsight.charts import Series, line_chart
from selfsight.cost import cost
from selfsight.curves import Chart, Lines, curves, numbers, points
from selfsight.errors import UsageError
from selfsight.finish import read_scores
from selfsight.metrics import flatten
from selfsight.redact import redact, redact_tree
from selfsight.report import METRICS, require_page, template
from selfsight.run_folder import damaged_lines, read_lines, write_atomically
from selfsight.score_tables import Score, scores_of, warnings

MOST_RUNS = 8  # as many as there are colours to tell apart
_SAME = {"run_dir"}  # differs between any two runs


@dataclass(frozen=True)
class Run:
    """What a run folder says; no checkpoint is needed, nor the data."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    """Its fields by dotted name, as the file has them."""
    lines: Lines
    scores: list[Score]
    notes: list[str]

    @property
    def objective(self) -> str:
        """Its objective's name."""
        return str(self.recipe.get("objective.name", "?"))

    @property
    def batch_size(self) -> int:
        """Images a step."""
        size = self.recipe.get("train.batch_size")
        return size if isinstance(size, int) else 0


class Line(NamedTuple):
    """A line of a table of runs."""

    name: str
    cells: list[Any]
    kind: str = ""
    """Of its look: head, under, last."""


class Scores(NamedTuple):
    """Scores of one pair of sets."""

    title: str
    lines: list[Line]

    @property
    def deviations(self) -> bool:
        """Whether any score has one."""
        return any(cell and cell.deviation for line in self.lines for cell in line.cells)


def compare(runs: Sequence[str | Path], out: str | Path = "compare.html") -> Path:
    """Write a page that sets runs beside each other, from what their folders hold.

    Args:
        runs: two to eight run folders; finished or not, with checkpoint or without, of any objective.

    Raises:
        UsageError: not a run folder, the same one twice, too few or too many.
        StorageError: a recipe.yaml or scores.json that cannot be read, or `out` cannot be written.
    """
    target = Path(out)
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UsageError(f"a comparison is of 2 to {MOST_RUNS} runs, not {len(runs)}")
    require_page(target)
    read = read_runs([Path(run) for run in runs])
    common, rare = what_differs(read)
    page = template("compare.html.j2").render(
        name=" · ".join(run.name for run in read),
        runs=read,
        colours=[f"--c:var(--c{i})" for i in range(len(read))],
        notes=notes(read),
        scores=side_by_side(read),
        protocols=protocols(read),
        charts=charts(read),
        differs=common,
        rare=rare,
        costs=costs(read),
    )
    write_atomically(target, redact(page))
    return target


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """What the folders hold, each under the shortest name that tells it from the others."""
    real = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, real, strict=True):
        if real.count(path) > 1:
            raise UsageError(f"{folder}: is named twice")
    return [_read(folder, name) for folder, name in zip(folders, names(real), strict=True)]


def names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        short = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(short)) == len(short):
            break
    return short


def _read(folder: Path, name: str) -> Run:
    recipe, found = folder / "recipe.yaml", {}
    if not recipe.is_file():
        raise UsageError(f"{folder}: is no run folder (it has no recipe.yaml)")
    tree = plainyaml.read(recipe)  # of any release: what its fields mean is not asked
    scores = folder / "scores.json"
    if scores.exists():
        found = read_scores(scores)
    told = [f"{name}: {line}" for line in warnings(found)]
    if damaged := damaged_lines(folder / METRICS):
        told.append(f"{name}: {damaged} damaged line{'s' * (damaged > 1)} of {METRICS} left out")
    if not found.get("scores"):
        told.append(f"{name}: was not scored" if scores.exists() else f"{name}: has no scores (yet)")
    lines = numbers(read_lines(folder / METRICS))
    if not lines:
        told.append(f"{name}: {METRICS} holds nothing to draw")
    return Run(name, folder, flatten(redact_tree(tree)), lines, scores_of(found, str(scores)), told)


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing."""
    told = [line for run in runs for line in run.notes]
    if len({run.objective for run in runs}) > 1:
        told.append("The runs have different objectives, whose losses are no common scale: each has its own chart.")
    if len({run.batch_size for run in runs}) > 1:
        told.append("The runs have different batch sizes: curves are drawn over passes of the data, not over steps.")
    for pair, group in _by_sets(runs).items():
        if len({score.samples for scores in group for score in scores}) > 1:
            told.append(f"{pair[1]}: the runs were scored on different numbers of test images; it is not the same set.")
    return told


def charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of a run's report, a line a run; floors are left to the reports."""
    several = len({run.objective for run in runs}) > 1
    x = "epoch" if len({run.batch_size for run in runs}) > 1 else "step"
    drawn: dict[tuple[str, str], tuple[str, str, list[Series]]] = {}
    for colour, run in enumerate(runs):
        for curve in curves(run.lines):
            for name in curve.fields:
                line = points(run.lines, name, x)
                if not line or name.endswith("/floor"):
                    continue
                own = f" ({run.objective})" if several and name.startswith(("loss", "watch/")) else ""
                part = f", {name.rpartition('/')[2]}" if name.startswith("watch/") and len(curve.fields) > 1 else ""
                title, hint = f"{curve.title}{part}{own}", "" if part else curve.hint
                hint = "" if name.startswith("loss") else hint  # which speaks of a floor that is not drawn
                drawn.setdefault((title, name), (curve.unit, hint, []))[2].append(Series(run.name, line, False, colour))
    over = {"epoch": "pass", "step": "step"}[x]
    # Losses first, then what most runs share.
    ordered = sorted(drawn.items(), key=lambda one: (not one[0][1].startswith("loss"), -len(one[1][2])))
    return [
        Chart(title, line_chart(series, unit, title, over), hint, "") for (title, _), (unit, hint, series) in ordered
    ]


def _by_sets(runs: Sequence[Run]) -> dict[tuple[str, str], list[list[Score]]]:
    """For each pair of sets the scores of each run on it, none where it has none."""
    pairs = dict.fromkeys((score.train, score.test) for run in runs for score in run.scores)
    return {
        pair: [[score for score in run.scores if (score.train, score.test) == pair] for run in runs] for pair in pairs
    }


def side_by_side(runs: Sequence[Run]) -> list[Scores]:
    """For each pair of sets each metric's scores of the runs, under it the floors of each."""
    return [Scores(f"{train} → {test}", _lines(group)) for (train, test), group in _by_sets(runs).items()]


def _lines(group: list[list[Score]]) -> list[Line]:
    lines = []
    own = [[score for score in scores if score.evaluator != "majority"] for scores in group]
    majority = [next((score for score in scores if score.evaluator == "majority"), None) for scores in group]
    for name in dict.fromkeys(score.name for scores in own for score in scores):
        rows = [[score for score in scores if score.name == name] for scores in own]
        heads = [next((score for score in scores if not score.floor), None) for scores in rows]
        rest = [[s for s in scores if s is not head] for scores, head in zip(rows, heads, strict=True)]
        block = [Line(name, heads, "head")]
        for encoder in dict.fromkeys(score.encoder for scores in rest for score in scores):
            block.append(
                Line(encoder, [next((s for s in them if s.encoder == encoder), None) for them in rest], "under")
            )
        if any(majority) and all(score.metric == "accuracy" for scores in rows for score in scores):
            block.append(Line("majority", list(majority), "under"))
        block[-1] = block[-1]._replace(kind=f"{block[-1].kind} last" if len(block) > 1 else "")
        lines += block
    return lines


def protocols(runs: Sequence[Run]) -> list[str]:
    """How each score was made; runs that share a protocol are named together."""
    by: dict[str, list[str]] = {}
    for run in runs:
        for score in run.scores:
            if not score.floor and score.protocol and run.name not in by.setdefault(score.protocol, []):
                by[score.protocol].append(run.name)
    return [f"{', '.join(told)}: {protocol}" for protocol, told in by.items()]


def what_differs(runs: Sequence[Run]) -> tuple[list[Line], list[Line]]:
    """The recipe's fields that are not the same in all runs: those that all have, and those that only some have."""
    fields = {name for run in runs for name in run.recipe} - _SAME
    common: list[Line] = []
    rare: list[Line] = []
    for name in sorted(fields):
        values = [_shown(run.recipe[name]) if name in run.recipe else "–" for run in runs]
        if len(set(values)) > 1:
            (common if all(name in run.recipe for run in runs) else rare).append(Line(name, values))
    return common, rare


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def costs(runs: Sequence[Run]) -> list[Line]:
    """What each run cost."""
    each = [cost(run.lines, run.batch_size) for run in runs]
    return [Line(name, [costs[name] for costs in each]) for name in each[0]]
