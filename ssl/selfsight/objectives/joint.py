"""A weighted sum of objectives on one encoder, as in SiT (Atito et al. 2021, arXiv 2104.03602).

Equal views are made once, and a view that several parts encode whole is encoded once.
"""

from dataclasses import replace

import torch
from torch import Tensor

from selfsight.data.placer import Batch
from selfsight.data.views import View
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.objectives.base import Loss, Objective, Setting
from selfsight.objectives.configs import JointConfig


class Joint(Objective):
    """Objectives by name, each with a weight that may change linearly over the run."""

    config: JointConfig

    def __init__(self, encoder: Encoder, config: JointConfig) -> None:
        from selfsight.objectives import build_objective

        super().__init__(encoder, config)
        self.parts = torch.nn.ModuleDict()
        self.used: dict[str, tuple[int, ...]] = {}
        views: list[View] = []
        for name, part in config.parts.items():
            if hasattr(self.parts, name):
                raise UsageError(f"objective.parts: {name}: torch uses this name; choose another")
            built = build_objective(part.objective, encoder)
            # The joint owns the encoder; a part only refers to it, or every weight would be stored once a part.
            del built._modules["encoder"]
            built.__dict__["encoder"] = encoder
            self.parts[name] = built
            self.used[name] = places(built.views, views)
        self.views = tuple(views)
        counted = [name for name, part in self.parts.items() if part.augmentations]
        if counted and counted != [next(iter(self.parts))]:  # a stored teacher has seen the first view
            raise UsageError("objective.parts: a part with augmentations must be the first, and the only one")
        self.augmentations = self.objectives[0].augmentations
        self.outside = " ".join(part.outside for part in self.objectives if part.outside)
        self.uses_pixels = any(part.uses_pixels for part in self.objectives)
        self.uses_head = any(part.uses_head for part in self.objectives)
        if type(self).after_step is Joint.after_step:  # of a subclass's own, its class says it
            idle = Objective.after_step
            self.heeds_took = all(part.heeds_took or type(part).after_step is idle for part in self.objectives)
        if len({id(part.scored) for part in self.objectives} - {id(encoder)}) > 1:
            raise UsageError("objective.parts: two of them train a teacher; only one can be scored and exported")

    @property
    def objectives(self) -> list[Objective]:
        """The parts."""
        return [part for part in self.parts.values() if isinstance(part, Objective)]

    @property
    def compares_images(self) -> bool:
        """If a part does."""
        return any(part.compares_images for part in self.objectives)

    @property
    def scored(self) -> Encoder:
        """The teacher of the part that has one, else the encoder."""
        return next((part.scored for part in self.objectives if part.scored is not self.encoder), self.encoder)

    def forward(self, batch: Batch) -> Loss:
        """The weighted sum; each part's loss and terms go by its name."""
        total: Tensor = batch.views[0].new_zeros(())
        terms: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            loss = part(self.part_of(batch, name))
            total = total + self.weight(name, batch.progress) * loss.total
            terms |= {name: loss.total.detach()} | {f"{name}/{term}": value for term, value in loss.terms.items()}
            watched |= {f"{name}/{key}": vectors for key, vectors in loss.watched.items()}
        return Loss(total, terms, watched)

    def weight(self, name: str, progress: float) -> float:
        """A part's factor when this share of the run is done."""
        weight = self.config.parts[name].weight
        first, last = weight if isinstance(weight, tuple) else (weight, weight)
        return first + (last - first) * progress

    def part_of(self, batch: Batch, name: str) -> Batch:
        """The batch with the views of one part; what one part has encoded, the others find."""
        return replace(batch, views=tuple(batch.views[place] for place in self.used[name]))

    def after_step(self, step: int, steps: int) -> None:
        """Every part's own."""
        for part in self.objectives:
            part.took = self.took
            part.after_step(step, steps)

    def forget_step(self) -> None:
        """Every part's own."""
        for part in self.objectives:
            part.forget_step()

    def check(self, setting: Setting) -> list[str]:
        """Every part's own."""
        return [line for part in self.objectives for line in part.check(setting)]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Every part's own, by its name."""
        shown: dict[str, Tensor] = {}
        for name, part in zip(self.parts, self.objectives, strict=True):
            shown |= {f"{name}: {caption}": rows for caption, rows in part.pictures(self.part_of(batch, name)).items()}
        return shown


def places(wanted: tuple[View, ...], views: list[View]) -> tuple[int, ...]:
    """Where a part's views stand among all: equal ones are shared, but two of one part stay two. Extends `views`."""
    found: list[int] = []
    for view in wanted:
        free = (i for i, other in enumerate(views) if other == view and i not in found)
        place = next(free, len(views))
        if place == len(views):
            views.append(view)
        found.append(place)
    return tuple(found)
