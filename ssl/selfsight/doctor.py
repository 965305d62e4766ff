"""`selfsight doctor RECIPE`: what will go wrong or be slow, said in half a minute and before the run.

Everything is looked at with the run's own parts: its index, a keyed sample of its images, its model, its first step.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from selfsight import keyed
from selfsight.assemble import Parts, assemble
from selfsight.console import say, table
from selfsight.data import jpeg
from selfsight.data.decode import BadSample, Form, decode
from selfsight.data.feed import affordable_workers
from selfsight.data.loader import Batches
from selfsight.data.mixture import Mixture
from selfsight.data.picture import Picture
from selfsight.data.pixel_cache import LARGEST_SIDE
from selfsight.data.placer import normalize
from selfsight.data.samples import LISTED
from selfsight.data.shards import Shards
from selfsight.errors import DataError, StorageError
from selfsight.footprint import free_memory
from selfsight.memory import SHARE, blocks_to_recompute, measure, recomputable
from selfsight.optim import set_rates
from selfsight.processes import join, loader_workers
from selfsight.recipe import Recipe, load

IMAGES, IMAGE_SECONDS = 256, 6.0
STEP_SECONDS, STEPS = 8.0, 5
FEW_STEPS = 100
OLD_INDEX = "an index is of an older release; selfsight shards index makes it anew"
DIM = 64  # a brightest value below which 8 bits show only shadows
VALUES = 1000  # of an image, which tell its statistics well enough
MICRO = 8  # images in the steps that are timed on a CPU

Level = Literal["ok", "note", "warning", "problem"]


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: Level
    topic: str
    told: str


def doctor(recipe: Recipe | str | Path, overrides: Mapping[str, Any] | None = None, as_json: bool = False) -> int:
    """Examine a recipe and print what was found; the answer is the exit code: 0, or that of the run which would fail."""
    found = examine(recipe if isinstance(recipe, Recipe) else load(recipe, overrides))
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        show(found)
    problems = [finding.topic for finding in found if finding.level == "problem"]
    return 0 if not problems else StorageError.exit_code if problems == ["disk"] else DataError.exit_code


def examine(recipe: Recipe) -> list[Finding]:
    """Look at everything; the answer is what was found, in the order of a run.

    Raises:
        UsageError, DataError: what keeps the run from starting at all.
    """
    accelerator = join(recipe)
    parts = assemble(recipe, accelerator.device)
    found = [Finding("warning", "recipe", note.removeprefix("warning: ")) for note in parts.notes]
    found += [*of_index(parts), *of_schedule(parts), *of_overlap(parts), *of_images(parts)]
    if not any(finding.level == "problem" for finding in found):  # else there is no batch to time a step with
        found += of_model(parts, accelerator)
    return [*found, *of_disk(parts)]


def of_index(parts: Parts) -> Iterator[Finding]:
    """What the index alone tells: counts, labels, exact duplicates."""
    samples, labels = parts.shards, parts.shards.labels
    sets = samples.sets
    if (frames := max(int(own.frames.max()) for own in sets)) > 1:
        taken = parts.encoder.preprocessing.frames
        told = f"clips of up to {frames} frames; a view shows {taken} of them"
        yield Finding("ok" if taken > 1 else "note", "clips", told)
    kinds = np.unique(labels[labels >= 0])
    shown = f"{len(samples):,} samples in {sum(len(own.paths) for own in sets):,} shards, data id {samples.id}"
    told = f"{len(kinds)} labels" if len(kinds) else "lists of labels" if (labels == LISTED).any() else "no labels"
    yield Finding("ok", "data", f"{shown}, {told}")
    if 1 < len(kinds) < len(samples) / 4 and (runs := 1 + int((np.diff(labels) != 0).sum())) < 4 * len(kinds):
        block = parts.recipe.data.block
        told = f"samples lie sorted by label ({runs} runs of {len(kinds)} labels)"
        if block > 1:
            yield Finding(
                "warning", "order", f"{told} and data.block {block} keeps neighbours together; shuffle the shards"
            )
        else:
            yield Finding("ok", "order", f"{told}; the order of the run is a full shuffle")
    if not all(own.fingerprinted for own in sets):
        yield Finding("note", "duplicates", f"not known: {OLD_INDEX}")
        return
    prints = np.concatenate([own.prints for own in sets])
    copies = len(prints) - len(np.unique(prints))
    level: Level = "warning" if copies > len(prints) / 100 else "note" if copies else "ok"
    yield Finding(level, "duplicates", f"{copies:,} of {len(prints):,} samples are exact copies of others")


def of_schedule(parts: Parts) -> Iterator[Finding]:
    """How long the run is, in steps and passes."""
    batch, samples, steps = parts.recipe.train.batch_size, len(parts.shards), parts.steps
    repeat = parts.recipe.data.repeat
    told = (
        f"{steps:,} steps of {batch:,} images, {samples / batch:,.1f} steps an epoch, {parts.epoch(steps):.1f} epochs"
    )
    told += (
        f", in which each sample comes {parts.epoch(steps) / repeat:.1f} times, {repeat} views at once"
        if repeat > 1
        else ""
    )
    if steps < FEW_STEPS:
        yield Finding(
            "warning", "schedule", f"{told}: too few to learn much; more epochs, or a smaller train.batch_size"
        )
    elif parts.epoch(steps) < repeat:
        yield Finding("note", "schedule", f"{told}: some images are never seen")
    else:
        yield Finding("ok", "schedule", told)


def of_overlap(parts: Parts) -> Iterator[Finding]:
    """Images of the test set that are trained on, or that probes are fitted on."""
    scored = parts.recipe.eval
    if not scored.test or scored.train is None:
        return
    tested = Shards(scored.test)
    for name, spec in (("data.train", None), ("eval.train", scored.train)):
        sets = [Shards(spec)] if spec else parts.shards.sets
        if not all(own.fingerprinted for own in (tested, *sets)):
            yield Finding("note", "overlap", f"of eval.test and {name}: not known: {OLD_INDEX}")
            continue
        test = tested.prints
        shared = int(np.isin(test, np.concatenate([own.prints for own in sets])).sum())
        level: Level = "warning" if shared else "ok"
        yield Finding(level, "overlap", f"{shared:,} of {len(test):,} images of eval.test are in {name}, too")


def of_images(parts: Parts) -> Iterator[Finding]:
    """A keyed sample of the images: readable, of one kind, not constant, large enough, normalised."""
    made, samples = parts.encoder.preprocessing, parts.shards
    ids = np.unique(keyed.hashes(0, "doctor", np.arange(IMAGES), 1)[:, 0] % np.uint64(len(samples))).astype(int)
    end, read, bad = time.monotonic() + IMAGE_SECONDS, 0, Counter[str]()
    constant, sides, values, of = 0, [], [], []
    samples.prefetch(ids)
    for sample in ids.tolist():
        if time.monotonic() > end:
            break
        read += 1
        try:
            pixels = Picture(samples.read_images(sample), made.form, made.step).window(0.5)
        except BadSample as error:
            bad[str(error).split(": ")[-1]] += 1
            continue
        constant += int(pixels.min() == pixels.max())
        sides.append(min(pixels.shape[-2:]))
        flat = pixels.reshape(len(pixels), -1)
        values.append(flat[:, :: 1 + flat.shape[1] // VALUES].astype(np.float64))
        of.append(sample)
    if bad:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in bad.most_common(3))
        level: Level = "problem" if bad.total() / read > max(parts.recipe.data.bad_share, 0.05) else "warning"
        yield Finding(level, "images", f"{bad.total()} of {read} images cannot be used: {reasons}")
    if not sides:
        return
    yield Finding(
        "ok", "images", f"{len(sides)} of {read} looked at decode to {made.channels} channels of {made.depth} bits"
    )
    if constant:
        yield Finding(
            "warning", "images", f"{constant} of {read} images are one constant value: nothing can be learned from them"
        )
    yield from _of_sizes(np.array(sides), parts)
    yield from _of_statistics(values, np.array(of), parts)


def _of_sizes(sides: NDArray[np.int64], parts: Parts) -> Iterator[Finding]:
    size, median = parts.encoder.preprocessing.image_size, int(np.median(sides))
    told = f"shorter side {sides.min()} to {sides.max()}, median {median} pixels, for views of {size}"
    if median < size:
        yield Finding("note", "sizes", f"{told}: most images are enlarged; a smaller encoder.image_size costs less")
    elif median > 3 * size and parts.encoder.preprocessing.form == Form(parts.encoder.preprocessing.channels):
        short = 2 ** round(np.log2(1.15 * size))
        yield Finding(
            "note", "sizes", f"{told}: selfsight shards build --short-side {max(short, size)} would make decoding cheap"
        )
    else:
        yield Finding("ok", "sizes", told)


def _of_statistics(values: list[NDArray[np.float64]], ids: NDArray[np.int64], parts: Parts) -> Iterator[Finding]:
    """Whether normalised pixels are about standard: far from it, learning is slow or does not start."""
    made, place = parts.encoder.preprocessing, parts.placer(torch.device("cpu"))
    columns = []
    for sample, pixels in zip(ids, values, strict=True):
        own = place.samples.set_of(np.array([sample]))[0] if place.samples else ...
        mean_of, std_of = (statistic[own].reshape(-1, 1, 1) for statistic in (place.mean, place.std))
        columns.append(normalize(torch.from_numpy(pixels)[None, :, :, None], mean_of, std_of, made.values)[0, :, :, 0])
    normal = torch.cat(columns, dim=1)
    means, stds = normal.mean(1), normal.std(1)
    told = f"normalised channels have mean {_span(means)} and deviation {_span(stds)}"
    most = max(int(pixels.max()) for pixels in values)
    if made.depth == 8 and most < DIM:
        yield Finding(
            "warning",
            "values",
            f"the brightest value of all is {most} of 255; files of 16 bits that use few of them? "
            "Try data.depth 16, or data.range for what the files hold",
        )
    dead = [c for c in range(made.channels) if stds[c] < 1e-3]
    if dead:
        yield Finding("warning", "statistics", f"channels {dead} are constant in all images looked at; {told}")
    elif means.abs().max() > 1.5 or stds.min() < 0.25 or stds.max() > 4:
        yield Finding(
            "warning", "statistics", f"{told}; give data.mean and data.std (selfsight shards check SPEC --stats)"
        )
    else:
        yield Finding("ok", "statistics", told)


def of_model(parts: Parts, accelerator: Accelerator) -> Iterator[Finding]:
    """Parameters, the memory and the time of a step, and whether the data keep up with it."""
    trained = sum(p.numel() for p in parts.objective.parameters() if p.requires_grad)
    count = sum(p.numel() for p in parts.encoder.parameters())
    yield Finding("ok", "model", f"encoder of {count / 1e6:,.1f} M parameters; {trained / 1e6:,.1f} M are trained")
    train, batches, device = parts.recipe.train, parts.batches(), accelerator.device
    images = train.batch_size // train.accumulate
    few = replace(batches, batch_size=min(images, images if device.type == "cuda" else MICRO), accumulate=1)
    yield _of_memory(parts, accelerator, images)
    yield from _of_rates(parts, batches, few.batch_size / timed_steps(parts, few, accelerator))


def _of_memory(parts: Parts, accelerator: Accelerator, images: int) -> Finding:
    """Whether a step fits, by the estimate with which a run chooses the blocks that it recomputes."""
    encoder, device, free = parts.encoder, accelerator.device, free_memory(accelerator.device)
    kept, depth = (
        measure(parts.objective, parts.average, parts.recipe.seed, accelerator.autocast),
        recomputable(encoder),
    )
    again = encoder.checkpoint_blocks
    needed = kept.needed(images, depth, again)
    told = f"about {needed / 2**30:,.1f} GiB a rank with {images:,} images at once"
    told += f" and {again} of {depth} blocks recomputed" if again else ""
    told += f", {free / 2**30:,.1f} GiB free on {device.type}"
    if needed <= SHARE * free:
        return Finding("ok", "memory", told)
    least = blocks_to_recompute(free, kept, images, depth)
    enough = least > again and kept.needed(images, depth, least) <= SHARE * free
    return Finding(
        "warning", "memory", f"{told}; raise train.accumulate{', or set train.checkpoint_blocks' if enough else ''}"
    )


def _of_rates(parts: Parts, batches: Batches, compute: float) -> Iterator[Finding]:
    workers = affordable_workers(batches.item_bytes, loader_workers(parts.recipe))
    some = replace(batches, batch_size=min(64, batches.batch_size), accumulate=1)
    one = some.batch_size / _median_seconds(lambda number: some[number], 3)
    data = one * max(1, workers)
    told = f"one rank computes {compute:,.0f} images/s; {workers} workers of {one:,.0f} images/s read {data:,.0f}"
    rate = min(compute, data) if workers else 1 / (1 / compute + 1 / one)  # without workers one waits for the other
    seconds = parts.steps * parts.recipe.train.batch_size / rate
    yield Finding(
        "ok", "time", f"the run takes about {duration(seconds)} on one rank as this one is now, without scoring"
    )
    if data < compute and workers:
        yield Finding("warning", "rates", f"{told}: training will wait for data; {faster_data(parts, batches)}")
    else:
        yield Finding("ok", "rates", told)


def faster_data(parts: Parts, batches: Batches, more_workers: bool = True) -> str:
    """What would make the data faster.

    Args:
        more_workers: whether more train.workers may.
    """
    samples, made = parts.shards, parts.encoder.preprocessing
    body, plain, small = samples.read_images(0)[0], made.form == Form(made.channels), False
    with suppress(BadSample):
        small = plain and max(decode(body, made.form).shape[1:]) <= LARGEST_SIDE
        if small and not batches.cache and not isinstance(samples, Mixture):
            return (
                f"selfsight shards cache {samples.spec} --channels {made.channels} would decode them once and for all"
            )
    if body.startswith(jpeg.START) and jpeg.library() is None:
        return "pip install 'selfsight[fast]' decodes JPEGs a third faster"
    smaller = ["shards built with --short-side"] * (plain and not small)
    return (
        ", or ".join(["more train.workers"] * more_workers + smaller) or "more cores, which workers and training share"
    )


def timed_steps(parts: Parts, batches: Batches, accelerator: Accelerator) -> float:
    """Seconds of a step. The parts are not used afterwards: their weights have moved."""
    device = accelerator.device
    place, host = parts.placer(device), batches[0]
    set_rates(parts.optimizer, 0.0, 0.0)

    def step(number: int) -> None:
        with accelerator.autocast():
            loss = parts.objective(place(host))
        loss.total.backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return _median_seconds(step, STEPS)


def of_disk(parts: Parts) -> Iterator[Finding]:
    """Room for the checkpoints."""
    train, folder = parts.recipe.train, parts.recipe.run_dir.absolute()
    sizes = sum(t.numel() * t.element_size() for tensors in parts.tensors().values() for t in tensors.values())
    kept = train.keep + 1 + (parts.steps // train.keep_every if train.keep_every else 0)
    there = next(above for above in (folder, *folder.parents) if above.exists())
    free = disk_usage(there).free
    told = f"{kept} checkpoints of {sizes / 2**20:,.0f} MiB; {free / 2**30:,.1f} GiB are free at {there}"
    yield Finding("problem" if kept * sizes > free else "ok", "disk", told)


def show(found: list[Finding]) -> None:
    """Print what was found, and the worst once more in words."""
    table(["", "looked at", "found"], [list(finding) for finding in found], words=True)
    worst = Counter(finding.level for finding in found)
    if worst["problem"] or worst["warning"]:
        say(f"{worst['problem']} problems, {worst['warning']} warnings")
    else:
        say("nothing in the way of this run")


def _median_seconds(make: Callable[[int], object], times: int) -> float:
    """Median seconds of a few calls, the first of which only warms up, within the time that is left for it."""
    end, taken = time.monotonic() + STEP_SECONDS, []
    for number in range(times + 1):
        start = time.perf_counter()
        make(number)
        taken.append(time.perf_counter() - start)
        if time.monotonic() > end:
            break
    return float(np.median(taken[1:] or taken))


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.0f} seconds"


def _span(values: Tensor) -> str:
    return f"{values.min():.2f} to {values.max():.2f}" if len(values) > 1 else f"{values[0]:.2f}"
