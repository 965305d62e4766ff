"""VICReg (Bardes, Ponce, LeCun 2022, arXiv 2105.04906), in the paper's order, over the global batch.

Of clips also temporal order verification ("Shuffle and Learn", Misra, Zitnick, Hebert 2016, arXiv 1603.08561): of three
moments, the first two are the positive pair, and all three are told apart from a triple that is out of order.
"""

from math import log, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.data.transfer import without_waiting
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.objectives.across import GlobalBatchNorm, gather
from selfsight.objectives.base import Loss, Objective, Setting, exact, host_uniform, mlp
from selfsight.objectives.configs import VICRegConfig
from selfsight.precision import apply

EPSILON = 1e-4  # below the root of the variance
FEW = 128  # images below which the paper's own ablation (batch size, appendix) has no figures


class VICReg(Objective):
    """Two views of an image agree, and no dimension is dead or repeats another."""

    config: VICRegConfig

    def __init__(self, encoder: Encoder, config: VICRegConfig) -> None:
        super().__init__(encoder, config)
        self.views = (config.view, config.second_view or config.view)
        if config.order:
            moments = enumerate((*self.views, config.view))
            self.views = tuple(view.model_copy(update={"moment": moment}) for moment, view in moments)
            self.in_order = nn.Linear(3 * encoder.feature_width, 2)
        widths = [encoder.feature_width, *[config.expander_width] * config.expander_layers]
        self.expander = mlp(widths, norm=GlobalBatchNorm, activation=nn.ReLU)

    def forward(self, batch: Batch) -> Loss:
        """invariance * s + variance * v + covariance * c (equations 1 to 6), of all ranks' images together."""
        self.encode_together(batch, *range(len(self.views)))
        features = torch.stack([self.feature(batch, view) for view in (0, 1)])
        first, second = (gather(embeddings) for embeddings in self.expander(features).float().unbind())
        if len(first) < 2:
            raise UsageError("vicreg: one image has no variance; it needs a batch of two at least")
        terms = loss_terms(first, second)
        loss = sum((getattr(self.config, name) * term for name, term in terms.items()), first.new_zeros(()))
        if self.config.order:
            terms |= self.verify_order(batch)
            loss = loss + self.config.order * terms["order"]
        # One more coordinate, as long as a healthy embedding: a cloud that shrinks to a point shows as a direction, too.
        watched = F.pad(first.detach(), (0, 1), value=sqrt(first.shape[1]))
        return Loss(loss, {name: term.detach() for name, term in terms.items()}, {"embedding": watched})

    def verify_order(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy with its floor, and the share of right answers; chance is log 2 and a half."""
        moments = torch.stack([self.feature(batch, view) for view in range(3)], dim=1)
        places, labels = (without_waiting(part, moments.device) for part in triples(host_uniform(batch, "order", 2)))
        shown = moments.gather(1, places[..., None].expand_as(moments))
        logits = self.in_order(shown.flatten(1)).float()
        right = (logits.argmax(1) == labels).float().mean()
        floor = logits.new_full((), log(2))
        return {"order": F.cross_entropy(logits, labels), "order/floor": floor, "order_accuracy": right}

    @property
    def compares_images(self) -> bool:
        """Always."""
        return True

    def check(self, setting: Setting) -> list[str]:
        """Whether the gathered batch has statistics worth the name, and clips an order.

        Raises:
            UsageError: `order` of single images.
        """
        advice = "train.accumulate does not enlarge it; more images on a GPU, more GPUs, or train.checkpoint_blocks do"
        if self.config.order and setting.clips is False:
            raise UsageError(
                "objective.order: its triples are moments of clips, and a sample here has no more frames than one view shows; "
                "pack clips (KEY.000.jpg, KEY.001.jpg, ...), or leave it at 0"
            )
        few = f"vicreg: its statistics are those of {setting.images} images, fewer than {FEW}; {advice}"
        return super().check(setting) + ([few] if setting.images < FEW else [])


def triples(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Of two uniform numbers for each clip (B, 2), the order (B, 3) in which its moments are shown, and whether it is theirs
    (B,): half are as they were, of the others the first two or the last two are swapped, so that neither direction of
    time has them in order (section 3.1: a reversed triple counts as in order)."""
    orders = torch.tensor([[1, 0, 2], [0, 2, 1], [0, 1, 2]])
    right = draws[:, 0] < 0.5
    return orders[torch.where(right, 2, (2 * draws[:, 1]).long())], right.long()


def loss_terms(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """Invariance, variance and covariance of two views' embeddings (N, D) in float32 (equations 1, 3 and 5)."""
    with exact(first):
        (variance, covariance), (other_variance, other_covariance) = spread(first), spread(second)
        return {
            "invariance": F.mse_loss(first, second),
            "variance": (variance + other_variance) / 2,
            "covariance": covariance + other_covariance,
        }


def spread(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of embeddings (N, D) the variance term, mean over dimensions of max(0, 1 - standard deviation) (equation 1, code's
    epsilon), and the covariance term, sum of squared off-diagonal covariances over D (equation 4)."""
    return apply(_Spread, z)


class _Spread(torch.autograd.Function):
    """Both terms of one centring. With fewer images than dimensions the sum of all squared covariances is taken of the
    N x N Gram matrix, which has the same one. The gradient is written out: autograd's would multiply by both factors of
    that product, which are the same, and pass over the embeddings for each term."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        images, width = z.shape
        z = z - z.mean(0)
        products = z @ z.T if images < width else z.T @ z
        squares = torch.linalg.vector_norm(z, dim=0).square() if images < width else products.diagonal().clone()
        deviation = (squares / (images - 1) + EPSILON).sqrt()
        ctx.save_for_backward(z, products, squares, deviation)
        variance = F.relu(1 - deviation).mean()
        covariance = (products.square().sum() - squares.square().sum()) / (images - 1) ** 2 / width
        return variance, covariance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        z, products, squares, deviation = ctx.saved_tensors
        (images, width), (of_variance, of_covariance) = z.shape, gradients
        by_product = of_covariance * (4 / (images - 1) ** 2 / width)
        own = (deviation < 1) * of_variance / deviation / ((images - 1) * width) + by_product * squares
        # Each image's row of it sums with the others to 0, as those of z do: the centring has nothing left to take away.
        small = products * by_product
        return (small @ z if images < width else z @ small).addcmul_(z, own, value=-1)
