"""What a run costs: device-hours, images, and energy where the machine measures it. Nothing is guessed."""

import os
import time
from collections.abc import Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from typing import NamedTuple

import torch

from selfsight.run_folder import read_lines

_RAPL = Path("/sys/class/powercap")
_EVERY = 1.0  # seconds from one look at a GPU's power to the next
NOT_MEASURED = "not measured"


class Energy:
    """Joules that the device of this rank has taken since the last question; NaN where nobody measures it.

    Of a GPU its own power (NVML, through `torch.cuda.power_draw`; needs nvidia-ml-py), integrated; of CPUs the packages'
    counters (RAPL), which belong to a machine and are read by its first rank alone.
    """

    def __init__(self, device: torch.device, rapl: Path = _RAPL) -> None:
        self.device = device
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        self.counters = packages(rapl) if device.type == "cpu" and first else []
        self.idle = device.type == "cpu" and not first  # its machine's first rank counts for it
        self.counted = [_read(counter) for counter in self.counters]
        self.watts = self._power() if device.type == "cuda" else nan
        self.joules, self.looked = 0.0, time.perf_counter()

    def look(self, at_once: bool = False) -> None:
        """Take note of the power; every now and then is enough."""
        now = time.perf_counter()
        if isnan(self.watts) or (now - self.looked < _EVERY and not at_once):
            return
        watts = self._power()
        self.joules += (self.watts + watts) / 2 * (now - self.looked)
        self.watts, self.looked = watts, now

    def read(self) -> float:
        """Joules since the last call."""
        if self.idle:
            return 0.0
        if self.device.type == "cuda":
            self.look(at_once=True)
            joules, self.joules = self.joules, 0.0
            return nan if isnan(self.watts) else joules
        if not self.counters:
            return nan
        try:
            counted = [_read(counter) for counter in self.counters]
            spans = [_read(counter.with_name("max_energy_range_uj")) for counter in self.counters]
            spent = [
                (now - before) % span for now, before, span in zip(counted, self.counted, spans, strict=True)
            ]  # they wrap around
        except (OSError, ValueError, ZeroDivisionError):  # they are gone, or a span of 0: then nobody measures it
            return nan
        self.counted = counted
        return sum(spent) / 1e6

    def _power(self) -> float:
        try:
            return torch.cuda.power_draw(self.device) / 1e3
        except Exception:  # noqa: BLE001 - no NVML, no permission, a driver's own errors: then nobody measures it
            return nan


def packages(rapl: Path) -> list[Path]:
    """The counters of the CPU packages that may be read, microjoules."""
    try:
        found = sorted(rapl.glob("intel-rapl:?/energy_uj"))
        for counter in found:
            _read(counter), _read(counter.with_name("max_energy_range_uj"))
    except (OSError, ValueError):
        return []
    return found


def _read(counter: Path) -> int:
    return int(counter.read_text())


class Spent(NamedTuple):
    """What a run has cost so far; NaN where it is not known."""

    hours: float = 0.0
    """Wall time of training times ranks."""
    energy: float = 0.0
    """kWh."""


NOTHING = Spent()


def spent_before(metrics: Path) -> Spent:
    """What the metrics.jsonl of a run that is to go on says of its cost, work that was lost to a crash included."""
    if not (lines := read_lines(metrics)):
        return NOTHING
    last = lines[-1]  # of a file that somebody else wrote
    known = [last.get(name) for name in ("device_hours", "energy_kwh")]
    return Spent(*(float(value) if isinstance(value, int | float) else nan for value in known))


def cost(lines: Sequence[Mapping[str, float]], batch_size: int) -> dict[str, str]:
    """What a run's metrics say of its cost, in words."""
    last = lines[-1] if lines else {}
    hours, energy = last.get("device_hours"), last.get("energy_kwh")
    images = last.get("step", 0) * batch_size
    rates = sorted(line["images_per_second"] for line in lines if "images_per_second" in line)
    return {
        "device-hours": NOT_MEASURED if hours is None else f"{hours_text(hours)}, of all ranks and restarts",
        "images seen": f"{images:,.0f}",
        "images per second": f"{rates[len(rates) // 2]:,.0f}, the median" if rates else NOT_MEASURED,
        "energy": NOT_MEASURED if energy is None else f"{energy:.3g} kWh, of GPUs or CPU packages alone",
    }


def hours_text(hours: float) -> str:
    """Hours as a person would say them."""
    if hours * 3600 < 120:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 2 else f"{hours:,.1f} h"
