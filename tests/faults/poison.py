"""A plugin: MAE whose loss at position $POISON, or one of whose weights after $POISON_WEIGHT steps, is not finite.

With $LATE steps are taken before their verdict is heard, as on a GPU.
"""

import os
from typing import Any, Literal

import torch

from selfsight.objectives.configs import MAEConfig
from selfsight.objectives.mae import MAE


class PoisonedConfig(MAEConfig):
    """MAE's own fields."""

    name: Literal["poisoned"] = "poisoned"


class Poisoned(MAE):
    """The gradients stay finite on every rank: only the loss tells."""

    config: PoisonedConfig

    def forward(self, batch: Any) -> Any:
        loss = super().forward(batch)
        if int(os.environ.get("POISON", "-1")) in batch.positions.tolist():
            return loss._replace(total=loss.total + float("inf"))
        return loss

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        if step == int(os.environ.get("POISON_WEIGHT", "-1")):
            self.predict.bias[0] = float("nan")


if os.environ.get("LATE"):
    import selfsight.train

    selfsight.train.may_be_late = lambda *_: True

OBJECTIVES = {"poisoned": Poisoned}
POISONED = {
    "plugin": "poison",
    "objective.name": "poisoned",
    "objective.decoder_width": 16,
    "objective.decoder_depth": 1,
    "objective.decoder_heads": 2,
}
