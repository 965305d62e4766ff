"""What metrics.jsonl draws: the loss and its terms beside their floors, the online scores, the course of training."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from selfsight.charts import Series, line_chart

Lines = Sequence[Mapping[str, float]]


class Curve(NamedTuple):
    """A chart that metrics.jsonl may hold."""

    title: str
    fields: tuple[str, ...]
    unit: str
    hint: str
    """What to look for."""


class Chart(NamedTuple):
    """A chart as the page shows it."""

    title: str
    svg: str
    hint: str
    last: str


_BELOW = "Below the dashed floor, the model predicts better than one that has learned nothing."
_TERMS = {
    "accuracy": "Share of right answers.",
    "teacher_entropy": "Nats; how undecided the teacher is about an image. Near 0 or near log(outputs) for long: collapse.",
    "teacher_mean_entropy": "Nats, of the mean over images: a fall to 0 means one answer to all.",
}
_SCORES: tuple[Curve, ...] = (
    Curve(
        "Online kNN", ("knn",), " %", "On a held-out tenth of the labelled training set; the test set is not touched."
    ),
    Curve("Online linear", ("linear",), " %", "On the same tenth."),
    Curve("RankMe", ("rankme",), "", "Dimensions in use. A fall towards 1 is collapse."),
    Curve(
        "alpha-ReQ", ("alpha",), "", "How fast the spectrum of the features falls; about 1 is good, large is collapse."
    ),
)
_COURSE: tuple[Curve, ...] = (
    Curve("Learning rate", ("lr",), "", "Warmup, then half a cosine."),
    Curve("Gradient norm", ("grad_norm",), "", "Spikes that come back ask for a lower rate or optim.clip."),
    Curve("Images per second", ("images_per_second",), "", "Over all ranks."),
    Curve("Memory", ("memory",), " MiB", "Peak of the main process: the GPU's, or resident memory on a CPU."),
    Curve("Waiting for data", ("data_wait",), "", "Share of the time; above 0.1 more train.workers help."),
    Curve("Slowest rank's wait", ("slowest_wait",), " s", "A step, for the data of the rank that waits longest."),
)
_NOT_DRAWN = {"step", "epoch", "slowest_rank", "device_hours", "energy_kwh", "left_out"}


def numbers(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What can be drawn of the lines; a file that somebody else wrote may hold anything."""
    kept = [
        {name: value for name, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for line in lines
    ]
    return sorted((line for line in kept if "step" in line and "loss" in line), key=lambda line: line["step"])


def curves(lines: Lines) -> list[Curve]:
    """All that there is to draw, the loss first; fields that nobody has a name for come last, under their own."""
    known = [*_own(lines), *_SCORES, *_COURSE]
    drawn = {name for curve in known for name in curve.fields} | _NOT_DRAWN
    fields = dict.fromkeys(name for line in lines for name in line)
    rest = [name for name in fields if name not in drawn and not name.startswith(("loss/", "watch/"))]
    return [*known, *(Curve(name, (name,), "", "As metrics.jsonl has it.") for name in rest)]


def charts(lines: Lines) -> list[Chart]:
    """The charts of one run."""
    made = []
    for curve in curves(lines):
        series = [Series(name.rpartition("/")[2], points(lines, name), name.endswith("floor")) for name in curve.fields]
        if drawn := line_chart(series, curve.unit, curve.title):
            last = next(s.points[-1][1] for s in series if s.points)
            made.append(Chart(curve.title, drawn, curve.hint, f"{last:.4g}{curve.unit}"))
    return made


def points(lines: Lines, name: str, x: str = "step") -> list[tuple[float, float]]:
    """A field over the steps, or over another field."""
    return [(line[x], line[name]) for line in lines if name in line and x in line]


def _own(lines: Lines) -> list[Curve]:
    """The loss and its terms, each with its floor if it has one, and the vectors that are watched for collapse."""
    fields = list(dict.fromkeys(name for line in lines for name in line))
    terms = [name for name in fields if name.startswith("loss/") and not name.endswith("floor")]
    terms = [name for name in terms if any(line[name] != line["loss"] for line in lines if name in line)]
    told = (
        _BELOW
        if "loss/floor" in fields
        else "This objective has no floor to compare with: look at kNN, and at what follows."
    )
    found = [Curve("Loss", ("loss", "loss/floor"), "", told)]
    for name in terms:
        floored = f"{name}/floor" in fields
        hint = _TERMS.get(name.rpartition("/")[2], _BELOW if floored else "A term of the loss.")
        found.append(Curve(name.removeprefix("loss/"), (name, f"{name}/floor"), "", hint))
    for name in dict.fromkeys(name.rpartition("/")[0] for name in fields if name.startswith("watch/")):
        what = name.removeprefix("watch/")
        hint = "Blue, std: 1 where vectors of different images point everywhere, 0 where all are the same. Brown: mean cosine."
        found.append(Curve(f"Spread of {what}", (f"{name}/std", f"{name}/cosine"), "", hint))
        found.append(Curve(f"RankMe of {what}", (f"{name}/rank",), "", "Dimensions in use by a batch."))
    return found
