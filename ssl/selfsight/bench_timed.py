"""What some steps took, and what that says of others."""

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

PHASES = ("data", "transfer", "forward", "backward", "optimizer", "communication")
DATA_BOUND = 0.1  # share of a step that waits for data, above which they are what to mend
LEAST_NOISE = 0.03  # below it nobody should change a recipe
UNSTEADY = 0.1  # half the range of the rates, above which no two parts of the time may overlap


class Timed(NamedTuple):
    """What some steps of a recipe took."""

    phases: Mapping[str, float]
    """Seconds in a step of each of PHASES; together the step."""
    images: int
    """In a step, over all ranks."""
    rates: tuple[float, ...]
    """Images per second of each part of the time."""
    memory: int | None
    """Peak, bytes; None where it cannot be told."""
    steps: int
    """That were counted."""

    @property
    def images_per_second(self) -> float:
        """The median."""
        return median(self.rates)

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return self.images / self.images_per_second

    @property
    def noise(self) -> float:
        """Half the range of the rates, as a share of the median."""
        return (max(self.rates) - min(self.rates)) / 2 / self.images_per_second

    @property
    def unsteady(self) -> bool:
        """Whether it varies so much that its median says little."""
        return self.noise > UNSTEADY

    @property
    def data_bound(self) -> bool:
        """Whether data are what to mend."""
        return self.share["data"] > DATA_BOUND

    @property
    def share(self) -> dict[str, float]:
        """Of the step, by phase; together 1."""
        whole = sum(self.phases.values())
        return {name: seconds / whole for name, seconds in self.phases.items()}

    def and_again(self, later: "Timed") -> "Timed":
        """With the rates of the same steps at another time: how far the machine has drifted meanwhile is noise, too."""
        return self._replace(rates=self.rates + later.rates)

    def scaled(self, images: int) -> "Timed":
        """A step of so many images, known by one of fewer: all but what a step does once takes as many times longer."""
        factor = images / self.images
        phases = {
            name: time * (1 if name in ("optimizer", "communication") else factor) for name, time in self.phases.items()
        }
        gain = factor * sum(self.phases.values()) / sum(phases.values())
        return self._replace(phases=phases, images=images, rates=tuple(gain * rate for rate in self.rates))


def with_communication(whole: Timed, alone: Timed) -> Timed:
    """The step with what its gradients' sum costs told apart: the part of the backward pass that goes when each rank keeps
    its own. What is hidden behind the computing costs nothing."""
    summed = max(0.0, whole.phases["backward"] - alone.phases["backward"])
    return whole._replace(
        phases={**whole.phases, "backward": whole.phases["backward"] - summed, "communication": summed}
    )


def within_noise(trial: Timed, base: Timed) -> bool:
    """Whether two rates differ by no more than either of them does from one part of its time to the next; of unsteady
    ones, whether any part of one is as fast as a part of the other."""
    noise = max(LEAST_NOISE, base.noise, trial.noise)
    overlap = max(min(trial.rates), min(base.rates)) <= min(max(trial.rates), max(base.rates))
    near = abs(trial.images_per_second / base.images_per_second - 1) <= noise
    return near or (noise > UNSTEADY and overlap)
