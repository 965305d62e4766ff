"""Where the time of a step goes: what is done from each mark to the next, by CUDA events on a GPU and by a clock on a CPU."""

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from selfsight.speed import synchronize


class Timeline:
    """Marks in the order in which they are passed; each says what begins there.

    On a GPU a mark is an event in the stream that computes, so that nothing waits for it, and a phase lasts as long as
    that stream has to do with it or waits in it. What the host does meanwhile costs nothing and is not seen.

    Args:
        clock: seconds, for a CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.restart()

    def restart(self) -> None:
        """Forget what was marked; the next step begins here."""
        self.marks: list[tuple[str, Any]] = []
        self.ends: list[int] = []
        """Places of the marks at which a step ended and the next began."""
        synchronize(self.device)
        self.step("")

    def mark(self, phase: str) -> None:
        """From here on it is this phase."""
        self.marks.append((phase, self._now()))

    def step(self, phase: str) -> None:
        """A step is done, and what follows until the next mark is this phase of the next one."""
        self.mark(phase)
        self.ends.append(len(self.marks) - 1)

    def phases(self) -> Mapping[str, float]:
        """Seconds of each phase in all steps that are done."""
        synchronize(self.device)
        found: dict[str, float] = {}
        for (phase, begun), (_, ended) in pairwise(self.marks[: self.ends[-1] + 1]):
            found[phase] = found.get(phase, 0.0) + self._between(begun, ended)
        return found

    def steps(self) -> list[float]:
        """Seconds of each step."""
        synchronize(self.device)
        stamps = [self.marks[place][1] for place in self.ends]
        return [self._between(begun, ended) for begun, ended in pairwise(stamps)]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, begun: Any, ended: Any) -> float:
        """Seconds."""
        return begun.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - begun
