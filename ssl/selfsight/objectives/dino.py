"""DINO (Caron et al. 2021, arXiv 2104.14294): the student's distribution over prototypes agrees with an average teacher's.

The teacher sees two large views, the student also small ones. Optional, as in DINOv2 (Oquab et al. 2023): Sinkhorn-Knopp
in place of centering, iBOT's loss on masked patches, and KoLeo.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.data.transfer import without_waiting
from selfsight.encoder import Encoder, Tokens, pool_tokens
from selfsight.errors import UsageError
from selfsight.objectives.across import GlobalBatchNorm, gather, largest, ranks, total
from selfsight.objectives.base import EMATaught, Loss, each_view, exact, host_uniform, mlp, packed
from selfsight.objectives.configs import DINOConfig
from selfsight.objectives.masks import mask_lowest
from selfsight.precision import apply


class DINO(EMATaught):
    """Self-distillation with prototypes."""

    config: DINOConfig
    heeds_took = True

    def __init__(self, encoder: Encoder, config: DINOConfig) -> None:
        super().__init__(encoder, config)
        self.views = (config.view, config.second_view, *[config.local_view] * config.local_views)
        local = config.local_view.size or encoder.preprocessing.image_size
        if encoder.pool == "head" or (not encoder.plain and (config.ibot or config.local_views)):
            raise UsageError(
                f"encoder.name: dino with encoder.pool {encoder.pool} on {encoder.config.name}: it needs the pool cls, mean or "
                "cls+mean, and for local views and ibot a vit_* model"
            )
        if config.local_views and local % encoder.patch:
            raise UsageError(
                f"objective.local_view.size: {local} is not a multiple of the patch of {encoder.patch} pixels"
            )
        if config.local_views and local != encoder.preprocessing.image_size and not encoder.resizable:
            raise UsageError(
                f"encoder.name: {encoder.config.name} takes no local views of another size; choose a vit_* without rope"
            )
        self.head = Head(encoder.feature_width, config)
        self.teacher_head = Head(encoder.feature_width, config)
        self.heads: list[tuple[nn.Module, nn.Module]] = [(self.teacher_head, self.head)]
        if config.ibot:
            self.mask_token = nn.Parameter(torch.zeros(encoder.width))
            self.patch_head, self.teacher_patch_head = Head(encoder.width, config), Head(encoder.width, config)
            self.heads.append((self.teacher_patch_head, self.patch_head))
        for average, live in self.heads:
            average.load_state_dict(live.state_dict())
            average.requires_grad_(False)
        self.register_buffer("center", torch.zeros(1 + bool(config.ibot), config.outputs))
        self.center: Tensor
        # Sum and number of the teacher's outputs since the last step, of images and of patches.
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def compares_images(self) -> bool:
        """Where a norm, Sinkhorn-Knopp or KoLeo looks at the batch."""
        config = self.config
        return config.head_norm or config.balance == "sinkhorn" or config.koleo > 0

    def averaged(self) -> list[tuple[nn.Module, nn.Module]]:
        """The encoder and every head."""
        return [*super().averaged(), *self.heads]

    def forward(self, batch: Batch) -> Loss:
        """Cross-entropy over all pairs of a teacher's and another student's view (equation 3), and what was added to it."""
        config, temperature = self.config, self.teacher_temperature(batch.progress)
        frozen = batch.progress < config.freeze_prototypes
        with torch.no_grad():
            taught = self.taught(batch.views[:2])
            pooled = torch.stack([feature for tokens in taught for feature in self.features(tokens, 2 // len(taught))])
            outputs = self.teacher_head(pooled)
            targets = self.balanced(outputs, temperature, 0)
        mask = torch.cat([self.mask(batch, number) for number in range(2)]) if config.ibot else None
        seen = None if mask is None else self.masked(batch, mask)
        large = self.whole_features(batch) if seen is None else self.features(seen, 2)
        features = torch.cat([large, *self.local_features(batch)])
        logits = self.head(features, frozen, config.student_temperature)
        terms = {"dino": cross_view_entropy(targets, logits)}
        if mask is not None and seen is not None:
            terms["ibot"] = self.patch_loss(taught[0].patches, seen.patches, mask, temperature, frozen)
        if config.koleo:
            terms["koleo"] = koleo(gather(features[0].float())) + koleo(gather(features[1].float()))
        weights = {"dino": 1.0, "ibot": config.ibot, "koleo": config.koleo}
        loss = sum((weights[name] * term for name, term in terms.items()), logits.new_zeros(()))
        mean = total(targets.mean((0, 1))) / ranks()
        terms |= {"teacher_entropy": entropy(targets).mean(), "teacher_mean_entropy": entropy(mean)}
        watched = {"feature": features[0].detach(), "teacher": targets[0]}
        return Loss(loss, {name: term.detach() for name, term in terms.items()}, watched)

    def taught(self, views: Sequence[Tensor]) -> list[Tokens]:
        """The teacher's tokens of the global views: of both in one pass, or of each where they have two sizes."""
        first, second = views
        return [self.teacher(images) for images in ([packed(views)] if first.shape == second.shape else views)]

    def whole_features(self, batch: Batch) -> Tensor:
        """Features (2, B, D) of the global views as they are, which the other parts of a joint may want, too."""
        self.encode_together(batch, 0, 1)
        return torch.stack([self.feature(batch, 0), self.feature(batch, 1)])

    def masked(self, batch: Batch, mask: Tensor) -> Tokens:
        """Tokens of the global views, view after view, with these patches masked (2 B, N)."""
        images = packed(batch.views[:2])
        given = without_waiting(mask, images.device)
        return self.encoder(images, mask=given, mask_token=self.mask_token, draw=each_view(batch, ("0", "1")))

    def features(self, tokens: Tokens, views: int) -> Tensor:
        """Features (V, B, D) of packed views."""
        return pool_tokens(tokens, self.encoder.pool).unflatten(0, (views, -1))

    def local_features(self, batch: Batch) -> list[Tensor]:
        """Features of all local views in one pass: (V, B, D), or nothing."""
        views = batch.views[2:]
        if not views:
            return []
        shown, channels = self.shown(batch, packed(views))
        draw = each_view(batch, [f"local {number}" for number in range(len(views))])
        return [self.features(self.encoder(shown, any_size=True, draw=draw, channels=channels), len(views))]

    def mask(self, batch: Batch, number: int) -> Tensor:
        """Which patches of a global view are masked: (B, N) bool, on the CPU; none in some of the images."""
        patches = self.encoder.patches
        least, most = self.config.mask_ratio
        chance, share = host_uniform(batch, f"mask share {number}", 2).split(1, dim=1)
        count = ((least + (most - least) * share) * patches).round().clamp(1, patches - 1)
        count = count * (chance < self.config.mask_probability)
        return mask_lowest(host_uniform(batch, f"mask {number}", patches), count)

    def patch_loss(self, taught: Tensor, seen: Tensor, mask: Tensor, temperature: float, frozen: bool) -> Tensor:
        """iBOT's cross-entropy on masked patches: mean over those of an image, then over images, masked or not.

        Args:
            taught: the teacher's patch tokens of both views (2 B, N, D).
            seen: the student's.
            mask: (2 B, N) bool, on the CPU: so the number of masked patches is known without asking the device.
        """
        index = without_waiting(mask.flatten().nonzero()[:, 0], seen.device)
        share = without_waiting((mask / mask.sum(1, keepdim=True).clamp(min=1))[mask], seen.device)
        with torch.no_grad():
            outputs = self.teacher_patch_head(taught.flatten(0, 1).index_select(0, index))
            targets = self.balanced(outputs[None], temperature, 1)[0]
        logits = self.patch_head(seen.flatten(0, 1).index_select(0, index), frozen, self.config.student_temperature)
        losses = -(targets * F.log_softmax(logits, dim=-1)).sum(-1)
        return (losses * share).sum() / len(mask)

    def balanced(self, outputs: Tensor, temperature: float, which: int) -> Tensor:
        """The teacher's distributions from its outputs (V, B, K), kept from giving one answer to all."""
        if self.config.balance == "sinkhorn":
            return sinkhorn(outputs.flatten(0, 1), temperature).view_as(outputs)
        if self.training:
            before = self.seen.get(which, (0, 0))
            count = total(outputs.new_full((), float(outputs.shape[0] * outputs.shape[1])))
            self.seen[which] = before[0] + total(outputs.sum((0, 1))), before[1] + count
        return (outputs - self.center[which]).div_(temperature).softmax(-1)

    def teacher_temperature(self, progress: float) -> float:
        """Linear warmup, then constant."""
        first, last = self.config.teacher_temperature
        return (
            last
            if progress >= self.config.teacher_warmup
            else first + (last - first) * progress / self.config.teacher_warmup
        )

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Move the teacher, and the centre by the mean of the whole step's outputs (equation 4)."""
        super().after_step(step, steps)
        for which, (outputs, count) in self.seen.items():
            moved = (1 - self.config.center_momentum) * (count > 0)  # a step may have no masked patch at all
            center = self.center[which].lerp(outputs / count.clamp(min=1), moved)
            if self.took is not None:  # chosen, not multiplied: the outputs of a step left out may be NaN
                center = torch.where(self.took > 0, center, self.center[which])
            self.center[which] = center
        self.forget_step()

    def forget_step(self) -> None:
        """Drop the teacher's outputs of the step."""
        self.seen.clear()


class Head(nn.Module):
    """From a feature (..., D) to the logits of prototypes (..., K), through a bottleneck of length 1."""

    def __init__(self, width: int, config: DINOConfig) -> None:
        super().__init__()
        self.normalize = config.normalize_prototypes
        widths = [width, *[config.head_width] * (config.head_layers - 1), config.bottleneck]
        self.mlp = mlp(widths, norm=GlobalBatchNorm if config.head_norm else None)
        self.prototypes = nn.Parameter(torch.empty(config.outputs, config.bottleneck))
        nn.init.kaiming_uniform_(self.prototypes, a=5**0.5)  # torch's own for a linear layer
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, frozen: bool = False, temperature: float = 1.0) -> Tensor:
        """Logits in float32, divided by the temperature; a norm takes the statistics of each view of (V, B, D)."""
        prototypes: Tensor = self.prototypes
        if frozen:  # a gradient of 0 and not None, for DDP waits for one
            prototypes = prototypes.detach() + 0 * prototypes
        prototypes = F.normalize(prototypes, dim=-1) if self.normalize else prototypes
        unit = F.normalize(self.mlp(x).float(), dim=-1)
        with exact(unit):
            return F.linear(unit / temperature, prototypes)


def cross_view_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Mean cross-entropy over pairs of different views: targets (T, B, K), logits (S, B, K), views in the same order.

    Targets are constants: no gradient goes to them.
    """
    with exact(logits):
        return apply(_CrossViewEntropy, targets.detach(), logits)


class _CrossViewEntropy(torch.autograd.Function):
    """Of the pair (t, s) the entropy is sum(targets[t]) logsumexp(logits[s]) - targets[t] . logits[s]: no pass writes
    anything as large as the logits before the backward, and that writes only their gradient."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, logits: Tensor) -> Tensor:
        other = 1 - torch.eye(len(targets), len(logits), device=logits.device, dtype=logits.dtype)
        mean = other / (targets.shape[1] * (other.numel() - min(other.shape)))
        # Image by image: one product of so long sums and so few results would leave most of a GPU idle.
        shared = (targets.transpose(0, 1) @ logits.permute(1, 2, 0)).sum(0)
        pairs = targets.sum(-1) @ logits.logsumexp(-1).T - shared
        ctx.save_for_backward(targets, logits, mean)
        return (pairs * mean).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        targets, logits, mean = ctx.saved_tensors
        weights = (mean * gradients[0]).T  # (S, T)
        found = logits.softmax(-1).mul_((weights @ targets.sum(-1))[..., None])
        found.flatten(1).addmm_(weights, targets.flatten(1), alpha=-1)
        return None, found


def entropy(p: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return torch.special.entr(p).sum(-1)


def sinkhorn(logits: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Sinkhorn-Knopp (SwAV, Caron et al. 2020, arXiv 2006.09882): (B, K) distributions that use all prototypes alike.

    Sums over images are those of all ranks.
    """
    logits = logits.float() / temperature
    shares = (logits - largest(logits.max() if logits.numel() else logits.new_full((), -torch.inf))).exp()
    images = total(logits.new_full((), float(len(logits)))).clamp(min=1)
    for _ in range(rounds):
        shares = shares / total(shares.sum(0)).clamp(min=1e-30) / logits.shape[1]
        shares = shares / shares.sum(1, keepdim=True) / images
    return shares * images


def koleo(features: Tensor) -> Tensor:
    """Mean of -log of the distance to the nearest other feature (N, D) on the unit sphere."""
    unit = F.normalize(features, dim=-1, eps=1e-8)
    with torch.no_grad(), exact(unit):
        near = (unit @ unit.T).fill_diagonal_(-2).argmax(1)
    return -(F.pairwise_distance(unit, unit[near], eps=1e-8) + 1e-8).log().mean()
