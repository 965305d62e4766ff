"""Distillation from a frozen teacher, live or stored: embeddings, patch tokens, similarities, class probabilities.

Teacher and student see the same view (Beyer et al. 2022, arXiv 2106.05237). With a stored teacher the training is the same,
its outputs come from a file: row = augmentation * samples + sample, and the augmentation is drawn by that row.
"""

from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder
from selfsight.objectives.across import gather
from selfsight.objectives.base import Loss, Objective, Setting, exact
from selfsight.objectives.configs import DistillConfig
from selfsight.objectives.teacher import Outputs, StoredTeacher, Teacher, load_teacher, refuse_planes, square


class Distill(Objective):
    """Learn what a teacher makes of an image."""

    config: DistillConfig
    uses_pixels = True

    def __init__(self, encoder: Encoder, config: DistillConfig) -> None:
        super().__init__(encoder, config)
        self.views, self.augmentations = (config.view,), config.augmentations
        # In a tuple, out of the modules' sight: a frozen teacher is not part of what is trained, saved and restored.
        self._teacher: tuple[Teacher | StoredTeacher] = (
            StoredTeacher(Path(config.stored), config)
            if config.stored
            else load_teacher(config, encoder.preprocessing),
        )
        widths, self.outside = self.teacher.widths, self.teacher.weights
        if config.embedding:
            self.project = projector(encoder.feature_width, widths["embedding"])
        if config.patches:
            refuse_planes(encoder, encoder.config.name)
            self.side = square((encoder.preprocessing.image_size // encoder.stride) ** 2, encoder.config.name)
            self.project_patches = projector(encoder.width, widths["patches"])
        if config.logits:
            self.classify = nn.Linear(encoder.feature_width, widths["classes"])

    @property
    def teacher(self) -> Teacher | StoredTeacher:
        """Who teaches."""
        return self._teacher[0]

    def forward(self, batch: Batch) -> Loss:
        """The weighted sum of the distances that the recipe asks for."""
        config, taught, feature = self.config, self.taught(batch), self.feature(batch, 0)
        terms: dict[str, Tensor] = {}
        if config.embedding:
            terms["embedding"] = distance(self.project(feature), taught["embedding"], config.distance)
        if config.patches:
            projected = self.project_patches(self.tokens(batch, 0).patches)
            terms["patches"] = distance(projected, resample(taught["patches"], self.side), config.distance)
        if config.similarity:
            terms["similarity"] = similarity_distance(gather(feature.float()), gather(taught["embedding"]))
        if config.logits:
            sparse = taught["probabilities"], taught["classes"]
            terms["logits"] = soft_cross_entropy(self.classify(feature).float(), *sparse, config.temperature)
        loss = sum((getattr(config, name) * term for name, term in terms.items()), feature.new_zeros(()))
        return Loss(loss, {name: term.detach() for name, term in terms.items()}, {"feature": feature.detach()})

    def taught(self, batch: Batch) -> Outputs:
        """The teacher's outputs for the batch's view."""
        teacher, images = self.teacher, batch.views[0]
        if isinstance(teacher, Teacher):
            return teacher(images, self.encoder.preprocessing)
        assert batch.keys is not None
        return teacher(batch.keys, images.device)

    @property
    def compares_images(self) -> bool:
        """Where similarities are learned."""
        return self.config.similarity > 0

    def check(self, setting: Setting) -> list[str]:
        """Whether the stored teacher is this run's."""
        if isinstance(self.teacher, StoredTeacher):
            self.teacher.require(origin(self.config, self.encoder, setting))
        return super().check(setting)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Distill":
        """A live teacher goes to the student's device."""
        if isinstance(self.teacher, Teacher):
            self.teacher._apply(fn)
        return super()._apply(fn, recurse)


def origin(config: DistillConfig, encoder: Encoder, setting: Setting) -> dict[str, Any]:
    """What a teacher's outputs depend on: teacher, data, augmentation."""
    made = encoder.preprocessing
    fields = config.model_dump(mode="json", include={"teacher", "augmentations", "view"})
    if config.logits:
        fields |= config.model_dump(mode="json", include={"temperature", "top_k"})
    return fields | {
        "depth": made.depth,
        "range": list(made.range) if made.range else None,
        "frames": made.frames,
        "step": made.step,
        "plain_pixels": setting.plain_pixels,
        "data": setting.data,
        "seed": setting.seed,
        "image_size": made.image_size,
        "channels": made.channels,
        "interpolation": made.interpolation,
    }


def projector(width: int, wanted: int) -> nn.Module:
    """A linear layer where the student's width is not the teacher's."""
    return nn.Identity() if width == wanted else nn.Linear(width, wanted)


def distance(ours: Tensor, theirs: Tensor, kind: str) -> Tensor:
    """Mean over vectors (..., D) of 1 - cosine, or mean squared difference."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(ours.float(), theirs, dim=-1).mean()
    return F.mse_loss(ours.float(), theirs)


def similarity_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared difference of the two matrices of cosines (N, N) between a batch's features, each of its own width."""
    ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
    with exact(ours):
        return F.mse_loss(ours @ ours.T, theirs @ theirs.T)


def soft_cross_entropy(logits: Tensor, probabilities: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with a teacher's K largest probabilities (B, K) at `classes` (B, K), times the squared temperature.

    What they lack to 1 is spread evenly over the other classes (TinyViT, Wu et al. 2022, arXiv 2207.10666, section 3.2).
    """
    logs = F.log_softmax(logits / temperature, dim=-1)
    kept = logs.gather(1, classes)
    others = logs.shape[1] - classes.shape[1]
    rest = (1 - probabilities.sum(-1)).clamp(min=0) / max(1, others)
    each = (probabilities * kept).sum(-1) + rest * (logs.sum(-1) - kept.sum(-1)) * (others > 0)
    return -each.mean() * temperature**2


def resample(patches: Tensor, side: int) -> Tensor:
    """Patch tokens (B, N, D) of a square grid on another, side x side, bilinear and antialiased: (B, side^2, D)."""
    old = isqrt(patches.shape[1])
    if old == side:
        return patches
    grid = patches.transpose(1, 2).unflatten(2, (old, old))
    return F.interpolate(grid, (side, side), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
