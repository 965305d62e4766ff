"""`selfsight bench RECIPE`: how fast this machine runs a recipe, where the time goes, and which switches would help.

Everything is timed with the run's own parts, in about a minute, and nothing of it is kept: no run folder is made, and no
checkpoint is needed. What docs/speed.md says of each field stands here in code.
"""

import json
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from selfsight.backward import Averaged
from selfsight.bench_cadence import cadence
from selfsight.bench_look import Probe, few_images, first_look, loader_rate
from selfsight.bench_search import ALONE, BASE, LOADER, PEAK, SCORING, Budget, fitting, measured_as, try_all
from selfsight.bench_step import Built, build, changed, time_steps
from selfsight.bench_switches import SWITCHES, situation
from selfsight.bench_table import as_object, named, show
from selfsight.bench_timed import UNSTEADY, Timed, with_communication
from selfsight.bench_trials import Trial, helpful, largest_micro_batch
from selfsight.console import progress
from selfsight.data.synthetic import synthetic
from selfsight.doctor import faster_data
from selfsight.errors import DataError, PeerLost
from selfsight.exports.card import hardware_of
from selfsight.footprint import total_memory
from selfsight.peers import Peers
from selfsight.precision import resolve
from selfsight.processes import join, loader_workers
from selfsight.recipe import Recipe
from selfsight.speed import matmul_peak
from selfsight.switches import require_graphs

SHARING = {"train.workers", "train.threads"}  # say who has the cores
KEEPS_UP = 0.5  # share of a step in which the loader alone makes a batch, below which it is not what is slow


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
    require_graphs(recipe, accelerator.device)  # before what they need is left out
    if recipe.train.compile and accelerator.device.type == "cpu" and not wish.compiles:
        recipe = changed(recipe, {"train.compile": False})
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
        look = look_at(recipe, accelerator, wish)
        built = build(recipe, accelerator, threads)
        host = few_images(built, look.images)
        bar(5, "the loader")
        loader = loader_rate(built, recipe, LOADER * seconds)
        own = measured_as(built, recipe, look.seconds_per_image, loader, seconds)
        bar(5, "the recipe as it is")
        own, base = fitting(built, own, BASE * seconds, budget, notes)
        if built.world > 1 and isinstance(built.backward, Averaged):
            base = with_communication(base, time_steps(built, own, ALONE * seconds, alone=True))
        bar(20, "evaluation and saving")
        rate, scoring = base.images_per_second / built.world, 0.0 if wish.synthetic else SCORING * seconds
        every = cadence(built, recipe, host, rate, scoring)
        bar(5, "switches")
        now = situation(built, recipe, own, base, wish.compiles)
        if now.gpu and built.world == 1:
            first = own.train.batch_size // own.train.accumulate
            fits = largest_micro_batch(built, host, first, lambda: budget.left > seconds / 2)
            if fits:
                notes.append(
                    f"the largest micro-batch that fits, by doubling: {fits[0]:,} images, {fits[1] / 2**30:,.1f} GiB"
                )
        trials, base = try_all(built, own, base, now, budget, bar)
    notes += advice(built, base, trials, loader, wish)
    base, trials = of_whole_steps(recipe.train.batch_size, base, trials)
    unknown = wish.synthetic and recipe.train.steps is None
    steps, epochs = built.parts.steps, built.parts.epoch(built.parts.steps)
    return Found(
        recipe, wish.told, hardware_of(device), accelerator.num_processes, recipe.train.threads or threads, now.workers, precision,
        own.train.batch_size, base, every, loader * accelerator.num_processes, look.flops_per_image, peak,
        total_memory(device), None if unknown else steps, None if wish.synthetic else epochs, trials, helpful(trials, base), notes,
    )  # fmt: skip


def look_at(recipe: Recipe, accelerator: Accelerator, wish: Wish) -> Probe:
    """The first look, which is the first to need the data."""
    try:
        return first_look(recipe, accelerator)
    except DataError as error:
        if wish.synthetic:
            raise
        raise DataError(f"{error.told}\n--synthetic times the recipe with random images instead") from error


def advice(built: Built, base: Timed, trials: list[Trial], loader: float, wish: Wish) -> list[str]:
    """What to know of the figures before one acts on them.

    Args:
        loader: images per second of this rank's loader alone.
    """
    told = []
    if base.data_bound and not wish.synthetic:
        told.append(f"training waits for data: {of_data(built, base, trials, loader)}")
    images, batch = base.images, built.parts.recipe.train.batch_size
    if images != batch:
        told.append(
            f"an extrapolation: a step of {batch:,} images takes too long here, so steps of {images:,} were timed, and the "
            "recipe's worked out from them, but for memory; batches were not tried; --seconds gives larger steps"
        )
    if base.unsteady:
        told.append(
            f"the speed varies by {100 * base.noise:.0f}% either way, so smaller gains cannot be told from noise: "
            "time it again on a quiet machine, or with more --seconds"
        )
    if unsteady := [named(trial.change) for trial in trials if trial.timed and trial.timed.unsteady]:
        told.append(
            f"unsteady: the speed of {'; '.join(unsteady)} varies by more than {100 * UNSTEADY:.0f}% while it is timed, so it "
            "counts as faster only where its slowest part beats the fastest of the recipe; --seconds makes parts longer"
        )
    return told


def of_data(built: Built, base: Timed, trials: list[Trial], loader: float) -> str:
    """What would shorten the wait for data, as far as what was timed does not contradict it."""
    gains = {name: value for name, value in helpful(trials, base).items() if SWITCHES[name].data or name in SHARING}
    if gains:
        return f"{named(gains)} shortens that"
    workers, share = loader_workers(built.parts.recipe), base.images_per_second / built.world / loader
    if workers and share < KEEPS_UP:
        tried = any(trial.timed and not SHARING.isdisjoint(trial.change) for trial in trials)
        best = "no other number of either that was tried is faster; more cores may help"
        return (
            f"workers and training share the cores, since alone the loader makes a batch in {100 * share:.0f}% of a step; "
            + (best if tried else "more --seconds compare other train.workers and train.threads")
        )
    more = [trial for trial in trials if trial.timed and trial.change.get("train.workers", 0) > workers]
    return faster_data(built.parts, built.parts.batches(), more_workers=not more)


def of_whole_steps(batch: int, base: Timed, trials: list[Trial]) -> tuple[Timed, list[Trial]]:
    """What was timed, for steps of the recipe's batch."""
    if base.images == batch:
        return base, trials
    return base.scaled(batch), [one._replace(timed=one.timed.scaled(batch)) if one.timed else one for one in trials]
