"""VICReg (Bardes, Ponce, LeCun 2022, arXiv 2105.04906), in the paper's order, over the global batch."""

from math import sqrt

from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.data.loader import Batch
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.objectives.across import GlobalBatchNorm, gather
from selfsight.objectives.base import Loss, Objective, Setting, exact, mlp
from selfsight.objectives.configs import VICRegConfig

FEW = 128  # images below which the paper's own ablation (batch size, appendix) has no figures


class VICReg(Objective):
    """Two views of an image agree, and no dimension is dead or repeats another."""

    config: VICRegConfig

    def __init__(self, encoder: Encoder, config: VICRegConfig) -> None:
        super().__init__(encoder, config)
        self.views = (config.view, config.second_view or config.view)
        widths = [encoder.feature_width, *[config.expander_width] * config.expander_layers]
        self.expander = mlp(widths, norm=GlobalBatchNorm, activation=nn.ReLU)

    def forward(self, batch: Batch) -> Loss:
        """invariance * s + variance * v + covariance * c (equations 1 to 6), of all ranks' images together."""
        first, second = (gather(self.expander(self.feature(batch, view)).float()) for view in (0, 1))
        if len(first) < 2:
            raise UsageError("vicreg: one image has no variance; it needs a batch of two at least")
        with exact(first):
            terms = {
                "invariance": F.mse_loss(first, second),
                "variance": (variance(first) + variance(second)) / 2,
                "covariance": covariance(first) + covariance(second),
            }
        loss = sum((getattr(self.config, name) * term for name, term in terms.items()), first.new_zeros(()))
        # One more coordinate, as long as a healthy embedding: a cloud that shrinks to a point shows as a direction, too.
        watched = F.pad(first.detach(), (0, 1), value=sqrt(first.shape[1]))
        return Loss(loss, {name: term.detach() for name, term in terms.items()}, {"embedding": watched})

    @property
    def compares_images(self) -> bool:
        """Always."""
        return True

    def check(self, setting: Setting) -> list[str]:
        """Whether the gathered batch has statistics worth the name."""
        advice = "train.accumulate does not enlarge it; more images on a GPU, more GPUs, or train.checkpoint_blocks do"
        few = f"vicreg: its statistics are those of {setting.images} images, fewer than {FEW}; {advice}"
        return super().check(setting) + ([few] if setting.images < FEW else [])


def variance(z: Tensor) -> Tensor:
    """Mean over dimensions of max(0, 1 - standard deviation) of embeddings (N, D) (equation 1, code's epsilon)."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances of embeddings (N, D), over D (equation 4).

    With fewer images than dimensions the sum of all squares is taken of the N x N Gram matrix, which has the same one.
    """
    images, width = z.shape
    z = z - z.mean(0)
    squares = (z @ z.T if images < width else z.T @ z).square().sum()
    diagonal = z.square().sum(0).square().sum()
    return (squares - diagonal) / (images - 1) ** 2 / width
