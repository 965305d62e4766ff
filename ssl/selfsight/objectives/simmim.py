"""SimMIM (Xie et al. 2022, arXiv 2111.09886): masked squares become mask tokens, one linear layer regresses their pixels.

Of a volume the same squares are masked in every plane, of channel tokens in every channel (tubes, as in VideoMAE).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, take
from selfsight.errors import UsageError
from selfsight.objectives.base import Loss, Objective
from selfsight.objectives.configs import SimMIMConfig
from selfsight.objectives.masks import cells_of, enlarge, mask_patches, mask_squares, masked_tokens


class SimMIM(Objective):
    """Regress masked pixels; on plain and on hierarchical (Swin) backbones."""

    config: SimMIMConfig
    uses_head = False

    def __init__(self, encoder: Encoder, config: SimMIMConfig) -> None:
        super().__init__(encoder, config)
        if not (encoder.plain or encoder.hierarchical):
            raise UsageError(f"encoder.name: {encoder.config.name} cannot mask patches; choose a vit_* or swin* model")
        self.views = (config.view,)
        self.side, self.masked = cells_of(encoder, config.mask_size, config.mask_ratio)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(encoder.stem_width), std=0.02))
        self.predict = nn.Linear(encoder.width, encoder.patch_values)

    def forward(self, batch: Batch) -> Loss:
        """Mean absolute error over masked pixels (section 3.4)."""
        images, cells = batch.views[0], self.cells(batch)
        if self.config.mask_size % self.encoder.stride:
            return self.loss_of_parts(images, cells, self.rebuild(batch, cells))
        masked = masked_tokens(cells, self.encoder, self.config.mask_size, self.masked)
        wanted = take(self.encoder.patchify(images), masked)
        error = F.l1_loss(self.predict(take(self.encode(batch, cells), masked)).float(), wanted)
        return Loss(error, {"floor": (wanted - wanted.mean((1, 2), keepdim=True)).abs().mean()})

    def loss_of_parts(self, images: Tensor, cells: Tensor, rebuilt: Tensor) -> Loss:
        """The same where a token that comes out stands for masked and for visible pixels."""
        masked, each = self.pixels(images, cells), tuple(range(1, images.ndim))
        count = self.masked * self.config.mask_size**2 * images[0, ..., 0, 0].numel()  # masked values of an image
        error = (rebuilt - images).abs() * masked
        mean = (images * masked).sum(each, keepdim=True) / count
        floor = ((images - mean).abs() * masked).sum(each) / count  # one colour for all that is masked
        return Loss(error.sum() / (count * len(images)), {"floor": floor.mean()})

    def cells(self, batch: Batch) -> Tensor:
        """Which squares are masked: (B, side, side) bool."""
        return mask_squares(batch.uniform("mask", self.side**2), self.side, self.masked)

    def pixels(self, images: Tensor, cells: Tensor) -> Tensor:
        """Which pixels are masked, to go with images (B, C, S, S) or volumes (B, C, D, S, S)."""
        masked = enlarge(cells, self.config.mask_size)
        return masked.view(len(images), *[1] * (images.ndim - 3), *masked.shape[1:])

    def encode(self, batch: Batch, cells: Tensor) -> Tensor:
        """Patch tokens (B, N, D) of the masked image."""
        mask = mask_patches(cells, self.encoder, self.config.mask_size)
        return self.encoder(batch.views[0], mask=mask, mask_token=self.mask_token, draw=batch.uniform).patches

    def rebuild(self, batch: Batch, cells: Tensor) -> Tensor:
        """Predicted pixels of the whole image (B, C, S, S), or volume (B, C, D, S, S)."""
        return self.encoder.unpatchify(self.predict(self.encode(batch, cells)).float())

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The image, what is left of it, and the prediction in the masked squares."""
        images, cells = batch.views[0], self.cells(batch)
        masked = self.pixels(images, cells)
        rebuilt = torch.where(masked, self.rebuild(batch, cells), images)
        return {"augmented view": images, "what the encoder sees": images * ~masked, "reconstruction": rebuilt}
