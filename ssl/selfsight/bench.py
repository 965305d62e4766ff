"""`selfsight bench RECIPE`: how fast this machine runs a recipe, where the time goes, and which switches would help.

Everything is timed with the run's own parts, in about a minute, and nothing of it is kept: no run folder is made, and no
checkpoint is needed. What docs/speed.md says of each field stands here in code.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from selfsight.assemble import Parts, assemble
from selfsight.backward import Averaged
from selfsight.bench_cadence import cadence
from selfsight.bench_step import Built, Probe, Timed, build, changed, loader_rate, probe, time_steps, with_communication
from selfsight.bench_table import as_object, show
from selfsight.bench_trials import (
    Situation,
    Trial,
    candidates,
    changes_what_is_learned,
    free,
    helpful,
    largest_micro_batch,
    run,
)
from selfsight.console import Bar, progress
from selfsight.data import jpeg
from selfsight.data.decode import BadSample
from selfsight.data.loader import HostBatch
from selfsight.data.synthetic import synthetic
from selfsight.doctor import faster_data
from selfsight.errors import PeerLost, UsageError
from selfsight.exports.card import hardware_of
from selfsight.footprint import total_memory
from selfsight.peers import Peers
from selfsight.precision import resolve
from selfsight.processes import agree, join, loader_workers, of_all_ranks
from selfsight.recipe import Recipe
from selfsight.speed import matmul_peak

DATA_BOUND = 0.1  # share of a step that waits for data, above which they are what to mend
STEPS = 6  # for which a timed stretch should have room
LEAST = 4  # steps, for which a switch must have time
FEWEST = {"cpu": 2, "cuda": 256}  # images to which a step that is too slow is cut
LOOKS = {"cpu": 8, "cuda": 64}  # images of the first look at a model
# Shares of the seconds; what is left is for the switches.
PEAK, LOADER, BASE, ALONE, SCORING = 0.02, 0.06, 0.2, 0.08, 0.06


@dataclass
class Budget:
    """The seconds that a bench may take; a stretch that has no time left is left out. Compiling is not counted.

    Args:
        clock: seconds.
    """

    seconds: float
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def excuse(self, spent: float) -> None:
        """Leave so many seconds out of the count."""
        self.seconds += max(0.0, spent)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (self.clock() - self.begun)


class Wish(NamedTuple):
    """What a user asked for beside the recipe."""

    seconds: float = 60.0
    synthetic: bool = False
    compiles: bool = False
    """On a CPU, too, where it takes a minute."""
    told: str = "RECIPE"
    """The recipe and its fields as they were given."""


PLAIN = Wish()


def bench(recipe: Recipe, wish: Wish = PLAIN, as_json: bool = False) -> int:
    """Time a recipe and print what was found; the answer is the exit code.

    Raises:
        UsageError, DataError: what keeps the run from starting.
        PeerLost: another rank died, failed or went silent.
    """
    notes = []
    if wish.synthetic:
        shard = synthetic(recipe.data, recipe.encoder)
        given: dict[str, Any] = {"data.train": str(shard), "data.mix": [], "eval.train": None, "eval.test": None}
        recipe = changed(recipe, given)
        notes.append("random images instead of the recipe's data: how fast those are read is not known; no evaluation")
    accelerator = join(recipe)
    if recipe.train.compile and accelerator.device.type == "cpu" and not wish.compiles:
        recipe = changed(recipe, {"train.compile": False, "train.cuda_graphs": False})
        notes.append("train.compile is left out, since it takes a minute on a CPU; --compile times it")
    with Peers(accelerator, recipe.train.timeout) as peers:
        try:
            found = measure(recipe, accelerator, wish, notes)
        except RuntimeError as error:  # a collective fails so when a rank is gone
            if lost := peers.who(error):
                raise PeerLost(lost) from error
            raise
    if accelerator.is_main_process:
        if as_json:
            print(json.dumps(as_object(found), indent=1))
        else:
            show(as_object(found))
    accelerator.state.destroy_process_group()
    return 0


class Found(NamedTuple):
    """What was measured; `bench_table` says it."""

    recipe: Recipe
    told: str
    hardware: str
    ranks: int
    threads: int
    workers: int
    precision: str
    timed: int
    """Images of the steps that were timed."""
    base: Timed
    every: dict[str, float | None]
    """Seconds a step of what comes every so many steps."""
    loader: float
    """Images per second of all ranks' loaders alone."""
    flops_per_image: float
    peak: float
    """Operations per second, of one rank's device."""
    memory: int | None
    """Bytes of the device."""
    steps: int | None
    """Of the run; None where the data are not there."""
    epochs: float | None
    trials: list[Trial]
    best: dict[str, Any]
    """Fields that make it faster and learn the same."""
    notes: list[str]

    @property
    def mfu(self) -> float:
        """The share of the peak that the model's own operations make up."""
        return self.base.images_per_second / self.ranks * self.flops_per_image / self.peak

    @property
    def data_bound(self) -> bool:
        """Whether data are what to mend."""
        return self.base.share["data"] > DATA_BOUND


def measure(recipe: Recipe, accelerator: Accelerator, wish: Wish, notes: list[str]) -> Found:
    """Everything that is told.

    Args:
        notes: what the user should know; more are added.
    """
    budget, device, seconds = Budget(wish.seconds), accelerator.device, wish.seconds
    precision, threads = resolve(recipe.train.precision, device), torch.get_num_threads()
    with progress("timing", 100, quiet=not accelerator.is_main_process) as bar:
        bar(0, "the machine")
        peak = matmul_peak(device, torch.bfloat16 if precision in ("bf16", "fp8") else torch.float32, PEAK * seconds)
        bar(5, "the model")
        look = first_look(recipe, accelerator)
        built = build(recipe, accelerator, threads)
        host = few_images(built)
        bar(5, "the loader")
        loader = loader_rate(built, recipe, LOADER * seconds)
        own = measured_as(built, recipe, look.seconds_per_image, loader, seconds)
        bar(5, "the recipe as it is")
        own, base = fitting(built, own, BASE * seconds, budget, notes)
        if built.world > 1 and isinstance(built.backward, Averaged):
            base = with_communication(base, time_steps(built, own, ALONE * seconds, alone=True))
        bar(20, "evaluation and saving")
        every = cadence(
            built, recipe, host, base.images_per_second / built.world, 0.0 if wish.synthetic else SCORING * seconds
        )
        bar(5, "switches")
        now = situation(built, recipe, own, base, wish.compiles)
        if now.data_bound and not wish.synthetic:
            notes.append(f"training waits for data: {faster_data(built.parts, built.parts.batches())}")
        steps, epochs = built.parts.steps, built.parts.epoch(built.parts.steps)
        if now.gpu and built.world == 1:
            first = own.train.batch_size // own.train.accumulate
            fits = largest_micro_batch(built, host, first, lambda: budget.left > seconds / 2)
            notes += (
                [f"the largest micro-batch that fits, by doubling: {fits[0]:,} images, {fits[1] / 2**30:,.1f} GiB"]
                if fits
                else []
            )
        trials, base = try_all(built, own, base, now, budget, bar)
    batch, images = recipe.train.batch_size, own.train.batch_size
    if images != batch:
        notes.append(
            f"a step of {batch:,} images takes too long here: steps of {images:,} were timed, and the recipe's worked out from "
            "them, but for memory; batches were not tried"
        )
        base = base.scaled(batch)
        trials = [one._replace(timed=one.timed.scaled(batch)) if one.timed else one for one in trials]
    unknown = wish.synthetic and recipe.train.steps is None
    return Found(
        recipe, wish.told, hardware_of(device), accelerator.num_processes, recipe.train.threads or threads, now.workers, precision,
        images, base, every, loader * accelerator.num_processes, look.flops_per_image, peak,
        total_memory(device), None if unknown else steps, None if wish.synthetic else epochs, trials, helpful(trials, base), notes,
    )  # fmt: skip


def first_look(recipe: Recipe, accelerator: Accelerator) -> Probe:
    """Two passes of a model of its own, before DDP knows one."""
    parts = assemble(recipe, accelerator.device, world=accelerator.num_processes)
    batches = parts.batches(accelerator.process_index, accelerator.num_processes)
    images = min(LOOKS[accelerator.device.type], recipe.train.batch_size // recipe.train.accumulate // batches.world)
    while True:
        try:
            return probe(parts, accelerator, replace(batches, batch_size=images * batches.world, accumulate=1)[0])
        except torch.OutOfMemoryError:
            if images < 4 or batches.world > 1:
                raise UsageError("train.device: the model does not fit in the GPU's memory with two images") from None
            images //= 2
            parts.optimizer.zero_grad()
        free()


def few_images(built: Built) -> HostBatch:
    """A small batch of the recipe's data."""
    batches, train = built.parts.batches(built.accelerator.process_index, built.world), built.parts.recipe.train
    images = min(LOOKS[built.device.type], train.batch_size // train.accumulate // built.world)
    return replace(batches, batch_size=images * built.world, accumulate=1)[0]


def measured_as(built: Built, recipe: Recipe, compute: float, loader: float, seconds: float) -> Recipe:
    """The recipe, with a smaller batch if some steps of its own would take too long; the same on every rank.

    Args:
        compute: seconds an image, of this rank.
        loader: images per second.
    """
    train, images = recipe.train, recipe.train.batch_size // built.world
    each = max(compute, 1 / loader) if loader_workers(recipe) else compute + 1 / loader
    room = min(of_all_ranks(built.accelerator, int(BASE * seconds / STEPS / each)))
    if images <= room:
        return recipe
    images //= train.accumulate
    least = max(FEWEST[built.device.type], train.deterministic)
    while images > max(room, least) and images % 2 == 0 and images // 2 >= least:
        images //= 2
    try:
        return changed(recipe, {"train.batch_size": images * built.world, "train.accumulate": 1})
    except UsageError:  # parts of a deterministic step
        return recipe


def fitting(built: Built, recipe: Recipe, seconds: float, budget: Budget, notes: list[str]) -> tuple[Recipe, Timed]:
    """Steps of the recipe, with more micro-batches if its own do not fit on the GPU."""
    begun = budget.clock()
    while True:
        try:
            timed = time_steps(built, recipe, seconds)
            break
        except torch.OutOfMemoryError:
            images = recipe.train.batch_size // recipe.train.accumulate // built.world
            if built.world > 1 or images % 2:  # the other ranks would wait for this one
                raise UsageError(
                    f"train.batch_size: {images:,} images at once do not fit in the GPU's memory; raise train.accumulate, "
                    "or set train.checkpoint_blocks"
                ) from None
            micros = 2 * recipe.train.accumulate
            recipe = changed(recipe, {"train.accumulate": micros})
            notes.append(
                f"warning: {images:,} images at once do not fit in memory; timed with train.accumulate {micros}"
            )
            free()
    if recipe.train.compile:
        budget.excuse(budget.clock() - begun - seconds)
    return recipe, timed


def situation(built: Built, recipe: Recipe, own: Recipe, base: Timed, compiles: bool) -> Situation:
    """What decides which switches are tried; the same on every rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    gpu = built.device.type == "cuda"
    bound, jpegs = agree(built.accelerator, [base.share["data"] > DATA_BOUND, has_jpegs(built.parts)])
    return Situation(
        gpu=gpu,
        cores=min(of_all_ranks(built.accelerator, ours)),
        threads=recipe.train.threads or built.threads,
        workers=loader_workers(recipe),
        precision=resolve(recipe.train.precision, built.device),
        data_bound=bound,
        whole=own.train.batch_size == recipe.train.batch_size,
        jpegs=jpegs,
        compiles=gpu or compiles,
    )


def has_jpegs(parts: Parts) -> bool:
    """Whether the first sample is one."""
    try:
        return parts.shards.read_images(0)[0].startswith(jpeg.START)
    except BadSample:
        return False


def try_all(
    built: Built, recipe: Recipe, base: Timed, now: Situation, budget: Budget, bar: Bar
) -> tuple[list[Trial], Timed]:
    """Every switch worth trying while there is time, what helps together, and the recipe as it is once more: how far the
    machine has drifted meanwhile is noise, too."""
    todo, trials = candidates(recipe, now), list[Trial]()

    def no_time() -> bool:
        return agree(built.accelerator, [budget.left < LEAST * base.step_seconds])[0]

    def tried(change: dict[str, Any], others: int) -> Trial:
        bar(0, ", ".join(f"{name} {value}" for name, value in change.items()))
        begun, seconds = budget.clock(), max(budget.left / (others + 2), LEAST * base.step_seconds)
        trial = run(built, recipe, change, seconds)
        if recipe.train.compile or "train.compile" in change:
            budget.excuse(budget.clock() - begun - seconds)
        return trial

    for number, change in enumerate(todo):
        if no_time():
            learns = changes_what_is_learned(built.parts, recipe, changed(recipe, change))
            trials.append(Trial(change, learns, None, "no time; --seconds gives more"))
        else:
            trials.append(tried(change, len(todo) - number))
        bar(50 // len(todo))
    best = helpful(trials, base)
    if agree(built.accelerator, [len(best) > 1])[0] and not no_time():
        trials.append(tried(best, 0))
    if trials and not no_time():
        base = base._replace(rates=base.rates + time_steps(built, recipe, max(budget.left, 0.0)).rates)
    return trials, base
