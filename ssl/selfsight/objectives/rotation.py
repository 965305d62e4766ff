"""Rotation (Gidaris et al. 2018, arXiv 1803.07728): by which multiple of 90 degrees was the image turned?

Turning is a permutation of pixels, with no interpolation that could give the answer away. Images come with their EXIF
orientation applied. Domains without an "up" (microscopy, satellite images) give this objective nothing to learn.
"""

from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder
from selfsight.objectives.base import Loss, Objective
from selfsight.objectives.configs import RotationConfig


class Rotation(Objective):
    """Four-way classification of turned images."""

    config: RotationConfig

    def __init__(self, encoder: Encoder, config: RotationConfig) -> None:
        super().__init__(encoder, config)
        self.views = (config.view,)
        self.head = nn.Linear(encoder.feature_width, 4)

    def forward(self, batch: Batch) -> Loss:
        """Cross-entropy, and the share of right answers; chance is log 4 and a quarter."""
        turned, labels = self.turn(batch)
        shown, channels = self.shown(batch, turned)
        features = self.encoder.embed(
            shown,
            draw=lambda purpose, n: batch.uniform(purpose, n).repeat(len(turned) // len(batch.positions), 1),
            channels=channels,
        )
        logits = self.head(features).float()
        right = (logits.argmax(1) == labels).float().mean()
        return Loss(F.cross_entropy(logits, labels), {"accuracy": right, "floor": logits.new_full((), log(4))})

    def turn(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Turned images and their labels: (B, C, S, S) and (B,), or all four turns of the batch one after the other.

        Volumes (B, C, D, S, S) are turned in their planes.
        """
        images = batch.views[0]
        turns = torch.stack([images.rot90(quarters, (-2, -1)) for quarters in range(4)])
        if self.config.turns == "all":
            return turns.flatten(0, 1), torch.arange(4, device=images.device).repeat_interleave(len(images))
        labels = (4 * batch.uniform("rotation", 1)[:, 0]).long()
        return turns[labels, torch.arange(len(images), device=images.device)], labels

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The turned images."""
        return {"augmented view": batch.views[0], "turned": self.turn(batch)[0][-len(batch.positions) :]}
