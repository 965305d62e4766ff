"""The fields that may make a recipe faster, and which of them are worth a trial here."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from selfsight.assemble import Parts
from selfsight.bench_step import Built
from selfsight.bench_timed import Timed
from selfsight.data import jpeg
from selfsight.data.decode import BadSample
from selfsight.data.device_jpeg import require_decoder
from selfsight.errors import UsageError
from selfsight.precision import resolve
from selfsight.processes import agree, loader_workers, of_all_ranks
from selfsight.recipe import Recipe

FIRST = ("train.threads", "train.precision")  # of a machine so slow that there may be no time for others
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
    ranks: int = 1

    @property
    def may_run_out(self) -> bool:
        """Whether a step that takes more memory may be tried: of several ranks on GPUs one that runs out ends all."""
        return not (self.gpu and self.ranks > 1)


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
    return (
        ["auto"] if recipe.train.checkpoint_blocks is True and now.may_run_out else []
    )  # which leaves out what memory has room for


def _accumulate(recipe: Recipe, now: Situation) -> list[Any]:
    micros, images = recipe.train.accumulate, recipe.train.batch_size // recipe.train.accumulate
    fewer = [micros // 2] if micros % 2 == 0 and now.may_run_out else []
    more = [2 * micros] if not now.gpu and images >= 2 * SMALL_MICRO and images % 2 == 0 else []
    return [*fewer, *more] if now.whole else []


def _batch_size(recipe: Recipe, now: Situation) -> list[Any]:
    return [2 * recipe.train.batch_size] if now.whole and now.may_run_out else []


def _fast_decode(recipe: Recipe, now: Situation) -> list[Any]:
    usable = now.jpegs and jpeg.library() is not None and recipe.data.decode == "workers" and recipe.data.repeat == 1
    return [True] if usable and not recipe.data.fast_decode else []


def _decode(recipe: Recipe, now: Situation) -> list[Any]:
    if not (
        now.gpu and now.jpegs and now.data_bound and recipe.data.decode == "workers" and not recipe.data.fast_decode
    ):
        return []
    try:
        require_decoder(torch.device("cuda"))
    except UsageError:  # not installed, or without nvJPEG
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


def candidates(recipe: Recipe, now: Situation) -> list[dict[str, Any]]:
    """Changes worth trying, the most promising ones first."""

    def late(item: tuple[str, Switch]) -> tuple[bool, bool]:
        return not now.whole and item[0] not in FIRST, item[1].data != now.data_bound

    order = sorted(SWITCHES.items(), key=late)
    return [_change(name, value, recipe) for name, one in order for value in one.values(recipe, now)]


def _change(name: str, value: Any, recipe: Recipe) -> dict[str, Any]:
    if name == "train.compile" and not value and recipe.train.cuda_graphs:  # which are nothing without it
        return {name: value, "train.cuda_graphs": False}
    return {name: value}


def rebuilt_for(change: Mapping[str, Any]) -> bool:
    """Whether a change takes a new model."""
    return any(SWITCHES[name].rebuilt for name in change)


def situation(built: Built, recipe: Recipe, own: Recipe, base: Timed, compiles: bool) -> Situation:
    """What decides which switches are tried; the same on every rank."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    gpu = built.device.type == "cuda"
    bound, jpegs = agree(built.accelerator, [base.data_bound, has_jpegs(built.parts)])
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
        ranks=built.world,
    )


def has_jpegs(parts: Parts) -> bool:
    """Whether the first sample is one."""
    try:
        return parts.shards.read_images(0)[0].startswith(jpeg.START)
    except BadSample:
        return False
