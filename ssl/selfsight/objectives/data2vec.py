"""data2vec for images (Baevski et al. 2022, arXiv 2202.03555): predict what an average teacher has for masked patches.

The teacher sees the whole image, the student one with mask tokens. The target is the teacher's last block, normalised
token by token, where the paper averages the last six; squares are masked at random, where the paper masks blocks, and in
every plane of a volume, or channel of channel tokens, alike.
"""

import torch
from torch import nn
from torch.nn import functional as F

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder, take
from selfsight.errors import UsageError
from selfsight.objectives.base import EMATaught, Loss
from selfsight.objectives.configs import Data2VecConfig
from selfsight.objectives.masks import cells_of, mask_patches, mask_squares, masked_tokens


class Data2Vec(EMATaught):
    """Masked prediction in the space of features."""

    config: Data2VecConfig
    uses_head = False

    def __init__(self, encoder: Encoder, config: Data2VecConfig) -> None:
        super().__init__(encoder, config)
        if not encoder.plain:
            raise UsageError(
                f"encoder.name: {encoder.config.name} cannot mask patches one by one; choose a vit_* model"
            )
        self.views = (config.view,)
        self.side, self.masked = cells_of(encoder, config.mask_size, config.mask_ratio)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(encoder.width), std=0.02))
        self.predict = nn.Linear(encoder.width, encoder.width)

    def forward(self, batch: Batch) -> Loss:
        """Smooth L1 over masked patches (equation 2)."""
        images = batch.views[0]
        cells = mask_squares(batch.uniform("mask", self.side**2), self.side, self.masked)
        mask = mask_patches(cells, self.encoder, self.config.mask_size)
        masked = masked_tokens(cells, self.encoder, self.config.mask_size, self.masked)
        with torch.no_grad():
            target = self.teacher(images).patches.float()
            target = F.layer_norm(target, target.shape[-1:])
            wanted = take(target, masked)
        tokens = self.encoder(images, mask=mask, mask_token=self.mask_token, draw=batch.uniform)
        predicted = self.predict(take(tokens.patches, masked)).float()
        loss = F.smooth_l1_loss(predicted, wanted, beta=self.config.beta)
        floor = F.smooth_l1_loss(torch.zeros_like(wanted), wanted, beta=self.config.beta)
        return Loss(loss, {"floor": floor}, {"target": target.mean(1)})
