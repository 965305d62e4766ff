"""What a run does every so many steps, timed: evaluation, logging, saving."""

import time
from typing import Any

from selfsight.bench_step import Built
from selfsight.checkpoint import Tensors
from selfsight.collapse import CollapseWatch
from selfsight.data.loader import HostBatch
from selfsight.encoder import Encoder
from selfsight.eval.online import Online, OnlineHealth, OnlineKNN, watcher
from selfsight.past import Past
from selfsight.processes import loader_workers
from selfsight.recipe import Recipe
from selfsight.saver import Saver
from selfsight.speed import synchronize
from selfsight.train import mean_loss

FEW = 40  # images of an evaluation below which its time cannot be told


class Unwritten(Saver):
    """Saves as far as training waits for it: the tensors are copied, and the copy is dropped."""

    def _write(self, step: int, state: dict[str, Any], tensors: dict[str, Tensors], awaited: bool) -> None:
        self.newest = step


def cadence(built: Built, recipe: Recipe, host: HostBatch, rate: float, seconds: float) -> dict[str, float | None]:
    """Seconds, spread over the steps from one to the next, of what comes every so many steps; None where not measured.

    Every rank takes part.

    Args:
        rate: images per second of training on one rank.
        seconds: that evaluating may take.
    """
    logged, saved, main = _logging(built, host), _saving(built), built.accelerator.is_main_process
    encoder = built.parts.scored_whole(main)
    scored = _evaluation(built, encoder, recipe, rate, seconds) if encoder and main else None
    train = recipe.train
    return {
        "evaluation": None if scored is None else scored / recipe.eval.every,
        "logging": logged / train.log_every,
        "saving": saved / train.save_every,
    }


def _logging(built: Built, host: HostBatch) -> float:
    """Of one line: the loss is gathered, and collapse looked for."""
    losses = built.backward([host], built.parts.placer(built.device))
    watch, taken = CollapseWatch(False, Past()), []
    for _ in range(2):  # the first one may import something
        synchronize(built.device)
        begun = time.perf_counter()
        mean_loss(losses, built.accelerator)
        watch(1, losses[-1], built.accelerator)
        taken.append(time.perf_counter() - begun)
    built.parts.optimizer.zero_grad()
    built.parts.objective.forget_step()
    return taken[-1]


def _saving(built: Built) -> float:
    """Of one checkpoint, as far as training waits for it."""
    parts, main = built.parts, built.accelerator.is_main_process
    folder = parts.recipe.run_dir
    saver = Unwritten(folder / "checkpoints", 2, None, folder / "metrics.jsonl")
    synchronize(built.device)
    begun = time.perf_counter()
    tensors = parts.tensors(main) if main or parts.sharded else {}  # of shards all ranks have a part
    if main:
        saver.save(1, parts.state(), tensors, wait=False, owned=parts.sharded)
    taken = time.perf_counter() - begun
    saver.finish()
    return taken


def _evaluation(built: Built, encoder: Encoder, recipe: Recipe, rate: float, seconds: float) -> float | None:
    """Of one online score: of fewer images where it would take too long, in proportion to their number."""
    config, samples, workers = recipe.eval, built.parts.shards, loader_workers(recipe)
    whole = watcher(config, samples, workers)
    assert isinstance(whole, OnlineKNN | OnlineHealth)
    count = len(whole.ids)
    few = min(count, int(rate * seconds))
    if few < min(count, FEW):
        return None
    some: list[Online] = [whole]
    if few < count:
        some = [watcher(config.model_copy(update={"online_samples": n}), samples, workers) for n in (few // 2, few)]
    taken = []
    for online in some:
        begun = time.perf_counter()
        online.score(encoder, built.device)
        taken.append(time.perf_counter() - begun)
    if len(taken) == 1:
        return taken[0]
    return taken[1] + max(0.0, taken[1] - taken[0]) * (count - few) / (few - few // 2)
