"""What is timed in the seconds that there are: how large a step, which switches, and what is left out."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from selfsight.bench_step import Built, changed, reset, time_steps
from selfsight.bench_switches import Situation, candidates
from selfsight.bench_timed import Timed
from selfsight.bench_trials import Trial, changes_what_is_learned, helpful, run
from selfsight.console import Bar
from selfsight.errors import UsageError
from selfsight.processes import agree, loader_workers, of_all_ranks, text_of_main
from selfsight.recipe import Recipe

STEPS = 6  # for which a timed stretch should have room
LEAST = 3  # steps, for which a switch must have time
FEWEST = {"cpu": 2, "cuda": 256}  # images to which a step that is too slow is cut
ENOUGH = {"cpu": 16, "cuda": 256}  # for which such a step may take three times as long as others
AGAIN = 3  # stretches at the end: the recipe as it is, what is faster, and what is then the fastest
LATE = (1.0, 0.5)  # of the seconds: how late the first switches may be, so that a slow machine hears of some
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


def measured_as(built: Built, recipe: Recipe, compute: float, loader: float, seconds: float) -> Recipe:
    """The recipe, with a smaller batch if some steps of its own would take too long; the same on every rank.

    Args:
        compute: seconds an image, of this rank.
        loader: images per second.
    """
    train, images = recipe.train, recipe.train.batch_size // built.world
    each = max(compute, 1 / loader) if loader_workers(recipe) else compute + 1 / loader
    room, more = (min(of_all_ranks(built.accelerator, int(n * BASE * seconds / STEPS / each))) for n in (1, 3))
    if images <= room:
        return recipe
    images //= train.accumulate
    kind = built.device.type
    least = max(FEWEST[kind], train.deterministic)
    while images > max(room, least, min(more, ENOUGH[kind])) and images % 2 == 0 and images // 2 >= least:
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
        reset(built)  # after the error: its traceback holds the graph
        micros = 2 * recipe.train.accumulate
        recipe = changed(recipe, {"train.accumulate": micros})
        notes.append(f"warning: {images:,} images at once do not fit in memory; timed with train.accumulate {micros}")
    if recipe.train.compile:
        budget.excuse(budget.clock() - begun - seconds)
    return recipe, timed


def try_all(
    built: Built, recipe: Recipe, base: Timed, now: Situation, budget: Budget, bar: Bar
) -> tuple[list[Trial], Timed]:
    """Every switch worth trying while there is time. Then the recipe as it is once more, and what is faster than both, all of
    it together or the one switch again: a gain that is seen once may be the machine's."""
    todo, trials, late = candidates(recipe, now), list[Trial](), [share * budget.seconds for share in LATE]

    def no_time(late: float = 0.0) -> bool:
        return agree(built.accelerator, [budget.left + late < LEAST * base.step_seconds])[0]

    def spell(parts: int) -> float:
        return max(budget.left / parts, LEAST * base.step_seconds)

    def tried(change: dict[str, Any], parts: int) -> Trial:
        bar(0, ", ".join(f"{name} {value}" for name, value in change.items()))
        begun, seconds = budget.clock(), spell(parts)
        trial = run(built, recipe, change, seconds)
        if recipe.train.compile or "train.compile" in change:
            budget.excuse(budget.clock() - begun - seconds)
        return trial

    for number, change in enumerate(todo):
        if no_time(late[number] if number < len(late) else 0.0):
            learns = changes_what_is_learned(built.parts, recipe, changed(recipe, change))
            trials.append(Trial(change, learns, None, "no time; --seconds gives more"))
        else:
            trials.append(tried(change, len(todo) - number + AGAIN))
        bar(50 // len(todo))
    if not any(trial.timed for trial in trials):
        return trials, base
    bar(0, "the recipe as it is, again")
    base = base.and_again(time_steps(built, recipe, spell(AGAIN)))  # late or not: without it no gain would count
    for left in reversed(range(1, AGAIN + 1)):
        best = _of_main(built, helpful(trials, base, once=True))
        seen = next((number for number, trial in enumerate(trials) if trial.change == best), None)
        if not best or (seen is not None and trials[seen].again) or (left < AGAIN and no_time()):
            break
        trial = tried(best, max(1, left - 1))
        if seen is None:
            trials.append(trial._replace(together=True, again=True))
        else:
            trials[seen] = trials[seen].and_again(trial)
    return trials, base


def _of_main(built: Built, change: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's, whose clock decides: ranks that try other things would wait for each other."""
    told: dict[str, Any] = json.loads(text_of_main(built.accelerator, json.dumps(change).encode()))
    return told
