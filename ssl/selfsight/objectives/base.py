"""What an objective is: a batch in, a loss and its named terms out. It knows nothing of ranks, logs or checkpoints."""

from typing import NamedTuple

from torch import Tensor, nn

from selfsight.data.loader import Batch
from selfsight.data.views import View
from selfsight.encoder import Encoder
from selfsight.objectives.configs import ObjectiveConfig


class Loss(NamedTuple):
    """A scalar to minimise, and scalars to look at."""

    total: Tensor
    terms: dict[str, Tensor]
    """Parts of the total and what to compare it with, detached. A term named `floor` is drawn under the loss curve: what
    a predictor that has learned nothing would score."""


class Objective(nn.Module):
    """A pretext task around one encoder."""

    views: tuple[View, ...]
    """One augmentation for each view of an image that `forward` wants."""

    def __init__(self, encoder: Encoder, config: ObjectiveConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config

    def forward(self, batch: Batch) -> Loss:
        """The loss of one batch."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def after_step(self, step: int, steps: int) -> None:
        """What happens when `step` of `steps` optimizer steps are done (a teacher moves, for example)."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Normalised images (B, C, S, S) by caption that show a person what the task is and how well it goes."""
        return {f"view {i + 1}": view for i, view in enumerate(batch.views)}
