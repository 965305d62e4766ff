"""Which switches would help: each is tried alone, in the same loop, and set against the recipe as it is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from selfsight.assemble import Parts
from selfsight.bench_step import Built, build, changed, free, reset, time_steps
from selfsight.bench_switches import rebuilt_for
from selfsight.bench_timed import Timed, within_noise
from selfsight.data.loader import HostBatch
from selfsight.errors import DataError, UsageError
from selfsight.footprint import forget_peak, peak_memory
from selfsight.precision import resolve, set_products
from selfsight.processes import join
from selfsight.recipe import Recipe
from selfsight.run_folder import differences

MOST = 16_384  # images of a micro-batch; no GPU has room for more


class Trial(NamedTuple):
    """One switch that was tried, or why it was not."""

    change: dict[str, Any]
    learns: bool
    """Whether it changes what is learned, as a checkpoint would say: a resumed run must not differ in it."""
    timed: Timed | None = None
    why_not: str = ""
    together: bool = False
    """Whether several switches were tried at once."""
    again: bool = False
    """Whether its gains were seen a second time, at the end."""

    def and_again(self, later: "Trial") -> "Trial":
        """With the same change timed once more."""
        if self.timed is None or later.timed is None:
            return later._replace(again=True)
        return self._replace(timed=self.timed.and_again(later.timed), again=True)


def run(built: Built, recipe: Recipe, change: Mapping[str, Any], seconds: float) -> Trial:
    """Time a recipe with this change, or say why it cannot be.

    Raises:
        UsageError: on several ranks one that has run out of memory cannot go on, since the others wait for it.
    """
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
        if built.world > 1:
            names = ", ".join(change)
            raise UsageError(
                f"{names}: does not fit in this GPU's memory beside the recipe's own model, and the other ranks wait for it; "
                "time the recipe with a smaller train.batch_size, or on one GPU"
            ) from None
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
    reset(built)  # after the error: its traceback holds the graph
    return Trial(dict(change), learns, None, "does not fit in memory")


def changes_what_is_learned(parts: Parts, recipe: Recipe, other: Recipe) -> bool:
    """Whether a run of one recipe could not go on as the other."""
    one, another = (replace(parts, recipe=each).fingerprint() for each in (recipe, other))
    return bool(differences(one, another))


def helpful(trials: list[Trial], base: Timed, *, once: bool = False) -> dict[str, Any]:
    """What is faster beyond noise and changes nothing that is learned: the best value of each switch, unless they were
    tried together, too, and one alone was faster.

    Args:
        once: also what was timed once; without it only while nothing was timed again.
    """
    once = once or not any(trial.again for trial in trials)
    faster = [
        trial
        for trial in trials
        if trial.timed
        and (once or trial.again)
        and not trial.learns
        and trial.timed.images_per_second > base.images_per_second
        and not within_noise(trial.timed, base)
    ]
    faster.sort(key=lambda trial: trial.timed.images_per_second if trial.timed else 0.0)
    if any(trial.together for trial in trials):
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
            reset(built)
    return found


def repeated(host: HostBatch, count: int) -> HostBatch:
    """A batch of so many images, at positions of their own, that shows these again and again."""
    rows = torch.arange(count) % len(host.ids)
    return HostBatch(tuple(view[rows] for view in host.views), torch.arange(count), host.keys[rows], host.ids[rows], [])
