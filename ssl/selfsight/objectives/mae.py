"""Masked autoencoder (He et al. 2022, arXiv 2111.06377), in the paper's order.

Two departures that change the cost and not the result: hidden patches are dropped before the patch embedding, and the
decoder's last norm and prediction run on hidden patches only. The decoder sees visible tokens first and hidden ones
after them; attention does not care, since each carries its position.
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight.data.loader import Batch
from selfsight.encoder import Encoder, Tokens, patchify, take, unpatchify
from selfsight.errors import UsageError
from selfsight.objectives.base import Loss, Objective
from selfsight.objectives.configs import MAEConfig
from selfsight.positions import sincos


class MAE(Objective):
    """Rebuild hidden patches from visible ones."""

    config: MAEConfig

    def __init__(self, encoder: Encoder, config: MAEConfig) -> None:
        super().__init__(encoder, config)
        self.views = (config.view,)
        patches, width = encoder.grid[0] * encoder.grid[1], config.decoder_width
        self.visible = round(patches * (1 - config.mask_ratio))
        if not 0 < self.visible < patches:
            raise UsageError(
                f"objective.mask_ratio: {config.mask_ratio} of {patches} patches leaves {self.visible} visible; "
                "at least one must be visible and one hidden"
            )
        if width % config.decoder_heads or width % 4:
            raise UsageError(
                f"objective.decoder_width: {width} must be a multiple of 4 and of the {config.decoder_heads} heads"
            )
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.Sequential(
            *[Block(width, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth)]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, encoder.patch**2 * encoder.preprocessing.channels)
        self.register_buffer("positions", sincos(width, encoder.grid, encoder.prefix_tokens), persistent=False)
        self.positions: Tensor
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in set(encoder.modules()):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Batch) -> Loss:
        """Mean squared error over the pixels of hidden patches (equation in section 3, "Reconstruction target")."""
        images = batch.views[0]
        keep, hidden = random_masking(batch.uniform("mask", self.encoder.grid[0] * self.encoder.grid[1]), self.visible)
        tokens = self.encoder(images, keep=keep, draw=batch.uniform)
        predicted = self.decode(tokens, keep, hidden)
        target = self.target(images, hidden)
        loss = (predicted.float() - target).square().mean()
        # The floor paints the hidden patches in the best single colour of each image; 1 - 1 / p^2 C for normalised ones.
        return Loss(loss, {"floor": target.var(dim=(1, 2), correction=0).mean()})

    def decode(self, tokens: Tokens, keep: Tensor, hidden: Tensor) -> Tensor:
        """Pixels of the hidden patches (B, M, C p p) from the encoder's tokens of the visible ones."""
        prefix = self.encoder.prefix_tokens
        places = self.positions[prefix:].expand(len(keep), -1, -1)
        visible = self.embed(torch.cat([tokens.prefix, tokens.patches], dim=1))
        visible = visible + torch.cat([self.positions[:prefix].expand(len(keep), -1, -1), take(places, keep)], dim=1)
        masked = self.mask_token + take(places, hidden)
        x = self.blocks(torch.cat([visible, masked.to(visible.dtype)], dim=1))
        return self.predict(self.norm(x[:, visible.shape[1] :]))

    def target(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Pixels of the hidden patches (B, M, C p p), each patch normalised if the recipe says so."""
        target = take(patchify(images, self.encoder.patch), hidden)
        if self.config.normalize_patches:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return target

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The image, what the encoder saw of it, and what the decoder made of that."""
        images, encoder = batch.views[0], self.encoder
        keep, hidden = random_masking(batch.uniform("mask", encoder.grid[0] * encoder.grid[1]), self.visible)
        predicted = self.decode(encoder(images, keep=keep), keep, hidden).float()
        patches = patchify(images, encoder.patch)
        if self.config.normalize_patches:  # the patch's own mean and variance are given back, as in the paper's figures
            true = take(patches, hidden)
            predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        index = hidden[..., None].expand_as(predicted)
        seen = patches.scatter(1, index, torch.zeros_like(predicted))
        rebuilt = patches.scatter(1, index, predicted)
        shown = {"augmented view": patches, "what the encoder sees": seen, "reconstruction": rebuilt}
        return {name: unpatchify(value, encoder.patch, encoder.grid) for name, value in shown.items()}


def random_masking(draws: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """Patches sorted by a random number each (B, N): the first `visible` are kept (B, K), the others hidden (B, N - K)."""
    order = draws.argsort(dim=1)
    return order[:, :visible], order[:, visible:]
