"""Items that take down their maker when they are told to. A module of its own: a loader worker imports it in a moment."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from selfsight.data.loader import READING
from selfsight.errors import DataError

SAMPLES = 3  # of an item


class Item(NamedTuple):
    number: int
    samples: list[int]
    pid: int
    pixels: torch.Tensor


def crash() -> None:
    ctypes.string_at(0)


def hang() -> None:
    time.sleep(1000)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise DataError("x.tar: the shard is gone")


@dataclass(frozen=True)
class Source:
    """Item n has the samples 3n .. 3n + 2; a sample left out is shown as -1."""

    folder: Path
    faults: Mapping[int, Callable[[], None]] = field(default_factory=dict)
    """What a sample does to whoever decodes it."""
    times: int = 10**9
    """How often a sample does so; then it is as good as any."""
    condemned: Mapping[int, str] = field(default_factory=dict)
    report: Callable[[int], None] | None = None
    item_bytes: int = 4096
    reading: bool = False
    """Whether faults come while the bytes are read."""

    def without(self, condemned: Mapping[int, str]) -> "Source":
        return replace(self, condemned={**self.condemned, **condemned})

    def watched(self, report: Callable[[int], None]) -> "Source":
        return replace(self, report=report)

    def __getitem__(self, number: int) -> Item:
        made = [self._sample(sample) for sample in range(SAMPLES * number, SAMPLES * (number + 1))]
        return Item(number, made, os.getpid(), torch.full((1024,), float(number)))

    def _sample(self, sample: int) -> int:
        if sample in self.condemned:
            return -1
        if self.report:
            self.report(READING if self.reading else sample)
        if sample in self.faults:
            with (self.folder / str(sample)).open("a") as file:
                file.write(f"{os.getpid()}\n")
            if len((self.folder / str(sample)).read_text().split()) <= self.times:
                self.faults[sample]()
        return sample


def pids(folder: Path) -> set[int]:
    """Every process that met a fault."""
    return {int(pid) for file in folder.iterdir() for pid in file.read_text().split()}


def alive(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
