"""The training loop, on one page."""

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from selfsight import checkpoint, console
from selfsight.assemble import Parts, assemble
from selfsight.collapse import EVERY, CollapseWatch
from selfsight.data.loader import loader
from selfsight.errors import NumericError, Stopped, UsageError
from selfsight.eval.online import OnlineKNN
from selfsight.finish import finish
from selfsight.metrics import Meter, MetricsLog, require_trackers, start_trackers
from selfsight.objectives.base import Loss
from selfsight.optim import lr_at, move_average, set_rates, weight_decay_at
from selfsight.processes import StopRequest, any_rank, join, loader_workers, same_on_every_rank
from selfsight.quarantine import Quarantine
from selfsight.recipe import Recipe, load
from selfsight.run_folder import STOPPED, RunLock, cut_lines_after, sync, write_atomically


def pretrain(recipe: Recipe | str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Start or resume the run of a recipe, to its end: encoder, scores and report in `run_dir`.

    Returns:
        What scores.json holds (no scores if the recipe names no labelled sets); empty on all but the main process.

    Raises:
        UsageError, DataError, StorageError: what is wrong with the recipe, the data or the disk.
        NumericError: a gradient that is not finite; the weights before it are untouched.
        Stopped: after SIGTERM, SIGINT or SIGUSR1; saved, and the same call goes on.
    """
    if isinstance(recipe, Recipe) and overrides:
        raise UsageError("overrides go with a recipe's file or name; a Recipe is complete")
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe, overrides)
    require_trackers(recipe.track)
    accelerator = join(recipe)
    main = accelerator.is_main_process
    with ExitStack() as stack:
        if main:
            stack.enter_context(RunLock(recipe.run_dir))
        parts = assemble(recipe, accelerator.device)
        train(parts, accelerator)
        accelerator.end_training()  # the other ranks need not wait for the scores
        return finish(parts, accelerator.device, loader_workers(recipe)) if main else {}


def train(parts: Parts, accelerator: Accelerator) -> None:
    """Train from the newest checkpoint, or from the start, to the last step."""
    recipe, config, steps, folder = parts.recipe, parts.recipe.train, parts.steps, parts.recipe.run_dir
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    main, micros, workers = accelerator.is_main_process, config.accumulate, loader_workers(recipe)
    done = resume(parts, accelerator)
    model: Any = accelerator.prepare_model(parts.objective)
    trained = [parameter for parameter in parts.objective.parameters() if parameter.requires_grad]
    place, watch = parts.placer(device), CollapseWatch(config.on_collapse == "stop")
    batches = iter(
        loader(parts.batches(rank, world), range(done * micros, steps * micros), workers, device.type == "cuda")
    )
    log, meter, quarantine = (
        MetricsLog(folder / "metrics.jsonl", accelerator),
        Meter(config.batch_size, device),
        Quarantine(folder, rank),
    )
    online = OnlineKNN(recipe.eval, workers) if recipe.eval.train and main else None
    start_trackers(accelerator, folder.name, recipe.model_dump(mode="json"))

    with StopRequest() as stop, console.progress("training", steps, done, quiet=not main) as bar:
        for step in range(done, steps):
            losses: list[Loss] = []
            for micro in range(micros):
                with meter.waiting():
                    host = next(batches)
                quarantine.record(host)
                batch = place(host, step / steps)
                with accelerator.no_sync(model) if micro < micros - 1 else nullcontext():
                    losses.append(model(batch))
                    accelerator.backward(losses[-1].total / micros)
            norm = finite_norm(trained, step, losses)
            if recipe.optim.clip:
                clip_grads_with_norm_(trained, recipe.optim.clip, norm)
            lr = lr_at(step, steps, recipe.optim)
            set_rates(parts.optimizer, lr, weight_decay_at(step, steps, recipe.optim))
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            parts.objective.after_step(step + 1, steps)
            if parts.average and config.ema:
                move_average(parts.average, parts.encoder, config.ema)

            done = step + 1
            meter.step()
            bar()
            stopping = any_rank(accelerator, stop.asked)
            scoring = recipe.eval.train is not None and due(done, recipe.eval.every, steps)
            logging = scoring or due(done, config.log_every, steps)
            watched = watch(done, losses[-1], accelerator) if logging or due(done, EVERY, steps) else {}
            if logging:
                line = {"step": done, "epoch": round(parts.epoch(done), 4), **mean_loss(losses, accelerator)}
                line |= {"lr": lr, "grad_norm": norm.item()} | watched
                timing = meter.read()
                with meter.pause():
                    log.write(line | (online(parts.scored, device) if scoring and online else {}) | timing)
            if main and (stopping or done == 1 or due(done, config.save_every, steps)):
                with meter.pause():
                    sync(log.path)  # the checkpoint must not outlive the lines before it
                    checkpoint.save(folder / "checkpoints", done, parts.state(), parts.tensors(), config.keep)
            if stopping and done < steps:
                if main:
                    write_atomically(folder / STOPPED, f"{done}\n")
                accelerator.wait_for_everyone()  # a rank that leaves early has the launcher end the one that saves
                raise Stopped(
                    f"stopped on request after step {done:,} of {steps:,}, saved; run the same command to go on"
                )


def resume(parts: Parts, accelerator: Accelerator) -> int:
    """Take the newest whole checkpoint's place, if there is one; the answer is the number of steps done."""
    folder, told = parts.recipe.run_dir, parts.notes
    newest, warnings = checkpoint.newest(folder / "checkpoints")
    done = parts.restore(checkpoint.load(newest), str(folder)) if newest else 0
    same_on_every_rank(
        accelerator, done, f"{folder}: the newest checkpoint (its folder must be one that all machines share)"
    )
    if accelerator.is_main_process:
        (folder / STOPPED).unlink(missing_ok=True)
        cut_lines_after(folder / "metrics.jsonl", done)
        write_atomically(folder / "recipe.yaml", parts.recipe.to_yaml())
        for line in warnings or ([] if newest else told):
            console.say(line)
        going = f"goes on from step {done:,}" if newest else "starts"
        console.say(
            f"{folder}: {going}; {parts.steps:,} steps of {parts.recipe.train.batch_size} images "
            f"({parts.epoch(parts.steps):.1f} passes over {len(parts.shards):,}) on {accelerator.num_processes} x {accelerator.device}"
        )
    accelerator.wait_for_everyone()
    return done


def finite_norm(trained: list[torch.nn.Parameter], step: int, losses: list[Loss]) -> Tensor:
    """The gradient's norm. Gradients are summed over the ranks by now, so that every rank comes to the same decision.

    Raises:
        NumericError: it is not finite.
    """
    norm = get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if not norm.isfinite():
        values = ", ".join(f"{loss.total.item():g}" for loss in losses)
        raise NumericError(
            f"step {step + 1}: the gradient is not finite (loss {values}); the weights are those of step {step}. "
            "A lower optim.lr, longer optim.warmup, or optim.clip 1.0 usually helps"
        )
    return norm


def mean_loss(losses: list[Loss], accelerator: Accelerator) -> dict[str, float]:
    """The step's loss and terms, over micro-batches and ranks."""
    parts = [
        {"loss": loss.total.detach()} | {f"loss/{name}": term for name, term in loss.terms.items()} for loss in losses
    ]
    means = {name: torch.stack([part[name].float() for part in parts]).mean() for name in parts[0]}
    return {name: accelerator.reduce(value, "mean").item() for name, value in means.items()}


def due(done: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps happens after step `done`; the last step counts always."""
    return done % every == 0 or done == steps
