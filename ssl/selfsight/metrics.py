"""metrics.jsonl, one object a line, and whatever trackers were asked for."""

import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from selfsight.errors import StorageError, UsageError

# Wall-clock fields: the only ones in which a resumed run's lines differ from an uninterrupted run's.
TIMING = ("images_per_second", "data_wait", "memory")


class MetricsLog:
    """Appends a line on the main process."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand its numbers to the trackers.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        if not self.accelerator.is_main_process:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])


def require_trackers(names: Sequence[str]) -> None:
    """Raise UsageError if a tracker is not installed; Accelerate would leave it out in silence."""
    available = set(map(str, get_available_trackers()))
    if lacking := [name for name in names if name not in available]:
        raise UsageError(f"track: {', '.join(lacking)} is not installed; pip install 'selfsight[track]'")


def start_trackers(accelerator: Accelerator, project: str, config: dict[str, Any]) -> None:
    """Hand the recipe to the trackers, as flat scalars, which is all that TensorBoard takes."""
    scalars = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flatten(config).items()}
    accelerator.init_trackers(project, config=scalars, init_kwargs={"wandb": {"dir": str(accelerator.project_dir)}})


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class Meter:
    """Images per second, share of time spent waiting for data, and peak memory, since the last line."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
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

    def read(self) -> dict[str, float]:
        """The fields of TIMING; the count begins anew."""
        spent = time.perf_counter() - self.since
        rate, wait = self.steps * self.batch_size / spent, self.waited / spent
        self.restart()
        return dict(zip(TIMING, (round(rate, 2), round(wait, 4), round(self._memory())), strict=True))

    def _memory(self) -> float:
        """Peak memory of this process so far, MiB: the GPU's where training runs on one, else resident memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB here
