"""What a run remembers of its own past beside its tensors, so that a resumed one raises the same alarms."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Past:
    """Goes into a checkpoint's state.json, and is changed in place by those who watch."""

    left_out: list[int] = field(default_factory=list)
    """Steps (from 1) whose numbers were not finite."""
    flat: dict[str, int] = field(default_factory=dict)
    """By name, looks in a row at which an objective's vectors were all the same."""
    told: list[str] = field(default_factory=list)
    """Alarms that were raised; none is raised twice."""
    looks: int = 0
    """At the loss."""
    first: float = 0.0
    """The loss of untrained weights."""
    mean: float = 0.0
    """Running mean of the loss."""
    square: float = 0.0
    """Running mean of its square."""
    high: int = 0
    """Looks in a row at which it was far above."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Become what `asdict` gave; what an older release did not save stays as it is."""
        for name in asdict(self):
            setattr(self, name, saved.get(name, getattr(self, name)))
