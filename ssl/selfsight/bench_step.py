"""The steps of a run, timed: its own loader, device, objective, gradients and update, and none of its files."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from selfsight.assemble import Parts, assemble
from selfsight.backward import Averaged, Canonical, Sharded
from selfsight.data.feed import AHEAD, affordable_workers, feed
from selfsight.data.loader import HostBatch
from selfsight.data.placer import Batch, sent
from selfsight.encoder import Encoder
from selfsight.finite import BadSteps, Step, gradient_norm
from selfsight.footprint import forget_peak, peak_memory
from selfsight.objectives.base import Loss
from selfsight.processes import loader_workers
from selfsight.recipe import Recipe, merge, validate
from selfsight.speed import count_flops, synchronize
from selfsight.timeline import Timeline
from selfsight.train import update
from selfsight.verdict import Verdicts, may_be_late

PHASES = ("data", "transfer", "forward", "backward", "optimizer", "communication")
LOOK = 64  # images of a batch by which the loader alone is timed
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


class Timed(NamedTuple):
    """What some steps of a recipe took."""

    phases: Mapping[str, float]
    """Seconds in a step of each of PHASES; together the step."""
    images: int
    """In a step, over all ranks."""
    rates: tuple[float, ...]
    """Images per second of each part of the time."""
    memory: int | None
    """Peak, bytes; None where it cannot be told."""
    steps: int
    """That were counted."""

    @property
    def images_per_second(self) -> float:
        """The median."""
        return median(self.rates)

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return self.images / self.images_per_second

    @property
    def noise(self) -> float:
        """Half the range of the rates, as a share of the median."""
        return (max(self.rates) - min(self.rates)) / 2 / self.images_per_second

    @property
    def share(self) -> dict[str, float]:
        """Of the step, by phase; together 1."""
        whole = sum(self.phases.values())
        return {name: seconds / whole for name, seconds in self.phases.items()}

    def scaled(self, images: int) -> "Timed":
        """A step of so many images, known by one of fewer: all but what a step does once takes as many times longer."""
        factor = images / self.images
        phases = {
            name: time * (1 if name in ("optimizer", "communication") else factor) for name, time in self.phases.items()
        }
        gain = factor * sum(self.phases.values()) / sum(phases.values())
        return self._replace(phases=phases, images=images, rates=tuple(gain * rate for rate in self.rates))


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


class Probe(NamedTuple):
    """What a first look at a model tells."""

    flops_per_image: float
    """Of a forward and backward pass, without what is only done again to save memory (PaLM's way of counting, arXiv
    2204.02311)."""
    seconds_per_image: float
    """Of this rank, eager, in a small batch."""


def probe(parts: Parts, accelerator: Accelerator, host: HostBatch) -> Probe:
    """Two passes over a small batch; before `build`, so that no gradients are summed over ranks."""
    encoders = [module for module in parts.objective.modules() if isinstance(module, Encoder)]
    before = [encoder.checkpoint_blocks for encoder in encoders]
    place = parts.placer(accelerator.device)

    def work() -> None:
        with accelerator.autocast():
            loss = parts.objective(place(host))
        loss.total.backward()
        parts.optimizer.zero_grad()
        parts.objective.forget_step()

    try:
        for encoder in encoders:
            encoder.checkpoint_blocks = 0
        with torch.compiler.set_stance("force_eager"):  # compiled blocks hide their operations
            counted = count_flops(work)
            begun = time.perf_counter()
            work()
            synchronize(accelerator.device)
    finally:
        for encoder, again in zip(encoders, before, strict=True):
            encoder.checkpoint_blocks = again
    return Probe(counted / len(host.ids), (time.perf_counter() - begun) / len(host.ids))


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


def with_communication(whole: Timed, alone: Timed) -> Timed:
    """The step with what its gradients' sum costs told apart: the part of the backward pass that goes when each rank keeps
    its own. What is hidden behind the computing costs nothing."""
    summed = max(0.0, whole.phases["backward"] - alone.phases["backward"])
    return whole._replace(
        phases={**whole.phases, "backward": whole.phases["backward"] - summed, "communication": summed}
    )


def loader_rate(built: Built, recipe: Recipe, seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Images per second of this rank's loader alone, while nobody computes."""
    parts = replace(built.parts, recipe=recipe)
    whole = parts.batches(built.accelerator.process_index, built.world)
    images = min(LOOK * built.world, whole.batch_size // recipe.train.accumulate)
    some = replace(whole, batch_size=images, accumulate=1)
    workers = affordable_workers(some.item_bytes, loader_workers(recipe))
    with closing(feed(some, range(FOREVER), workers, False, recipe.train.timeout)) as items:  # type: ignore[type-var]
        for _ in range(1 + AHEAD * workers):  # processes start, files are opened, what was made meanwhile is used up
            next(items)
        begun, made = clock(), 0
        while (spent := clock() - begun) < seconds or not made:
            made += len(next(items).ids)
    return made / spent
