"""Seconds from the start to the first update: of a new run, and of one resumed at 0, 50 and 99 % of an epoch.

python benchmarks/resume.py --json          about 3 minutes on 2 cores
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "faults"))

import torch
from launch import Launcher, words
from PIL import Image

from selfsight import checkpoint
from selfsight.assemble import assemble
from selfsight.data.build import write_shards
from selfsight.recipe import load

BATCH = 16


def fields(folder: Path, samples: int, workers: int) -> dict[str, Any]:
    """A small model over many samples."""
    return {
        "run_dir": str(folder / "run"),
        "data.train": str(folder / "data"),
        "train.epochs": 1,
        "train.batch_size": BATCH,
        "train.save_every": 10 * samples,
        "train.workers": workers,
        "eval.train": None,
        "eval.test": None,
    }


def seconds(launcher: Launcher, folder: Path, samples: int, workers: int, step: int | None) -> float:
    """From the start to the first update after `step` steps; None: of a new run."""
    own = fields(folder, samples, workers) | ({"run_dir": str(folder / "new")} if step is None else {})
    first = 1 if step is None else step + 1
    started = time.perf_counter()
    job = launcher.start(["pretrain", "digits/mae", *words(own)], faults=f"update kill step={first}")
    if job.wait(120) != [-9]:
        raise SystemExit(job.told())
    return time.perf_counter() - started


def main() -> None:
    """Print the medians and how far apart the repeats were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="resume-") as name:
        folder = Path(name)
        (folder / "data").mkdir()
        body = BytesIO()
        Image.new("L", (8, 8), 99).save(body, "PNG")
        write_shards(((body.getvalue(), 0) for _ in range(options.samples)), folder / "data", "many", per_shard=50_000)
        parts = assemble(load("digits/mae", fields(folder, options.samples, options.workers)), torch.device("cpu"))
        loss = parts.objective(parts.placer(torch.device("cpu"))(parts.batches()[0]))
        loss.total.backward()
        parts.optimizer.step()
        found: dict[str, list[float]] = {}
        with Launcher(folder) as launcher:
            seconds(launcher, folder, options.samples, options.workers, None)  # the first one imports and caches
            for _ in range(options.repeats):
                for share in (None, 0.0, 0.5, 0.99):
                    step = None if share is None else max(1, round(share * parts.steps))
                    if step:
                        checkpoint.save(folder / "run" / "checkpoints", step, parts.state(), parts.tensors(), keep=2)
                    label = "new" if share is None else f"resumed_at_{share:.0%}"
                    found.setdefault(label, []).append(
                        seconds(launcher, folder, options.samples, options.workers, step)
                    )
                    for run in ("run", "new"):
                        shutil.rmtree(folder / run, ignore_errors=True)
    result: dict[str, Any] = {label: round(median(times), 3) for label, times in found.items()}
    result["spread"] = round(max(max(times) - min(times) for times in found.values()), 3)
    result["most_extra"] = round(max(result[label] - result["new"] for label in found), 3)
    result["loader_state_bytes"] = len(json.dumps({"step": parts.steps}))
    print(json.dumps(result, indent=1) if options.json else "\n".join(f"{k:24} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
