"""DINO (Caron et al. 2021, arXiv 2104.14294): the student's distribution over prototypes agrees with an average teacher's.

The teacher sees two large views, the student also small ones. Optional, as in DINOv2 (Oquab et al. 2023): Sinkhorn-Knopp
in place of centering, iBOT's loss on masked patches, and KoLeo.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, Tokens, pool_tokens
from selfsight.errors import UsageError
from selfsight.objectives.across import GlobalBatchNorm, gather, largest, ranks, total
from selfsight.objectives.base import EMATaught, Loss, exact, mlp
from selfsight.objectives.configs import DINOConfig
from selfsight.objectives.masks import mask_lowest


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
            taught = [self.teacher(view) for view in batch.views[:2]]
            outputs = torch.stack([self.teacher_head(pool_tokens(tokens, self.encoder.pool)) for tokens in taught])
            targets = self.balanced(outputs, temperature, 0)
        masks = [self.mask(batch, number) for number in range(2)] if config.ibot else [None, None]
        seen = [self.student(batch, number, mask) for number, mask in enumerate(masks)]
        features = [pool_tokens(tokens, self.encoder.pool) for tokens in seen + self.local_tokens(batch)]
        logits = torch.stack([self.head(feature, frozen) for feature in features]) / config.student_temperature
        terms = {"dino": cross_view_entropy(targets, logits)}
        if config.ibot:
            terms["ibot"] = self.patch_loss(taught, seen, masks, temperature, frozen)
        if config.koleo:
            terms["koleo"] = koleo(gather(features[0].float())) + koleo(gather(features[1].float()))
        weights = {"dino": 1.0, "ibot": config.ibot, "koleo": config.koleo}
        loss = sum((weights[name] * term for name, term in terms.items()), logits.new_zeros(()))
        mean = total(targets.mean((0, 1))) / ranks()
        terms |= {"teacher_entropy": entropy(targets).mean(), "teacher_mean_entropy": entropy(mean)}
        watched = {"feature": features[0].detach(), "teacher": targets[0]}
        return Loss(loss, {name: term.detach() for name, term in terms.items()}, watched)

    def student(self, batch: Batch, number: int, mask: Any) -> Tokens:
        """Tokens of a global view, masked or whole."""
        if mask is None:
            return self.tokens(batch, number)
        draw = lambda purpose, count: batch.uniform(f"{purpose} {number}", count)  # noqa: E731
        return self.encoder(batch.views[number], mask=mask, mask_token=self.mask_token, draw=draw)

    def local_tokens(self, batch: Batch) -> list[Tokens]:
        """Tokens of every local view, all in one pass."""
        views = batch.views[2:]
        if not views:
            return []

        def draw(purpose: str, count: int) -> Tensor:
            return torch.cat([batch.uniform(f"{purpose} local {number}", count) for number in range(len(views))])

        shown, channels = self.shown(batch, torch.cat(views))
        tokens = self.encoder(shown, any_size=True, draw=draw, channels=channels)
        return [Tokens(*parts) for parts in zip(*(part.chunk(len(views)) for part in tokens), strict=True)]

    def mask(self, batch: Batch, number: int) -> Tensor:
        """Which patches of a global view are masked: (B, N) bool; none in some of the images."""
        patches = self.encoder.patches
        least, most = self.config.mask_ratio
        chance, share = batch.uniform(f"mask share {number}", 2).split(1, dim=1)
        count = ((least + (most - least) * share) * patches).round().clamp(1, patches - 1)
        count = count * (chance < self.config.mask_probability)
        return mask_lowest(batch.uniform(f"mask {number}", patches), count)

    def patch_loss(
        self, taught: list[Tokens], seen: list[Tokens], masks: list[Any], temperature: float, frozen: bool
    ) -> Tensor:
        """iBOT's cross-entropy on masked patches: mean over those of an image, then over images, masked or not."""
        mask = torch.cat(masks)
        with torch.no_grad():
            outputs = self.teacher_patch_head(torch.cat([tokens.patches for tokens in taught])[mask])
            targets = self.balanced(outputs[None], temperature, 1)[0]
        logits = self.patch_head(torch.cat([tokens.patches for tokens in seen])[mask], frozen)
        losses = -(targets * F.log_softmax(logits / self.config.student_temperature, dim=-1)).sum(-1)
        share = (mask / mask.sum(1, keepdim=True).clamp(min=1))[mask]
        return (losses * share).sum() / len(mask)

    def balanced(self, outputs: Tensor, temperature: float, which: int) -> Tensor:
        """The teacher's distributions from its outputs (V, B, K), kept from giving one answer to all."""
        if self.config.balance == "sinkhorn":
            return sinkhorn(outputs.flatten(0, 1), temperature).view_as(outputs)
        if self.training:
            before = self.seen.get(which, (0, 0))
            count = total(outputs.new_full((), float(outputs.shape[0] * outputs.shape[1])))
            self.seen[which] = before[0] + total(outputs.sum((0, 1))), before[1] + count
        return F.softmax((outputs - self.center[which]) / temperature, dim=-1)

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

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Logits in float32."""
        prototypes: Tensor = self.prototypes
        if frozen:  # a gradient of 0 and not None, for DDP waits for one
            prototypes = prototypes.detach() + 0 * prototypes
        prototypes = F.normalize(prototypes, dim=-1) if self.normalize else prototypes
        unit = F.normalize(self.mlp(x).float(), dim=-1)
        with exact(unit):
            return F.linear(unit, prototypes)


def cross_view_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Mean cross-entropy over pairs of different views: targets (T, B, K), logits (S, B, K), views in the same order."""
    with exact(logits):
        pairs = -torch.einsum("tbk,sbk->ts", targets, F.log_softmax(logits, dim=-1)) / targets.shape[1]
    other = ~torch.eye(len(targets), len(logits), dtype=torch.bool, device=logits.device)
    return (pairs * other).sum() / other.sum()


def entropy(p: Tensor) -> Tensor:
    """In nats, over the last dimension."""
    return -(p * p.clamp(min=1e-12).log()).sum(-1)


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
