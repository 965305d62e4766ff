"""Which switches would help: each is tried alone, in the same loop, and set against the recipe as it is."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from selfsight.assemble import Parts
from selfsight.bench_step import Built, Timed, build, changed, time_steps
from selfsight.data import jpeg
from selfsight.data.device_jpeg import require_decoder
from selfsight.data.loader import HostBatch
from selfsight.errors import DataError, UsageError
from selfsight.footprint import forget_peak, peak_memory
from selfsight.precision import resolve, set_products
from selfsight.processes import join
from selfsight.recipe import Recipe
from selfsight.run_folder import differences

LEAST_NOISE = 0.03  # below it nobody should change a recipe
MOST = 16_384  # images of a micro-batch; no GPU has room for more
SMALL_MICRO = 16  # images on a CPU, below which smaller micro-batches are not worth a trial


class Situation(NamedTuple):
    """What decides which switches are worth trying."""

    gpu: bool
    cores: int
    """Of this rank."""
    threads: int
    workers: int
    precision: str
    """As it is resolved on the device."""
    data_bound: bool
    whole: bool
    """Whether steps are timed with the recipe's own batch."""
    jpegs: bool
    compiles: bool
    """Whether compiling is worth its minute."""


class Switch(NamedTuple):
    """A field of the recipe that may make it faster."""

    values: Callable[[Recipe, Situation], list[Any]]
    """What else to try."""
    rebuilt: bool = False
    """Whether it takes a new model."""
    data: bool = False
    """Whether it is for those who wait for data."""


def _workers(recipe: Recipe, now: Situation) -> list[Any]:
    if now.gpu:  # more of them, where they are what is waited for
        return sorted({min(2 * max(1, now.workers), now.cores), now.cores} - {now.workers}) if now.data_bound else []
    return sorted({number for number in (0, 1, 2, 4, now.cores) if number <= now.cores} - {now.workers})


def _threads(recipe: Recipe, now: Situation) -> list[Any]:
    return [] if now.gpu or recipe.train.deterministic else sorted({1, now.cores} - {now.threads})


def _precision(recipe: Recipe, now: Situation) -> list[Any]:
    of_gpu = {"fp32": ["tf32", "bf16"], "tf32": ["bf16"], "bf16": ["fp8"], "fp8": ["bf16"]}
    return of_gpu[now.precision] if now.gpu else ["fp32" if now.precision == "bf16" else "bf16"]


def _cuda_graphs(recipe: Recipe, now: Situation) -> list[Any]:
    train = recipe.train
    return [not train.cuda_graphs] if now.gpu and train.compile and train.accumulate == 1 else []


def _compile(recipe: Recipe, now: Situation) -> list[Any]:
    return [not recipe.train.compile] if now.compiles and not recipe.train.deterministic else []


def _checkpoint_blocks(recipe: Recipe, now: Situation) -> list[Any]:
    return ["auto"] if recipe.train.checkpoint_blocks is True else []  # which leaves out what memory has room for


def _accumulate(recipe: Recipe, now: Situation) -> list[Any]:
    micros, images = recipe.train.accumulate, recipe.train.batch_size // recipe.train.accumulate
    fewer = [micros // 2] if micros % 2 == 0 else []
    more = [2 * micros] if not now.gpu and images >= 2 * SMALL_MICRO and images % 2 == 0 else []
    return [*fewer, *more] if now.whole else []


def _batch_size(recipe: Recipe, now: Situation) -> list[Any]:
    return [2 * recipe.train.batch_size] if now.whole else []


def _fast_decode(recipe: Recipe, now: Situation) -> list[Any]:
    usable = now.jpegs and jpeg.library() is not None and recipe.data.decode == "workers" and recipe.data.repeat == 1
    return [True] if usable and not recipe.data.fast_decode else []


def _decode(recipe: Recipe, now: Situation) -> list[Any]:
    if not (
        now.gpu and now.jpegs and now.data_bound and recipe.data.decode == "workers" and not recipe.data.fast_decode
    ):
        return []
    try:
        require_decoder()
    except UsageError:  # not installed
        return []
    return ["device"]


def _repeat(recipe: Recipe, now: Situation) -> list[Any]:
    return [2] if now.data_bound and recipe.data.repeat == 1 else []


# Tried in this order, those for data first or last.
SWITCHES: dict[str, Switch] = {
    "train.compile": Switch(_compile, rebuilt=True),
    "train.threads": Switch(_threads),
    "train.precision": Switch(_precision, rebuilt=True),
    "train.accumulate": Switch(_accumulate),
    "train.batch_size": Switch(_batch_size),
    "train.cuda_graphs": Switch(_cuda_graphs, rebuilt=True),
    "train.checkpoint_blocks": Switch(_checkpoint_blocks, rebuilt=True),
    "train.workers": Switch(_workers, data=True),
    "data.fast_decode": Switch(_fast_decode, data=True),
    "data.decode": Switch(_decode, data=True),
    "data.repeat": Switch(_repeat, data=True),
}


class Trial(NamedTuple):
    """One switch that was tried, or why it was not."""

    change: dict[str, Any]
    learns: bool
    """Whether it changes what is learned, as a checkpoint would say: a resumed run must not differ in it."""
    timed: Timed | None = None
    why_not: str = ""


def candidates(recipe: Recipe, now: Situation) -> list[dict[str, Any]]:
    """Changes worth trying, the most promising ones first."""
    order = sorted(SWITCHES.items(), key=lambda item: item[1].data != now.data_bound)
    return [{name: value} for name, one in order for value in one.values(recipe, now)]


def rebuilt_for(change: Mapping[str, Any]) -> bool:
    """Whether a change takes a new model."""
    return any(SWITCHES[name].rebuilt for name in change)


def run(built: Built, recipe: Recipe, change: Mapping[str, Any], seconds: float) -> Trial:
    """Time a recipe with this change, or say why it cannot be."""
    made, learns = None, True
    rebuilt = rebuilt_for(change)
    try:
        other = changed(recipe, change)
        learns = changes_what_is_learned(built.parts, recipe, other)
        if other.train.batch_size > len(built.parts.shards):
            return Trial(dict(change), learns, None, "more images than there are")
        if "train.precision" in change and built.world > 1:
            return Trial(dict(change), learns, None, "on one rank only")
        if not rebuilt:
            return Trial(dict(change), learns, time_steps(built, other, seconds))
        accelerator = join(other) if built.world == 1 else built.accelerator
        before = torch.cuda.memory_allocated(built.device) if built.device.type == "cuda" else None
        made = build(other, accelerator, built.threads)
        timed = time_steps(made, other, seconds)
        # The recipe's own model lies beside it: known of a GPU, not of a process.
        alone = None if before is None or timed.memory is None else timed.memory - before
        return Trial(dict(change), learns, timed._replace(memory=alone))
    except (UsageError, DataError) as error:
        return Trial(dict(change), learns, None, error.told.splitlines()[0])
    except torch.OutOfMemoryError:
        return Trial(dict(change), learns, None, "does not fit in memory")
    except RuntimeError as error:  # torch's: no compiler here, for example
        if built.world > 1:  # or another rank's end
            raise
        return Trial(dict(change), learns, None, str(error).strip().splitlines()[0][:80])
    finally:
        del made
        if rebuilt:
            free()
            if built.device.type == "cuda":  # TF32 is a switch of the process
                set_products(resolve(recipe.train.precision, built.device))


def free() -> None:
    """Give back what a model has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def changes_what_is_learned(parts: Parts, recipe: Recipe, other: Recipe) -> bool:
    """Whether a run of one recipe could not go on as the other."""
    one, another = (replace(parts, recipe=each).fingerprint() for each in (recipe, other))
    return bool(differences(one, another))


def within_noise(trial: Timed, base: Timed) -> bool:
    """Whether two rates differ by no more than either of them does from one part of its time to the next."""
    noise = max(LEAST_NOISE, base.noise, trial.noise)
    return abs(trial.images_per_second / base.images_per_second - 1) <= noise


def helpful(trials: list[Trial], base: Timed) -> dict[str, Any]:
    """What is faster beyond noise and changes nothing that is learned: the best value of each switch, unless they were
    tried together, too, and one alone was faster."""
    faster = [
        trial
        for trial in trials
        if trial.timed
        and not trial.learns
        and trial.timed.images_per_second > base.images_per_second
        and not within_noise(trial.timed, base)
    ]
    faster.sort(key=lambda trial: trial.timed.images_per_second if trial.timed else 0.0)
    if any(trial.timed and len(trial.change) > 1 for trial in trials):
        return faster[-1].change if faster else {}
    return {name: value for trial in faster for name, value in trial.change.items()}  # the faster value wins


def micro_batches(first: int, most: int) -> Iterator[int]:
    """Twice as many images each time, from `first`, up to `most`."""
    while first <= most:
        yield first
        first *= 2


def largest_micro_batch(built: Built, host: HostBatch, first: int, left: Callable[[], bool]) -> tuple[int, int] | None:
    """Images of the largest micro-batch that fits on the GPU, doubling from `first`, and the bytes that it took.

    Only for one rank: others would wait for the one that ran out. None where not even the first one fits.

    Args:
        host: any images; they are shown again and again.
        left: whether there is time for another one.
    """
    found, place = None, built.parts.placer(built.device)
    for count in micro_batches(first, MOST):
        if found and not left():
            break
        forget_peak(built.device)
        try:
            with torch.compiler.set_stance("force_eager"):  # each size would compile for a minute
                built.backward([repeated(host, count)], place)
            found = count, peak_memory(built.device)
        except torch.OutOfMemoryError:
            break
        finally:
            built.parts.optimizer.zero_grad()
            built.parts.objective.forget_step()
            free()
    return found


def repeated(host: HostBatch, count: int) -> HostBatch:
    """A batch of so many images, at positions of their own, that shows these again and again."""
    rows = torch.arange(count) % len(host.ids)
    return HostBatch(tuple(view[rows] for view in host.views), torch.arange(count), host.keys[rows], host.ids[rows], [])
