"""What an objective is: a batch in, a loss and its named terms out. It knows nothing of ranks, logs or checkpoints."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import cos, pi
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight import keyed
from selfsight.data.placer import Batch
from selfsight.data.views import View
from selfsight.drop_path import Draw
from selfsight.encoder import Encoder, Tokens
from selfsight.errors import UsageError
from selfsight.objectives.across import first_position
from selfsight.objectives.configs import EMATeacherConfig, ObjectiveConfig
from selfsight.optim import move_average
from selfsight.precision import exact as exact  # the losses' own, found here
from selfsight.stem import sample_channels


class Setting(NamedTuple):
    """What is known of a run before its first step."""

    images: int
    """What one forward pass sees, gathered over the ranks: the batch without its other micro-batches."""
    data: str
    """The id of the data."""
    seed: int
    clips: bool | None = None
    """Whether its samples have more planes than one view shows; None: not known."""
    plain_pixels: bool = True
    """Whether JPEGs are decoded in full by the workers."""


class Loss(NamedTuple):
    """A scalar to minimise, scalars to look at, and vectors to watch for collapse."""

    total: Tensor
    terms: dict[str, Tensor]
    """Parts of the total and what to compare it with, detached. A term named `floor` is drawn under the loss curve: what
    a predictor that has learned nothing would score."""
    watched: Mapping[str, Tensor] = MappingProxyType({})
    """By name, vectors (B, D) that differ from image to image while all is well, detached."""


class Objective(nn.Module):
    """A pretext task around one encoder."""

    config: ObjectiveConfig
    """Its fields; a subclass annotates it with its own type."""
    views: tuple[View, ...]
    """One augmentation for each view of an image that `forward` wants."""
    augmentations: int | None = None
    """So many augmentations of each image, one an epoch in turn; None: every epoch has its own."""

    outside: str = ""
    """A hash of what it was given from outside the recipe (a teacher's weights); a resumed run must be given the same."""
    uses_pixels: bool = False
    """Whether it turns normalised views back into pixels, with the encoder's mean and deviation."""
    uses_head: bool = True
    """Whether it may train what comes after the encoder's tokens."""
    took: Tensor | None = None
    """Set before `after_step` where only the device knows whether the optimizer took the step: 1.0 or 0.0, a number without
    dimensions. None: it did."""
    heeds_took: bool = False
    """Whether `after_step` changes nothing where `took` is 0, without waiting for the device; said by the class that
    defines `after_step`. If it does not, a run waits for the device before it calls it."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "after_step" in cls.__dict__ and "heeds_took" not in cls.__dict__:
            cls.heeds_took = False  # what its base said was of another `after_step`

    def __init__(self, encoder: Encoder, config: ObjectiveConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config
        # Views in one pass would share the statistics of a batch norm, which are those of one view.
        self.packs = not any(isinstance(module, _BatchNorm) for module in encoder.modules())

    @property
    def compares_images(self) -> bool:
        """Whether an image's loss depends on the other images of its batch."""
        return False

    def forward(self, batch: Batch) -> Loss:
        """The loss of one batch."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def after_step(self, step: int, steps: int) -> None:
        """What happens when `step` of `steps` optimizer steps are done (a teacher moves, for example)."""

    def forget_step(self) -> None:
        """Drop whatever `forward` has noted for `after_step`: this step is left out."""

    def check(self, setting: Setting) -> list[str]:
        """Look at what is known before the first step; the answer is a list of warnings.

        Raises:
            UsageError: it cannot work so.
        """
        if self.compares_images and setting.images < 2:
            raise UsageError(
                f"train.batch_size: {self.config.name} compares images with each other and would see one at a time "
                "(batch_size / accumulate); it needs two at least"
            )
        return []

    @property
    def scored(self) -> Encoder:
        """The encoder that is scored and exported: the trained one, or its teacher."""
        return self.encoder

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Normalised images (B, C, S, S), or volumes (B, C, D, S, S), by caption that show a person what the task is and how well it goes."""
        return {f"view {i + 1}": view for i, view in enumerate(batch.views)}

    def encoded(self, batch: Batch, view: int) -> tuple[Tokens, Tensor]:
        """Tokens and feature (B, D) of a view, encoded once for all objectives of a joint.

        The feature is what `Encoder.embed` gives, in training.
        """
        key = self._key(batch, view)
        if key not in batch.shared:
            self.encode_together(batch, view)
        return batch.shared[key]

    def encode_together(self, batch: Batch, *views: int) -> None:
        """Encode views for `encoded`, tokens and features: those not yet encoded that have one shape in one pass."""
        shapes: dict[object, list[int]] = {}
        for view in views:
            if self._key(batch, view) not in batch.shared:
                shapes.setdefault(batch.views[view].shape if self.packs else view, []).append(view)
        for members in shapes.values():
            numbers = [len(batch.shared) + i for i in range(len(members))]
            draw = each_view(batch, [str(number) for number in numbers])
            shown, channels = self.shown(batch, packed([batch.views[view] for view in members]))
            tokens, features = self.encoder.encode(shown, (self.encoder.pool,), draw, channels)
            parts = zip(*(part.chunk(len(members)) for part in (*tokens, features[self.encoder.pool])), strict=True)
            for view, (prefix, patches, feature) in zip(members, parts, strict=True):
                batch.shared[self._key(batch, view)] = Tokens(prefix, patches), feature

    def _key(self, batch: Batch, view: int) -> tuple[int, int]:
        return id(self.encoder), id(batch.views[view])  # both outlive the batch

    def shown(self, batch: Batch, images: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
        """The images' channels that a step embeds, and which they are: in training with `encoder.channel_sampling` a random
        choice, the same for every view and image of the micro-batch on all ranks; else all of them (None)."""
        config = self.encoder.config
        if not (self.training and config.channel_tokens and config.channel_sampling):
            return images, None
        first = first_position(batch.positions)
        draws = keyed.uniform(batch.seed, "channels", [first], 1 + config.channels)[0]
        channels = sample_channels(torch.from_numpy(draws))
        # Slices, for an index would have to be sent to the device.
        return torch.cat([images[:, channel : channel + 1] for channel in channels], dim=1), channels

    def tokens(self, batch: Batch, view: int) -> Tokens:
        """All tokens of a view."""
        return self.encoded(batch, view)[0]

    def feature(self, batch: Batch, view: int) -> Tensor:
        """The image's feature (B, D) from a view."""
        return self.encoded(batch, view)[1]


class EMATaught(Objective):
    """An objective whose teacher is a running average of its student, and is what is scored and exported."""

    config: EMATeacherConfig
    heeds_took = True

    def __init__(self, encoder: Encoder, config: EMATeacherConfig) -> None:
        super().__init__(encoder, config)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False).eval()

    @property
    def scored(self) -> Encoder:
        """The teacher."""
        return self.teacher

    def averaged(self) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs (average, live) that move together."""
        return [(self.teacher, self.encoder)]

    def train(self, mode: bool = True) -> "EMATaught":
        """The teacher never drops anything."""
        super().train(mode)
        for average, _ in self.averaged():
            average.eval()
        return self

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Move the teacher; its decay rises from `momentum` to 1 along half a cosine."""
        decay = 1 - (1 - self.config.momentum) * (cos(pi * (step - 1) / steps) + 1) / 2
        for average, live in self.averaged():
            move_average(average, live, decay, self.took)


def packed(views: Sequence[Tensor]) -> Tensor:
    """Views (B, ...) of one shape as one batch, view after view: (V B, ...)."""
    return views[0] if len(views) == 1 else torch.cat(list(views))


def each_view(batch: Batch, names: Sequence[str]) -> Draw:
    """The draws of packed views: of each those that it would have alone, by its name."""
    return lambda purpose, count: packed([batch.uniform(f"{purpose} {name}", count) for name in names])


def host_uniform(batch: Batch, purpose: str, count: int) -> Tensor:
    """`Batch.uniform` on the CPU, for what decides shapes: to ask the device for a number would be to wait for it."""
    return torch.from_numpy(keyed.uniform(batch.seed, purpose, batch.positions.numpy(), count))


def blocks_of(objective: nn.Module) -> Iterator[nn.Module]:
    """Every transformer block of an objective: those of its encoders, teachers included, and of its decoders."""
    for module in objective.modules():
        if isinstance(module, Encoder):
            yield from module.blocks
        elif isinstance(module, Objective):  # a decoder's, by the name that MAE gives them
            yield from getattr(module, "blocks", ())


def mlp(widths: list[int], norm: type[nn.Module] | None = None, activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear layers of these widths, in to out; between them a norm, if given, and an activation. A norm makes biases idle."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        if number:
            layers += [*([norm(before)] if norm else []), activation()]
        layers.append(nn.Linear(before, after, bias=norm is None))
    return nn.Sequential(*layers)
