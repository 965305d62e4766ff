"""The training loop, on one page."""

from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from math import fsum, isfinite, nan
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_

from selfsight import checkpoint, console
from selfsight.assemble import Parts, assemble, unsharded
from selfsight.backward import Averaged, Canonical, Sharded
from selfsight.collapse import EVERY, CollapseWatch
from selfsight.cost import spent_before
from selfsight.data.feed import feed
from selfsight.data.loader import HostBatch
from selfsight.data.placer import sent
from selfsight.divergence import DivergenceWatch
from selfsight.errors import (
    DataError,
    DataGone,
    NumericError,
    PeerLost,
    SelfsightError,
    Stopped,
    StorageError,
    UsageError,
)
from selfsight.eval.online import watcher
from selfsight.eval.ranks import of_run
from selfsight.faults import faultpoint
from selfsight.finish import finish, forget_scores
from selfsight.finite import BadSteps, Step, gradient_norm
from selfsight.ledger import Ledger
from selfsight.metrics import Meter, MetricsLog, end_trackers, require_trackers, start_trackers
from selfsight.objectives.base import Loss
from selfsight.optim import lr_at, make_moments, move_average, set_rates, weight_decay_at
from selfsight.peers import Peers
from selfsight.processes import StopRequest, agree, join, loader_workers, same_on_every_rank
from selfsight.quarantine import Quarantine
from selfsight.recipe import Recipe, load
from selfsight.redact import redact_tree
from selfsight.run_folder import STOPPED, RunLock, cut_lines_after, remove_if_empty, require_writable, write_atomically
from selfsight.saver import Saver
from selfsight.verdict import Verdicts, may_be_late

# For which all ranks end a run at the same step; for the last two nothing can be saved.
ENDINGS = Stopped, DataGone, DataError, StorageError, NumericError


def pretrain(
    recipe: Recipe | str | Path, overrides: Mapping[str, Any] | None = None, allow_change: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Start or resume the run of a recipe, to its end: encoder, scores and report in `run_dir`.

    Args:
        allow_change: fields in which a resumed run may differ from what it was, such as "optim.lr".

    Returns:
        What scores.json holds (no scores if the recipe names no labelled sets); empty on all but the main process.

    Raises:
        UsageError, DataError, StorageError: what is wrong with the recipe, the data or the disk.
        NumericError: too many steps whose loss or gradient is not finite; not one of them touched the weights.
        Stopped: after SIGTERM, SIGINT or SIGUSR1; saved, and the same call goes on.
        DataGone: the data cannot be reached; saved, and the same call goes on.
        PeerLost: another rank died, failed or went silent.
    """
    if isinstance(recipe, Recipe) and overrides:
        raise UsageError("overrides go with a recipe's file or name; a Recipe is complete")
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides)
    require_trackers(recipe.track)
    with ExitStack() as stack:
        if not recipe.run_dir.exists():
            stack.callback(remove_if_empty, recipe.run_dir)  # a run that cannot start leaves nothing behind
        require_writable(recipe.run_dir)
        accelerator = join(recipe)  # a signal before this ends the process: there is nothing to save
        stop = stack.enter_context(StopRequest())
        main = accelerator.is_main_process
        peers = stack.enter_context(Peers(accelerator, recipe.train.timeout))
        if main:
            stack.enter_context(RunLock(recipe.run_dir))
        try:
            parts = assemble(recipe, accelerator.device, allow_change, accelerator.num_processes)
            train(parts, accelerator, stop, peers)
            stop.at_once()
            peers.now(parts.steps, "scoring")
            ranks = of_run(accelerator.process_index, accelerator.num_processes)
            found = finish(unsharded(parts, accelerator.device), accelerator.device, loader_workers(recipe), ranks)
        except RuntimeError as error:  # a collective fails so when a rank is gone
            if lost := peers.who(error):
                raise PeerLost(lost) from error
            raise
        peers.leave()
        end_trackers(accelerator)  # and the processes' group
        return found


def train(parts: Parts, accelerator: Accelerator, stop: StopRequest | None = None, peers: Peers | None = None) -> None:
    """Train from the newest checkpoint, or from the start, to the last step."""
    recipe, config, steps, folder = parts.recipe, parts.recipe.train, parts.steps, parts.recipe.run_dir
    device, rank, main = accelerator.device, accelerator.process_index, accelerator.is_main_process
    stop, peers = stop or StopRequest(), peers or Peers(accelerator, config.timeout)
    before = spent_before(folder / "metrics.jsonl")  # then the lines of lost work are cut
    first = resume(parts, accelerator)
    if main and first < steps:
        forget_scores(folder)
    cut = config.deterministic
    summed = Sharded if parts.sharded else Averaged
    backward = Canonical(parts.objective, accelerator, cut) if cut else summed(parts.objective, accelerator)
    trained = [parameter for parameter in parts.objective.parameters() if parameter.requires_grad]
    place, ledger, meter = parts.placer(device), Ledger(folder, rank), Meter(config.batch_size, device, before)
    log = MetricsLog(folder / "metrics.jsonl", accelerator)
    saver = Saver(folder / "checkpoints", config.keep, config.keep_every, log.path)
    collapse, divergence = CollapseWatch(config.on_collapse == "stop", parts.past), DivergenceWatch(parts.past)
    bad = BadSteps(parts, rank)
    online = watcher(recipe.eval, parts.shards, loader_workers(recipe)) if main else None
    start_trackers(accelerator, folder.name, redact_tree(recipe.model_dump(mode="json")))

    def save(step: int, wait: bool) -> None:
        peers.now(step, "saving")
        with meter.pause():
            if parts.sharded and any(agree(accelerator, [saver.leaves_out(step, wait)])):  # before all gather for it
                return
            tensors = parts.tensors(main) if main or parts.sharded else {}  # of shards all ranks have a part
            if main:
                saver.save(step, parts.state(), tensors, wait, owned=parts.sharded)

    late = may_be_late(device, parts.objective, parts.optimizer)
    data, verdicts = Feeder(parts, accelerator, first, 2 if late else 1, meter, stop), Verdicts(accelerator, bad)

    def reasons() -> list[bool]:
        found = data.problem or saver.failed
        return [stop.asked, *(isinstance(found, kind) for kind in ENDINGS[1:])]

    def end_if(ending: list[bool], done: int, end: str = "") -> None:
        """End the run after `done` steps for its numbers, or for what all ranks agree on; saved, unless it cannot be."""
        why = NumericError if end else next((why for why, agreed in zip(ENDINGS, ending, strict=True) if agreed), None)
        if why and done > first and (end or why not in ENDINGS[3:]):
            save(done, wait=True)
        if why:
            leave(folder, accelerator, done, steps, why, NumericError(end) if end else saver.failed or data.problem)

    with saver, console.progress("training", steps, first, quiet=not main) as bar:
        data.read()
        meter.restart()
        ending = agree(accelerator, reasons())
        for step in range(first, steps):
            end_if(ending, step)
            peers.now(step, "learning")
            faultpoint("learn", step + 1)
            bad.keep()
            hosts = data.take()
            losses = backward(hosts, partial(place, progress=step / steps))
            norm = gradient_norm(trained)
            faultpoint("learned", step + 1)
            peers.now(step, "reading data")
            data.read()
            peers.now(step, "waiting for the other ranks")
            done, end, broken = step + 1, "", False
            if verdicts.open:  # of the step before
                _, end, ending = verdicts.hear()
                if end or any(ending):
                    bad.undo()  # what this step has changed, which nobody takes
                end_if(ending, step, end)
            told = verdicts.ask(Step(done, bare(hosts), losses, norm), reasons())
            scoring, saving = due(done, recipe.eval.every, steps), done == 1 or due(done, config.save_every, steps)
            logging, looking = scoring or due(done, config.log_every, steps), done < EVERY or due(done, EVERY, steps)
            if late and not (saving or logging or looking):
                bad.put_back(told)  # before an average of the encoder takes it up
                update(parts, step, trained, norm, told)
            else:
                broken, end, ending = verdicts.hear()
                bad.undo() if broken else update(parts, step, trained, norm)
            parts.optimizer.zero_grad()
            backward.forget()

            ledger.write(done, hosts, losses, norm, parts.objective)
            faultpoint("update", done)
            meter.step()
            bar()
            means = mean_loss(losses, accelerator) if logging or looking else {}
            spreads = logging or done == 1 or due(done, EVERY, steps)  # the loss of the first steps is looked at alone
            watched = collapse(done, losses[-1], accelerator) if spreads else {}
            if looking:
                divergence(done, means["loss"], quiet=not main)
            if logging:
                line = {"step": done, "epoch": round(parts.epoch(done), 4), **means}
                line |= {"lr": lr_at(step, steps, recipe.optim), "grad_norm": norm.item(), **watched}
                timing = ({"left_out": 1} if broken else {}) | meter.read(accelerator)
                with meter.pause():
                    peers.now(done, "scoring")
                    scored = parts.scored_whole(main) if scoring else None
                    log.write(line | (online.score(scored, device) if scored and online else {}) | timing)
            if saving:
                save(done, wait=done in (1, steps))
            if end:
                end_if(ending, done, end)


def update(parts: Parts, step: int, trained: list[Parameter], norm: Tensor, bad: Tensor | None = None) -> None:
    """Take optimizer step `step` (from 0) of this clipped gradient, and whatever follows the weights.

    Args:
        bad: (), 1.0 where the step is to change nothing, if only the device knows that; None: it is good.
    """
    recipe, steps, objective = parts.recipe, parts.steps, parts.objective
    if recipe.optim.clip:
        clip_grads_with_norm_(trained, recipe.optim.clip, norm)
    set_rates(parts.optimizer, lr_at(step, steps, recipe.optim), weight_decay_at(step, steps, recipe.optim))
    parts.optimizer.found_inf = bad  # type: ignore[attr-defined]  # as a GradScaler tells fused optimizers
    parts.optimizer.step()
    objective.took = None if bad is None else 1 - bad
    objective.after_step(step + 1, steps)
    if parts.average and recipe.train.ema:
        move_average(parts.average, parts.encoder, recipe.train.ema, objective.took)


def leave(
    folder: Path,
    accelerator: Accelerator,
    done: int,
    steps: int,
    why: type[SelfsightError],
    problem: SelfsightError | None,
) -> NoReturn:
    """End a run that all ranks agree to end; what there is is saved, unless it cannot be.

    Args:
        why: one of ENDINGS, which is raised.
        problem: what this rank knows of the reason.
    """
    accelerator.wait_for_everyone()  # a rank that leaves early has the launcher end the one that saves
    if why in ENDINGS[3:]:
        raise problem or why("rank 0 cannot save; it says why")
    if why is Stopped and accelerator.is_main_process:
        write_atomically(folder / STOPPED, f"{done}\n")
    where = f"after step {done:,} of {steps:,}{', saved' if done else ''}; run the same command to go on"
    if why is Stopped:
        raise Stopped(f"stopped on request {where}")
    told = problem.told if problem else "another rank cannot go on with its data; it says why"
    raise why(f"{told}\nthe run ended {where} when that is mended")


class Feeder:
    """The batches of this rank, step by step.

    Args:
        first: the step to begin with.
        ahead: steps whose batches are at hand after `read`: 2 where all ranks hear only in the step after that a rank has
            nothing more, and need a batch for that one.
        stop: once it is asked, nothing more is read.
    """

    def __init__(
        self, parts: Parts, accelerator: Accelerator, first: int, ahead: int, meter: Meter, stop: StopRequest
    ) -> None:
        train = parts.recipe.train
        self.steps, self.micros, self.meter, self.stop = parts.steps, train.accumulate, meter, stop
        self.quarantine = Quarantine(parts.recipe.run_dir, accelerator.process_index, parts.recipe.data.bad_share)
        numbers = range(first * self.micros, self.steps * self.micros)
        batches = parts.batches(accelerator.process_index, accelerator.num_processes)
        self.device = accelerator.device
        pin = self.device.type == "cuda"
        self.batches = feed(batches, numbers, loader_workers(parts.recipe), pin, train.timeout)
        self.next, self.ahead = first, ahead
        self.ready: deque[list[HostBatch]] = deque()
        self.problem: DataGone | DataError | None = None
        """Why there is nothing more."""

    def take(self) -> list[HostBatch]:
        """The micro-batches of the next step."""
        return self.ready.popleft()

    def read(self) -> None:
        """Have the next steps' batches at hand; none after the last one, or if the run is about to end."""
        while len(self.ready) < self.ahead and self.next < self.steps and not (self.stop.asked or self.problem):
            try:
                with self.meter.waiting():
                    faultpoint("data", self.next + 1)
                    hosts = [sent(next(self.batches), self.device) for _ in range(self.micros)]
                for host in hosts:
                    self.quarantine.record(host)
            except (DataGone, DataError) as error:
                self.problem = error
            else:
                self.ready.append(hosts)
                self.next += 1


def bare(hosts: list[HostBatch]) -> list[HostBatch]:
    """The batches without their pixels, which take memory."""
    return [host._replace(views=(), encoded=()) for host in hosts]


def resume(parts: Parts, accelerator: Accelerator) -> int:
    """Take the newest whole checkpoint's place, if there is one; the answer is the number of steps done."""
    folder = parts.recipe.run_dir
    make_moments(parts.optimizer)
    newest, warnings = checkpoint.newest(folder / "checkpoints")
    done = parts.restore(checkpoint.load(newest, verified=True), str(folder)) if newest else 0
    same_on_every_rank(
        accelerator, done, f"{folder}: the newest checkpoint (its folder must be one that all machines share)"
    )
    if accelerator.is_main_process:
        checkpoint.clean(folder / "checkpoints")
        if newest and not warnings:
            checkpoint.prune(folder / "checkpoints", parts.recipe.train.keep, parts.recipe.train.keep_every)
        (folder / STOPPED).unlink(missing_ok=True)
        cut_lines_after(folder / "metrics.jsonl", done)
        write_atomically(folder / "recipe.yaml", parts.recipe.to_yaml())
        for line in [*warnings, *parts.notes]:
            console.say(line)
        going = f"goes on from step {done:,}" if newest else "starts"
        console.say(
            f"{folder}: {going}; {parts.steps:,} steps of {parts.recipe.train.batch_size} images "
            f"({parts.epoch(parts.steps):.1f} passes over {len(parts.shards):,}) on {accelerator.num_processes} x {accelerator.device.type}"
        )
    accelerator.wait_for_everyone()
    return done


def mean_loss(losses: list[Loss], accelerator: Accelerator) -> dict[str, float]:
    """The step's loss and terms, over micro-batches and ranks; exactly rounded, so that their order does not matter."""
    own = [
        {"loss": loss.total.detach()} | {f"loss/{name}": term for name, term in loss.terms.items()} for loss in losses
    ]
    table = torch.stack([torch.stack([value.float() for value in part.values()]) for part in own])
    columns = zip(*accelerator.gather(table).tolist(), strict=True)
    return {
        name: fsum(column) / len(column) if all(map(isfinite, column)) else nan
        for name, column in zip(own[0], columns, strict=True)
    }


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps happens after step `done`; the last step counts always."""
    return done % every == 0 or done == steps
