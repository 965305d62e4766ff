"""Masked autoencoder (He et al. 2022, arXiv 2111.06377), in the paper's order.

Two departures that change the cost and not the result: hidden patches are dropped before the patch embedding, and from the
queries of the decoder's last block on there are hidden patches only. The decoder sees visible tokens first and hidden ones
after them; attention does not care, since each carries its position. Optional: only a part of the hidden patches is
rebuilt (VideoMAE V2, arXiv 2303.16727), by a decoder without attention among hidden patches (CrossMAE, arXiv 2401.14391),
other distances, and a second target, the magnitude of the image's gradient.

Of volumes (B, C, D, S, S) the patches are tubes (Feichtenhofer et al. 2022, arXiv 2205.09113; VideoMAE, Tong et al. 2022,
arXiv 2203.12602); with channel tokens each patch is one channel's.
"""

import torch
from torch import Tensor, nn

from selfsight.data.placer import Batch
from selfsight.drop_path import Draw
from selfsight.encoder import Encoder, Tokens, take
from selfsight.errors import UsageError
from selfsight.objectives.base import Loss, Objective
from selfsight.objectives.configs import MAEConfig
from selfsight.objectives.decoder import BlockSums, decoder_blocks
from selfsight.objectives.masks import in_every_plane, random_masking, split_patches
from selfsight.objectives.pixels import gradient_magnitude, ms_ssim
from selfsight.positions import sincos

Encoded = Tokens | list[Tensor]  # for `self`, for `cross`


class MAE(Objective):
    """Rebuild hidden patches from visible ones."""

    config: MAEConfig
    uses_head = False

    def __init__(self, encoder: Encoder, config: MAEConfig) -> None:
        super().__init__(encoder, config)
        self.views, self.uses_pixels = (config.view,), config.loss == "ms-ssim"
        # What is drawn: every patch by itself, or one place for all planes.
        self.planes = encoder.planes if config.masking == "tube" else 1
        self.visible, hidden = split_patches(encoder, config.mask_ratio, self.planes)
        self.predicted, width = max(1, round(hidden * config.predict_ratio)), config.decoder_width
        if width % config.decoder_heads or width % 4:
            raise UsageError(
                f"objective.decoder_width: {width} must be a multiple of 4 and of the {config.decoder_heads} heads"
            )
        if config.decoder == "cross":
            if not encoder.absolute:
                raise UsageError(
                    f"objective.decoder: cross needs position embeddings in the encoder, and {encoder.config.name} has rotary ones alone; "
                    "use decoder self"
                )
            self.sums = BlockSums(len(encoder.blocks) + 1, config.decoder_depth)
        else:
            self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = decoder_blocks(config, encoder.width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.targets = 2 if config.edges else 1
        self.predict = nn.Linear(width, self.targets * encoder.patch_values)
        self.register_buffer("positions", sincos(width, encoder.grid, encoder.prefix_tokens), persistent=False)
        self.positions: Tensor
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in set(encoder.modules()):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, batch: Batch) -> Loss:
        """The distance over the pixels of hidden patches (equation in section 3, "Reconstruction target")."""
        images = batch.views[0]
        keep, hidden = self.mask(batch)
        predicted = self.decode(self.encode(images, keep, batch.uniform), keep, hidden).float()
        predicted, *edges = predicted.chunk(self.targets, dim=-1)
        target = self.target(images, hidden)
        loss = self.distance(predicted, target, images, hidden)
        # The floor paints the hidden patches in the mean of each image's targets; 1 - 1 / values for normalised ones.
        constant = target.mean(dim=(1, 2), keepdim=True).expand_as(target)
        terms = {"floor": self.distance(constant, target, images, hidden).detach()}
        for prediction in edges:
            slopes = self.target(gradient_magnitude(images), hidden)
            terms["edges"] = (prediction - slopes).square().mean()
            terms["floor"] += self.config.edges * (slopes.mean((1, 2), keepdim=True) - slopes).square().mean()
            loss = loss + self.config.edges * terms["edges"]
        return Loss(loss, {name: term.detach() for name, term in terms.items()})

    def mask(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Patches that the encoder sees (B, K), and those that the decoder rebuilds (B, M)."""
        places = self.encoder.patches // self.planes
        keep, hidden = random_masking(batch.uniform("mask", places), self.visible)
        hidden = hidden[:, : self.predicted]
        if self.planes == 1:
            return keep, hidden
        return in_every_plane(keep, self.planes, places), in_every_plane(hidden, self.planes, places)

    def distance(self, predicted: Tensor, target: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean squared or absolute difference of patches (B, M, C p p), or 1 - MS-SSIM of the images they make."""
        if self.config.loss == "ms-ssim":
            return 1 - ms_ssim(self.in_place(predicted, images, hidden), images, self.encoder.preprocessing)
        difference = predicted - target
        return (difference.square() if self.config.loss == "l2" else difference.abs()).mean()

    def in_place(self, predicted: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """The images with predicted patches in their places; a normalised patch gets its own mean and variance back."""
        patches = self.encoder.patchify(images)
        if self.config.normalize_patches:
            true = take(patches, hidden)
            predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        rebuilt = patches.scatter(1, hidden[..., None].expand_as(predicted), predicted)
        return self.encoder.unpatchify(rebuilt)

    def encode(self, images: Tensor, keep: Tensor, draw: Draw | None = None) -> Encoded:
        """What the decoder is given of the visible patches `keep` (B, K)."""
        if self.config.decoder == "cross":
            return self.encoder.between_blocks(images, keep, draw)
        return self.encoder(images, keep=keep, draw=draw)

    def decode(self, given: Encoded, keep: Tensor, hidden: Tensor) -> Tensor:
        """Pixels of the hidden patches (B, M, C p p) from what `encode` gave of the visible ones."""
        prefix = self.encoder.prefix_tokens
        places = self.positions[prefix:].expand(len(keep), -1, -1)
        masked = self.mask_token + take(places, hidden)
        if not isinstance(given, Tokens):
            for block, seen in zip(self.blocks, self.sums(given), strict=True):
                masked = block(masked, seen)
            return self.predict(self.norm(masked))
        tokens = given
        visible = self.embed(torch.cat([tokens.prefix, tokens.patches], dim=1))
        visible = visible + torch.cat([self.positions[:prefix].expand(len(keep), -1, -1), take(places, keep)], dim=1)
        x = torch.cat([visible, masked.to(visible.dtype)], dim=1)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.predict(self.norm(last(x, hidden.shape[1])))

    def target(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Pixels of the hidden patches (B, M, C p p), each patch normalised if the recipe says so."""
        target = take(self.encoder.patchify(images), hidden)
        if self.config.normalize_patches:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return target

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The image, what the encoder saw of it, and what the decoder made of that."""
        images, (keep, hidden) = batch.views[0], self.mask(batch)
        predicted = self.decode(self.encode(images, keep), keep, hidden).float().chunk(self.targets, dim=-1)[0]
        patches = self.encoder.patchify(images)
        seen = patches * torch.zeros_like(patches[..., :1]).scatter(1, keep[..., None], 1.0)
        return {
            "augmented view": images,
            "what the encoder sees": self.encoder.unpatchify(seen),
            "reconstruction": self.in_place(predicted, images, hidden),
        }
