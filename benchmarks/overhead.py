"""What the safeguards cost: seconds for index and checksum of a sample, and for the finite check of a step, as shares.

python benchmarks/overhead.py [SHARDS] [--recipe NAME] --json          about a minute on 2 cores
python benchmarks/overhead.py --loop 60 [--recipe NAME] --json         the whole loop against the bare step
python benchmarks/overhead.py SHARDS --loop 401 --device cuda --recipe imagenet/mae-s16 --unlabelled --batch 256 --json

A safeguard costs microseconds beside a step of milliseconds: on a machine whose runs differ by more than that, with and
without cannot be told apart (tried: docs/log.md). So each safeguard is timed alone, in a loop, and set against the
median of what it is a part of. CPU time of one thread; medians over the repeats, with their spread. The loop on a GPU is
timed by the wall, in blocks of steps that take turns with as many bare ones; there the figure has not been tried yet.
"""

import argparse
import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator

from selfsight.assemble import Parts, assemble
from selfsight.backward import Averaged
from selfsight.collapse import EVERY
from selfsight.data.loader import HostBatch
from selfsight.data.placer import sent
from selfsight.eval.online import watcher
from selfsight.exports.card import hardware_of
from selfsight.finite import BadSteps, Step, gradient_norm
from selfsight.processes import join
from selfsight.recipe import Recipe, load
from selfsight.saver import on_the_cpu
from selfsight.speed import synchronize
from selfsight.train import train, update
from selfsight.verdict import Verdicts

UNLABELLED = {"eval.train": None, "eval.test": None}


def seconds(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median CPU seconds of one call, and the spread of the repeats as a share of it."""
    run()  # warms caches
    found = []
    for _ in range(repeats):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return median(found), (max(found) - min(found)) / 2 / median(found)


def reading(parts: Parts, samples: int, repeats: int) -> dict[str, float]:
    """Of a sample: bytes alone at a known place, by index and with its checksum, and made into a view."""
    data, batches = parts.shards, parts.batches()
    places = [data._locate(sample) for sample in range(samples)]
    files = {shard: os.open(data.paths[shard], os.O_RDONLY) for shard, _ in places}
    known = [(files[shard], int(record["size"]), int(record["offset"])) for shard, record in places]
    bodies = [os.pread(*place) for place in known]
    bare, _ = seconds(lambda: [os.pread(*place) for place in known], repeats)
    safe, noise = seconds(lambda: [data.read(sample) for sample in range(samples)], repeats)
    crc, _ = seconds(lambda: [zlib.crc32(body) for body in bodies], repeats)
    steps = max(1, samples // parts.recipe.train.batch_size)
    made, made_noise = seconds(lambda: [batches[number] for number in range(steps)], repeats)
    made *= samples / (steps * parts.recipe.train.batch_size)
    return {
        "bytes_of_a_sample": round(sum(map(len, bodies)) / samples),
        "crc_microseconds": round(1e6 * crc / samples, 3),
        "index_crc_and_retries_microseconds": round(1e6 * (safe - bare) / samples, 2),
        "sample_made_microseconds": round(1e6 * made / samples, 1),
        "crc_percent": round(100 * crc / made, 2),
        "index_crc_and_retries_percent": round(100 * (safe - bare) / made, 2),
        "noise_percent_of_each": round(100 * max(noise, made_noise), 1),
    }


def stepping(parts: Parts, repeats: int) -> dict[str, float]:
    """Of a step without its data: the norm that clipping wants anyway, and the check with its agreement."""
    accelerator, place = Accelerator(cpu=True), parts.placer(torch.device("cpu"))
    backward, host = Averaged(parts.objective, accelerator), parts.batches()[0]
    trained = [parameter for parameter in parts.objective.parameters() if parameter.requires_grad]

    def step() -> None:
        backward([host], place)
        gradient_norm(trained)
        parts.optimizer.step()
        parts.optimizer.zero_grad()

    whole, noise = seconds(step, repeats)
    losses = backward([host], place)
    norm = gradient_norm(trained)
    verdicts = Verdicts(accelerator, BadSteps(parts, 0))

    def check_once() -> None:
        verdicts.ask(Step(1, [], losses, norm), [False] * 5)
        verdicts.hear()

    check, _ = seconds(lambda: [check_once() for _ in range(100)], repeats)
    norms, _ = seconds(lambda: gradient_norm(trained), repeats)
    return {
        "step_milliseconds": round(1e3 * whole, 2),
        "finite_check_percent": round(100 * check / 100 / whole, 3),
        "finite_check_and_norm_percent": round(100 * (check / 100 + norms) / whole, 2),
        "step_noise_percent": round(100 * noise, 1),
    }


class Resident:
    """A few batches that lie in memory, in place of those that are read and decoded; for a GPU pinned, as a loader gives them."""

    item_bytes = 0

    def __init__(self, batches: Any, device: torch.device) -> None:
        made = [batches[number] for number in range(4)]
        if device.type == "cuda":
            made = [host._replace(views=tuple(view.pin_memory() for view in host.views)) for host in made]
        self.made = made

    def __getitem__(self, number: int) -> HostBatch:
        return self.made[number % len(self.made)]


def now(device: torch.device) -> float:
    """Seconds: of a CPU this process's own, which other work disturbs least; of a GPU the wall's, once it has nothing left to do."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def looping(recipe: Recipe, steps: int, block: int = 1, paced: Recipe | None = None) -> dict[str, Any]:
    """Of a step in `train`, at the cadence of the recipe, what is not the bare step, and what goes on in between.

    Both learn from the same batches in memory, so that reading and decoding, which belong to the loader's processes, are
    in neither. The bare step is forward, backward, norm, clipping, AdamW and zero_grad. Lines, looks for collapse and
    progress are in the loop's figure; one save (the copy, for which training waits) and one online score are timed alone.

    Args:
        block: steps of the loop, and as many bare ones, that take turns. Between two blocks a GPU is waited for: within them it
            may lag behind the host, as in a run, and what the host does meanwhile costs nothing.
        paced: the recipe whose cadence of saves and scores counts, if not this one.
    """
    accelerator, cadence = join(recipe), paced or recipe
    device = accelerator.device
    parts = assemble(recipe, device)
    source, place = Resident(parts.batches(), device), parts.placer(device)
    backward = Averaged(parts.objective, accelerator)
    trained = [parameter for parameter in parts.objective.parameters() if parameter.requires_grad]

    def bare(step: int) -> None:
        backward([sent(source[step], device)], place)
        update(parts, step, trained, gradient_norm(trained))
        parts.optimizer.zero_grad()

    turns: list[tuple[float, float]] = []  # begin and end of the bare steps; those of the loop lie between two turns

    def tick(point: str, step: int | None = None) -> None:
        if (
            point == "learn" and step is not None and (step - 1) % block == 0
        ):  # in turn, so that both see the same machine
            begun = now(device)
            for number in range(step - 1, step - 1 + block):
                bare(number % steps)
            turns.append((begun, now(device)))

    with (
        patch.object(Parts, "batches", lambda *_: source),
        patch("selfsight.train.faultpoint", tick),
        patch("selfsight.train.loader_workers", lambda _: 0),
    ):
        train(parts, accelerator)
    warm = turns[-(-EVERY // block) :]  # after compiling, the first save and the looks of the first steps
    alone = [end - begun for begun, end in warm]
    shares = [(after - end) / own - 1 for (_, end), (after, _), own in zip(warm, warm[1:], alone, strict=False)]
    started = now(device)
    parts.tensors(), on_the_cpu({f"{g}/{n}": t for g, m in parts.tensors().items() for n, t in m.items()})
    saved = now(device) - started
    online = watcher(recipe.eval, parts.shards)
    started = now(device)
    online.score(parts.scored, device)
    scored, step_time = now(device) - started, median(alone) / block
    return {
        "hardware": hardware_of(device),
        "pairs": len(shares),
        "steps_of_each": block,
        "bare_step_milliseconds": round(1e3 * step_time, 2),
        "loop_percent": round(100 * fmean(shares), 2),  # the mean: lines come every so many steps
        "loop_percent_error": round(100 * stdev(shares) / len(shares) ** 0.5, 2),  # of that mean
        "loop_percent_median": round(100 * median(shares), 2),
        "save_copy_milliseconds": round(1e3 * saved, 1),
        "save_percent_at_cadence": round(100 * saved / step_time / cadence.train.save_every, 3),
        "score_milliseconds": round(1e3 * scored, 1),
        "score_percent_at_cadence": round(100 * scored / step_time / cadence.eval.every, 2),
    }


def loop_of(options: argparse.Namespace) -> dict[str, Any]:
    """`looping`, of the recipe that was asked for, in a run folder that is thrown away."""
    with TemporaryDirectory() as folder:
        given: dict[str, Any] = {
            "run_dir": f"{folder}/run",
            "data.train": options.shards,
            "train.device": options.device,
        }
        given |= {"train.steps": options.loop, "train.epochs": None, "train.threads": 1}
        given |= {"train.batch_size": options.batch} if options.batch else {}
        given |= UNLABELLED if options.unlabelled else {}
        paced = load(options.recipe, given)
        # None within the loop: they are timed alone.
        given |= {"train.save_every": options.loop + 1, "train.keep_every": None, "eval.every": options.loop + 1}
        Path(folder, "run").mkdir()
        recipe = load(options.recipe, given)
        # On a GPU a block is what lies between two lines, so that each has its share of what comes every so many steps.
        block = recipe.train.log_every if options.device == "cuda" else 1
        if options.loop < (least := 1 + block * (-(-EVERY // block) + 2)):
            raise SystemExit(f"--loop: {least} steps at least, for two pairs")
        return looping(recipe, options.loop, block, paced)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", default="digits:train")
    parser.add_argument("--recipe", default="digits/mae")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, help="images in a step (default: 64; with --loop the recipe's)")
    parser.add_argument("--loop", type=int, default=0, metavar="STEPS", help="time so many steps of the loop instead")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of --loop (default: %(default)s)")
    parser.add_argument("--unlabelled", action="store_true", help="with --loop: no evaluation that wants labels")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args(words)
    if options.device == "cuda" and not (options.loop and torch.cuda.is_available()):
        parser.error("--device cuda: goes with --loop" if not options.loop else "--device cuda: torch sees no GPU")
    return options


def main() -> None:
    """Print the cost of each safeguard."""
    options = parse()
    torch.set_num_threads(1)
    if options.loop:
        print(json.dumps(loop_of(options), indent=1))
        return
    given = UNLABELLED | {"run_dir": "/nowhere", "data.train": options.shards, "train.batch_size": options.batch or 64}
    parts = assemble(load(options.recipe, given), torch.device("cpu"))
    samples = min(options.samples, len(parts.shards))
    result = reading(parts, samples, options.repeats) | stepping(parts, options.repeats)
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:40} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
