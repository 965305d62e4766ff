"""The steps of a run, timed: its own loader, device, objective, gradients and update, and none of its files."""

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from selfsight.assemble import Parts, assemble
from selfsight.backward import Averaged, Canonical, Sharded
from selfsight.bench_timed import PHASES, Timed
from selfsight.data.feed import AHEAD, affordable_workers, feed
from selfsight.data.loader import HostBatch
from selfsight.data.placer import Batch, sent
from selfsight.finite import BadSteps, Step, gradient_norm
from selfsight.footprint import forget_peak, peak_memory
from selfsight.objectives.base import Loss
from selfsight.processes import loader_workers
from selfsight.recipe import Recipe, merge, validate
from selfsight.timeline import Timeline
from selfsight.train import update
from selfsight.verdict import Verdicts, may_be_late

WARM, FEWEST = 2, 2  # steps that are not counted, and those that must be
SLOW = 6  # in a stretch that has no room for so many steps, one of them has to be enough to warm up
CHUNKS = 5  # of the counted steps, whose rates tell the noise
FOREVER = 2**40  # batches; a run is a function of their numbers, so there is no last one


@dataclass
class Built:
    """A model that can be stepped."""

    parts: Parts
    accelerator: Accelerator
    backward: Averaged | Sharded | Canonical
    trained: list[nn.Parameter]
    threads: int
    """CPU threads of torch as the machine gives them."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.accelerator.device

    @property
    def world(self) -> int:
        """Ranks."""
        return self.accelerator.num_processes


def changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of these dotted fields.

    Raises:
        UsageError: they do not go together.
    """
    tree = recipe.model_dump(mode="json")
    for name, value in change.items():
        *sections, last = name.split(".")
        nested: dict[str, Any] = {last: value}
        for section in reversed(sections):
            nested = {section: nested}
        tree = merge(tree, nested)
    return validate(tree, ", ".join(f"{name} {value}" for name, value in change.items()))


def build(recipe: Recipe, accelerator: Accelerator, threads: int) -> Built:
    """The model of a recipe with its optimizer.

    Raises:
        UsageError, DataError: as `assemble`.
    """
    parts = assemble(recipe, accelerator.device, world=accelerator.num_processes)
    cut, summed = recipe.train.deterministic, Sharded if parts.sharded else Averaged
    backward = Canonical(parts.objective, accelerator, cut) if cut else summed(parts.objective, accelerator)
    trained = [parameter for parameter in parts.objective.parameters() if parameter.requires_grad]
    return Built(parts, accelerator, backward, trained, threads)


def reset(built: Built) -> None:
    """Drop what a step that was broken off has left: gradients, notes for its end, memory."""
    built.parts.optimizer.zero_grad()
    built.parts.objective.forget_step()
    built.backward.forget()
    free()


def free() -> None:
    """Give back what a model has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Unrecorded(BadSteps):
    """Bad steps are left out as in training, and nothing is written or counted."""

    def leave_out(self, bad: Step) -> str:
        return ""


class Stepper:
    """Steps of a recipe by a model that was built for it, or for one with the same model.

    Args:
        timeline: gets its marks.
        alone: leave the gradients of each rank alone, to see what their sum costs.
    """

    def __init__(self, built: Built, recipe: Recipe, timeline: Timeline, alone: bool = False) -> None:
        self.built, self.timeline, self.recipe = built, timeline, recipe
        self.parts = replace(built.parts, recipe=recipe)
        self.place, self.done = self.parts.placer(built.device), 0
        # The parts of a deterministic step run side by side: where one is cannot be told.
        self.one = not isinstance(built.backward, Canonical)
        self.model = built.backward.model if alone and isinstance(built.backward, Averaged) else None
        self.bad = Unrecorded(self.parts, built.accelerator.process_index)
        self.verdicts = Verdicts(built.accelerator, self.bad)
        self.late = may_be_late(built.device, self.parts.objective, self.parts.optimizer)
        self.hook = built.parts.objective.register_forward_hook(self._forward_done) if self.one else None

    def close(self) -> None:
        """Leave the model as it was."""
        if self.hook:
            self.hook.remove()

    def __call__(
        self, hosts: list[HostBatch], more: Callable[[], list[HostBatch]], over: bool
    ) -> tuple[list[HostBatch], bool]:
        """One step as `train` takes it; the next batches, and whether any rank says that it is over."""
        built, parts = self.built, self.parts
        self.timeline.mark("transfer" if self.one else "backward")
        self.bad.keep()
        with built.accelerator.no_sync(self.model) if self.model is not None else nullcontext():
            losses = built.backward(hosts, self._placed)
        self.timeline.mark("optimizer")
        norm = gradient_norm(built.trained)
        self.timeline.mark("data")
        hosts = more()
        self.timeline.mark("optimizer")
        ended = self.verdicts.open is not None and self.verdicts.hear().endings[0]
        told, number = self.verdicts.ask(Step(self.done + 1, [], losses, norm), [over]), self.done % parts.steps
        if self.late:
            self.bad.put_back(told)
            update(parts, number, built.trained, norm, told)
        else:
            broken, _, [ended] = self.verdicts.hear()
            self.bad.undo() if broken else update(parts, number, built.trained, norm)
        parts.optimizer.zero_grad()
        built.backward.forget()
        self.done += 1
        self.timeline.step("optimizer")
        return hosts, ended

    def _placed(self, host: HostBatch) -> Batch:
        if self.one:
            self.timeline.mark("transfer")
        batch = self.place(host, progress=0.0)
        if self.one:
            self.timeline.mark("forward")
        return batch

    def _forward_done(self, objective: nn.Module, given: Any, loss: Loss) -> None:
        self.timeline.mark("backward")


def time_steps(
    built: Built, recipe: Recipe, seconds: float, clock: Callable[[], float] = time.perf_counter, alone: bool = False
) -> Timed:
    """Steps of the whole loop, loader and all, for about so many seconds after the first one, which may have to compile.

    Args:
        recipe: of the same model as `built`; it may differ in data, batch, workers and threads.

    Raises:
        UsageError, DataError: the data cannot be read so.
    """
    timeline = Timeline(built.device, clock)
    stepper = Stepper(built, recipe, timeline, alone)
    micros, device = recipe.train.accumulate, built.device
    batches = stepper.parts.batches(built.accelerator.process_index, built.world)
    workers = affordable_workers(batches.item_bytes, loader_workers(recipe))
    warm = max(WARM, -(-AHEAD * workers // micros) + 1)  # until what was made ahead meanwhile is used up
    torch.set_num_threads(recipe.train.threads or built.threads)
    forget_peak(device)
    begun, done, over = clock(), 0, False  # of the first step, then of the others
    try:
        with closing(feed(batches, range(FOREVER), workers, device.type == "cuda", recipe.train.timeout)) as items:  # type: ignore[type-var]
            hosts = (more := partial(_of_step, items, micros, device))()
            while not over:
                if done == 1:
                    begun, first = clock(), clock() - begun
                    warm = 1 if first > seconds / SLOW else warm
                if done == warm or (WARM <= done < warm and clock() - begun > seconds / 2):
                    timeline.restart()
                    warm = done
                hosts, over = stepper(hosts, more, clock() - begun > seconds and done >= warm + FEWEST - 1)
                done += 1
    finally:
        stepper.close()
        torch.set_num_threads(built.threads)
    return _timed(timeline, recipe.train.batch_size, peak_memory(device))


def _of_step(items: Any, micros: int, device: torch.device) -> list[HostBatch]:
    return [sent(next(items), device) for _ in range(micros)]


def _timed(timeline: Timeline, images: int, memory: int) -> Timed:
    steps, found = timeline.steps(), timeline.phases()
    chunks = min(CHUNKS, len(steps))
    edges = [len(steps) * i // chunks for i in range(chunks + 1)]
    rates = tuple(images * (end - start) / sum(steps[start:end]) for start, end in pairwise(edges))
    phases = {name: found.get(name, 0.0) / len(steps) for name in PHASES}
    return Timed(phases, images, rates, memory, len(steps))
