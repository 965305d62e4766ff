"""metrics.jsonl, one object a line, and whatever trackers were asked for."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from selfsight import console
from selfsight.cost import NOTHING, Energy, Spent
from selfsight.errors import UsageError
from selfsight.faults import faultpoint

# Wall-clock fields: the only ones in which a resumed run's lines differ from an uninterrupted run's.
TIMING = ("images_per_second", "data_wait", "memory", "device_hours", "energy_kwh", "slowest_rank", "slowest_wait")
BEHIND = 0.25  # share of a step by which one rank must wait longer than the others to be named


class MetricsLog:
    """Appends a line on the main process. What cannot be written is said once and counted; training goes on."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator
        self.lost = {"line": 0, "trackers": 0}

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand its numbers to the trackers. Values that are not finite are left out."""
        if not self.accelerator.is_main_process:
            return
        line = {key: value for key, value in line.items() if isfinite(value)}
        try:
            faultpoint("metrics", line["step"])
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._lose("line", f"{self.path}: cannot be written ({error.strerror})")
        try:
            self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])
        except Exception as error:  # noqa: BLE001 - a tracker's service fails in ways of its own; none is worth the run
            self._lose("trackers", f"a tracker failed ({type(error).__name__}: {error})")

    def _lose(self, what: str, told: str) -> None:
        self.lost[what] += 1
        if self.lost[what] == 1:
            console.say(f"warning: {told}; training goes on without it")


def require_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if a tracker is not installed; Accelerate would leave it out in silence."""
    available = set(map(str, get_available_trackers()))
    if lacking := [name for name in names if name not in available]:
        raise UsageError(f"track: {', '.join(lacking)} is not installed; pip install 'selfsight[track]'")


def start_trackers(accelerator: Accelerator, project: str, config: dict[str, Any]) -> None:
    """Hand the recipe to the trackers, as flat scalars, which is all that TensorBoard takes."""
    scalars = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flatten(config).items()}
    try:
        accelerator.init_trackers(project, config=scalars, init_kwargs={"wandb": {"dir": str(accelerator.project_dir)}})
    except Exception as error:  # noqa: BLE001 - as in `MetricsLog.write`
        accelerator.trackers = []
        console.say(f"warning: the trackers cannot start ({type(error).__name__}: {error}); training goes on without")


def end_trackers(accelerator: Accelerator) -> None:
    """Let the trackers send what they have, and leave the other ranks."""
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # noqa: BLE001 - as in `MetricsLog.write`
            console.say(f"warning: a tracker could not finish ({type(error).__name__}: {error})")
    accelerator.state.destroy_process_group()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class Meter:
    """Images per second, share of time spent waiting for data, and peak memory, since the last line; cost since the start.

    Args:
        before: what the run had cost before this process.
    """

    def __init__(self, batch_size: int, device: torch.device, before: Spent = NOTHING) -> None:
        self.batch_size, self.device, self.spent = batch_size, device, before
        self.energy, self.counted = Energy(device), time.perf_counter()
        self.told = False
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside (scoring, saving) out of the count."""
        stopped = time.perf_counter()
        yield
        self.since += time.perf_counter() - stopped

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    def step(self) -> None:
        """One optimizer step is done."""
        self.steps += 1
        self.energy.look()

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The fields of TIMING, and with several ranks which of them waits longest for its data; the count begins anew."""
        spent = time.perf_counter() - self.since
        rate, wait = self.steps * self.batch_size / spent, self.waited / spent
        told = [self.waited / self.steps, self.energy.read()]
        table = accelerator.gather(torch.tensor([told], device=self.device)).tolist()
        waits, joules = [row[0] for row in table], [row[1] for row in table]
        step = spent / self.steps
        self.restart()
        found = {"images_per_second": round(rate, 2), "data_wait": round(wait, 4), "memory": round(self._memory())}
        found |= self._cost(len(waits), sum(joules))
        if len(waits) == 1:
            return found
        slowest = max(range(len(waits)), key=waits.__getitem__)
        others = median(wait for rank, wait in enumerate(waits) if rank != slowest)
        if waits[slowest] - others > BEHIND * step and not self.told:
            self.told = True
            if accelerator.is_main_process:
                console.say(
                    f"warning: rank {slowest} waits {waits[slowest]:.2f} s a step for its data, the others {others:.2f} s, and all wait "
                    "for it: its disk is slow, or train.workers are too few"
                )
        return found | {"slowest_rank": slowest, "slowest_wait": round(waits[slowest], 4)}

    def _cost(self, ranks: int, joules: float) -> dict[str, float]:
        """Device-hours, pauses included, and energy, of all that the run has taken so far; NaN is not written."""
        now = time.perf_counter()
        hours, energy = self.spent.hours + ranks * (now - self.counted) / 3600, self.spent.energy + joules / 3.6e6
        self.spent, self.counted = Spent(hours, energy), now
        return {"device_hours": round(hours, 7), "energy_kwh": round(energy, 7)}

    def _memory(self) -> float:
        """Peak memory of this process so far, MiB: the GPU's where training runs on one, else resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here
