"""What a person sees while a command works: lines, a progress bar on a terminal, tables."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from selfsight.eval.tables import datasets_of, difference_lines, grid, metric_of, protocols
from selfsight.eval.tables import format_score as format_score
from selfsight.redact import redact

MOST_DIFFERENCES = 16  # lines of whether pretraining helped
_OUT = Console(stderr=True, soft_wrap=True, highlight=False)


def say(line: str) -> None:
    """One line to the person, on standard error: standard output belongs to answers."""
    _OUT.print(redact(line), markup=False)


class Bar(Protocol):
    """Moves a progress bar."""

    def __call__(self, advance: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(task: str, total: int, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """A progress bar on a terminal; silence elsewhere (a cluster's log is no terminal)."""
    if quiet or not sys.stderr.isatty():
        yield lambda advance=1, note="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_OUT, transient=True) as shown:
        bar = shown.add_task(task, total=total, completed=done, note="")
        yield lambda advance=1, note="": shown.update(bar, advance=advance, **({"note": note} if note else {}))


def table(columns: list[str], rows: list[list[Any]], title: str | None = None, words: bool = False) -> None:
    """A table on standard output; the first column is text, the others are numbers, unless all are words."""
    # As Text: the name of a file in brackets is no markup.
    made = Table(title=Text(redact(title), "italic") if title else None, title_justify="left")
    for i, name in enumerate(columns):
        made.add_column(name, justify="right" if i and not words else "left")
    for row in rows:
        made.add_row(*(Text(redact(str(cell))) for cell in row))
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(made)


def score_table(scores: list[dict[str, Any]], title: str) -> None:
    """Encoders down, evaluators across (or the other way round, where these are many), with the standard deviation."""
    head, rows = grid(scores)
    table(head, rows, title)


def _unit(scores: list[dict[str, Any]]) -> str:
    """What the title says of the numbers, if one thing can be said of all."""
    if any(score.get("unit", "%") != "%" for score in scores):
        return ""
    return ", % correct" if {metric_of(score) for score in scores} == {"accuracy"} else ", %"


def show_scores(found: Mapping[str, Any]) -> None:
    """A table of every set; then, for who looks, whether pretraining helped, warnings, and the lines to cite."""
    scores = found["scores"]
    measured = [
        score for score in scores if score.get("unit", "%") == "%"
    ] or scores  # of the others the table is enough
    for dataset in datasets_of(scores):
        own = [score for score in scores if score.get("dataset", score["test"]) == dataset]
        score_table(own, dataset + _unit(own))
    told = difference_lines(found)
    more = [f"... and {len(told) - MOST_DIFFERENCES} more differences (--markdown, --json)"] * (
        len(told) > MOST_DIFFERENCES
    )
    for line in [*told[:MOST_DIFFERENCES], *more, *protocols(measured)]:
        say(line)
    for warning in found.get("warnings", ()):
        say(f"warning: {warning}")
