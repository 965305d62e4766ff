"""A first look at a model and its data, before steps are timed: operations, seconds an image, the loader alone."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator

from selfsight.assemble import Parts, assemble
from selfsight.bench_step import FOREVER, Built, free
from selfsight.data.feed import AHEAD, affordable_workers, feed
from selfsight.data.loader import HostBatch
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.processes import agree, loader_workers
from selfsight.recipe import Recipe
from selfsight.speed import count_flops, synchronize

LOOK = 64  # images of a batch by which the loader alone is timed
LOOKS = {
    "cpu": 8,
    "cuda": 64,
}  # images of the first look at a model, and of the very first where those take longer than
GLANCE, LONG = {"cpu": 2, "cuda": 64}, 0.5  # seconds


class Probe(NamedTuple):
    """What a first look at a model tells."""

    flops_per_image: float
    """Of a forward and backward pass, without what is only done again to save memory (PaLM's way of counting, arXiv
    2204.02311)."""
    seconds_per_image: float
    """Of this rank, eager, in a small batch."""
    images: int
    """That a short look had time for."""


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
    return Probe(counted / len(host.ids), (time.perf_counter() - begun) / len(host.ids), len(host.ids))


def first_look(recipe: Recipe, accelerator: Accelerator) -> Probe:
    """Two passes of a model of its own, before DDP knows one."""
    parts = assemble(recipe, accelerator.device, world=accelerator.num_processes)
    batches = parts.batches(accelerator.process_index, accelerator.num_processes)
    most = recipe.train.batch_size // recipe.train.accumulate // batches.world
    images, whole = min(GLANCE[accelerator.device.type], most), min(LOOKS[accelerator.device.type], most)
    while True:
        try:
            look = probe(parts, accelerator, replace(batches, batch_size=images * batches.world, accumulate=1)[0])
            slow = agree(accelerator, [look.seconds_per_image * whole > LONG])[0]
            if slow or images >= whole:
                return look
            images = whole
            continue
        except torch.OutOfMemoryError:
            if images < 4 or batches.world > 1:
                raise UsageError("train.device: the model does not fit in the GPU's memory with two images") from None
        images = whole = images // 2
        parts.optimizer.zero_grad()
        parts.objective.forget_step()
        free()


def few_images(built: Built, images: int) -> HostBatch:
    """A small batch of the recipe's data."""
    batches = built.parts.batches(built.accelerator.process_index, built.world)
    return replace(batches, batch_size=images * built.world, accumulate=1)[0]


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
