"""What `selfsight bench` has found, as one object and for a person."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from selfsight.bench_timed import UNSTEADY, within_noise
from selfsight.bench_trials import Trial
from selfsight.console import say, table
from selfsight.doctor import duration
from selfsight.redact import redact

if TYPE_CHECKING:
    from selfsight.bench import Found

NAMES = {
    "data": "waiting for data",
    "transfer": "to the device, colour, normalise",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer, clip, checks",
    "communication": "sum of gradients over ranks",
}
MIB = 2**20


def as_object(found: "Found") -> dict[str, Any]:
    """The fields that docs/speed.md lists, for JSON."""
    base, recipe = found.base, found.recipe
    extra = sum(value or 0.0 for value in found.every.values())
    step = base.step_seconds + extra
    images = None if found.steps is None else found.steps * recipe.train.batch_size
    return {
        "recipe": redact(found.told),
        "hardware": found.hardware,
        "ranks": found.ranks,
        "threads": found.threads,
        "precision": found.precision,
        "batch_size": recipe.train.batch_size,
        "timed_batch_size": found.timed,
        "images_per_second": round(base.images_per_second, 2),
        "spread": round(base.noise, 4),
        "step_seconds": base.step_seconds,
        "share": base.share,
        "cadence": {name: None if value is None else round(value / step, 5) for name, value in found.every.items()},
        "loader": {
            "workers": found.workers,
            "images_per_second": round(found.loader, 2),
            "step_share": round(base.images_per_second / found.loader, 4),
        },
        "flops_per_image": found.flops_per_image,
        "matmul_peak": found.peak,
        "mfu": round(found.mfu, 4),
        "memory": {"peak": round((base.memory or 0) / MIB), "total": found.memory and round(found.memory / MIB)},
        "steps": found.steps,
        "epochs": None if found.epochs is None else round(found.epochs, 2),
        "images": images,
        "hours": None if found.steps is None else found.steps * step / 3600,
        "hours_per_million_images": 1e6 / recipe.train.batch_size * step / 3600,
        "bound": "data" if base.data_bound else "compute",
        "trials": [_trial(trial, found) for trial in found.trials],
        "command": redact(f"selfsight pretrain {_words(found.told, found.best)}"),
        "faster": found.best,
        "notes": found.notes,
    }


def named(change: Mapping[str, Any]) -> str:
    """A change as a person reads it."""
    return ", ".join(f"{name} {_value(value)}" for name, value in change.items())


def _words(told: str, best: Mapping[str, Any]) -> str:
    """The words that were given, `RECIPE --name value ...`, with better values in place of their own."""
    recipe, *given = shlex.split(told)
    fields = dict(zip([name.removeprefix("--") for name in given[::2]], given[1::2], strict=True))
    fields |= {name: _value(value) for name, value in best.items()}
    return shlex.join([recipe, *(word for name, value in fields.items() for word in (f"--{name}", value))])


def _trial(trial: Trial, found: "Found") -> dict[str, Any]:
    told: dict[str, Any] = {"change": trial.change, "changes_what_is_learned": trial.learns}
    if trial.timed is None:
        return told | {"why_not": trial.why_not}
    base = found.base
    return told | {
        "images_per_second": round(trial.timed.images_per_second, 2),
        "ratio": round(trial.timed.images_per_second / base.images_per_second, 3),
        "spread": round(trial.timed.noise, 4),
        "within_noise": within_noise(trial.timed, base),
        "timed_again": trial.again,
        "memory": None if trial.timed.memory is None else round(trial.timed.memory / MIB),
    }


def show(told: dict[str, Any]) -> None:
    """Print it."""
    _phases(told)
    table(["this machine", "found"], _facts(told), words=True)
    _switches(told)
    for note in told["notes"]:
        say(note)
    if told["faster"]:
        print(told["command"])
    elif not any("ratio" in trial for trial in told["trials"]):
        say("no switch was tried")
    else:
        say("nothing that was tried and learns the same is faster beyond noise")


def _phases(told: dict[str, Any]) -> None:
    step = told["step_seconds"]
    unit, many = ("ms", 1e3) if step < 10 else ("seconds", 1.0)
    shown = {name: share for name, share in told["share"].items() if share or name not in ("communication", "transfer")}
    rows = [[NAMES[name], f"{share * step * many:,.1f}", f"{100 * share:.1f}%"] for name, share in shown.items()]
    rows.append(["the step", f"{step * many:,.1f}", "100%"])
    ranks = f" x {told['ranks']} ranks" if told["ranks"] > 1 else ""
    timed = told["timed_batch_size"]
    from_fewer = f" (worked out from steps of {timed:,})" if timed != told["batch_size"] else ""
    print(
        f"{told['recipe']}: a step of {told['batch_size']:,} images{from_fewer}, {told['precision']} on {told['hardware']}{ranks}"
    )
    table(["where time goes", unit, "share"], rows)


def _facts(told: dict[str, Any]) -> list[list[str]]:
    loader, memory, timed = told["loader"], told["memory"], told["timed_batch_size"]
    within = f"within {100 * told['spread']:.0f}%" + (f" in steps of {timed:,}" if timed != told["batch_size"] else "")
    total = f" of {memory['total'] / 1024:,.1f}" if memory["total"] else ""
    gflops, peak = told["flops_per_image"] / 1e9, told["matmul_peak"] / 1e12
    length = (
        f"{told['steps']:,} steps, {told['images']:,} images" if told["steps"] else "its length depends on the data"
    )
    hours = f"{duration(3600 * told['hours'])}: " if told["hours"] else ""
    every = ", ".join(
        f"{name} {'not measured' if s is None else f'{100 * s:.1f}%'}" for name, s in told["cadence"].items()
    )
    return [
        [
            "speed",
            f"{_rate(told['images_per_second'])} images/s, {within}; {told['bound']}-bound",
        ],
        [
            "loader alone",
            f"{_rate(loader['images_per_second'])} images/s (workers: {loader['workers']}); making a batch takes {100 * loader['step_share']:.0f}% of a step's time",
        ],
        [
            "MFU",
            f"{100 * told['mfu']:.1f}%: {gflops:,.3g} GFLOP an image, {peak:,.3g} TFLOP/s a device in a large product",
        ],
        [
            "memory",
            f"a peak of {memory['peak'] / 1024:,.1f}{total} GiB, in steps of {told['timed_batch_size']:,} images",
        ],
        ["the run", f"{hours}{length}; a million images take {duration(3600 * told['hours_per_million_images'])}"],
        ["of its time", every],
    ]


def _switches(told: dict[str, Any]) -> None:
    rows = [["as it is", _rate(told["images_per_second"]), "1.00", _percent(told["spread"]), "", ""]]
    for trial in told["trials"]:
        name = named(trial["change"])
        if "why_not" in trial:
            rows.append([name, "", "", "", "", trial["why_not"]])
            continue
        words = ["unsteady"] * (trial["spread"] > UNSTEADY) + ["within noise"] * trial["within_noise"]
        words += ["changes what is learned"] * trial["changes_what_is_learned"]
        if (
            not words
            and trial["ratio"] > 1
            and not trial["timed_again"]
            and trial["change"].items() - told["faster"].items()
        ):
            words.append("timed once")
        memory = "" if trial["memory"] is None else f"{trial['memory'] / 1024:,.1f}"
        rate, spread = _rate(trial["images_per_second"]), _percent(trial["spread"])
        rows.append([name, rate, f"{trial['ratio']:.2f}", spread, memory, "; ".join(words)])
    table(["switches, one at a time", "images/s", "ratio", "noise", "GiB", ""], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rate(images: float) -> str:
    return f"{images:,.0f}" if images >= 100 else f"{images:.3g}"
