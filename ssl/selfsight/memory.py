"""What a training step keeps in memory, measured on a few images, and how many blocks must be recomputed for it to fit.

A forward pass keeps tensors for the backward pass. They are counted as autograd is given them; a block that is
recomputed (Chen et al. 2016, arXiv 1604.06174) keeps its input alone.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfsight.data.placer import Batch
from selfsight.encoder import Encoder
from selfsight.objectives.across import largest, world
from selfsight.objectives.base import Objective

FEW = 2  # images; as many more tell what each one adds
SHARE = 0.9  # of the free memory; the rest is for the libraries' workspaces and for gaps between tensors
STATE = 4  # a trained tensor, its gradient, and AdamW's two moments


class Kept(NamedTuple):
    """Bytes of a step, of one rank."""

    block: float
    """That an image keeps in each of the encoder's blocks, over all its views, and would not if that block were recomputed."""
    rest: float
    """That an image keeps beside, with every block recomputed: its views, normalised and as stored, among it."""
    fixed: float
    """That do not depend on the images: weights, gradients, moments, averages, and weights in autocast's type."""

    def needed(self, images: int, depth: int, recomputed: int) -> float:
        """At the peak, with so many images at once and so many of the encoder's `depth` blocks recomputed. One block
        more is counted: the one that is being recomputed, or whose gradients are being made."""
        return self.fixed + images * (self.rest + (depth - recomputed + 1) * self.block)


def blocks_to_recompute(free: float, kept: Kept, images: int, depth: int) -> int:
    """The fewest blocks to recompute for `images` at once in `free` bytes; all of them if that is still too much."""
    fitting = (count for count in range(depth) if kept.needed(images, depth, count) <= SHARE * free)
    return next(fitting, depth)


def measure(
    objective: Objective,
    average: nn.Module | None,
    seed: int,
    autocast: Callable[[], torch.autocast],
    waiting: int = 0,
) -> Kept:
    """What a training step of the objective keeps, from forward passes on noise. Its state is left as it was.

    On several ranks all must call it, for an objective may look at the others' images. Where channels are drawn, all of
    them are shown: that is the most a step may need.

    Args:
        waiting: batches, as workers make them, that are on the device beside the one that is computed.
    """
    encoder, depth, training = objective.encoder, recomputable(objective.encoder), objective.training
    before, buffers = encoder.checkpoint_blocks, [buffer.clone() for buffer in objective.buffers()]
    own = _storages([*objective.parameters(), *objective.buffers()])

    def kept(images: int, recomputed: int) -> int:
        encoder.checkpoint_blocks = recomputed
        batch = _noise(objective, images, seed)
        views = sum(view.nbytes for view in batch.views)  # are there all the time, whether autograd keeps them or not

        def forward() -> object:
            with autocast():
                return objective(batch)

        return views + saved_bytes(forward, own | _storages(batch.views))

    try:
        objective.train()
        none, more = kept(FEW, 0), kept(2 * FEW, 0)
        least = kept(2 * FEW, depth) - kept(FEW, depth)
    finally:
        encoder.checkpoint_blocks = before
        objective.train(training)
        objective.forget_step()
        for buffer, value in zip(objective.buffers(), buffers, strict=True):
            buffer.data.copy_(value)
    block = (more - none - least) / FEW / depth if depth else 0.0
    stored = sum(view.numel() for view in _noise(objective, 1, seed).views) * encoder.preprocessing.depth / 8
    moved = state_bytes(average) if average else 0  # a late step makes another one, before it knows whether it may
    fixed = max(0, 2 * none - more) + state_bytes(objective, average) + moved
    return Kept(block, least / FEW + waiting * stored, fixed)


def saved_bytes(forward: Callable[[], object], own: Iterable[int] = ()) -> int:
    """Bytes that a forward pass keeps for its backward pass: each storage once, without those at the addresses `own`."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = forward()  # held while it is counted: an address may not be given twice
        for address in own:
            sizes.pop(address, None)
    del made
    return sum(sizes.values())


def state_bytes(objective: nn.Module, average: nn.Module | None = None) -> int:
    """Weights, gradients and AdamW's moments of what is trained; weights and buffers of all else, the average included."""
    tensors = [*objective.parameters(), *objective.buffers()]
    tensors += [*average.parameters(), *average.buffers()] if average else []
    return sum(tensor.nbytes * (STATE if tensor.requires_grad else 1) for tensor in tensors)


def recomputable(encoder: Encoder) -> int:
    """Blocks that `Encoder.checkpoint_blocks` may count: those of a plain ViT; none of another backbone."""
    return len(encoder.blocks) if encoder.plain else 0


def agreed(count: int, device: torch.device) -> int:
    """The largest count of any rank."""
    return int(largest(torch.tensor(float(count), device=device)))


def _noise(objective: Objective, images: int, seed: int) -> Batch:
    encoder = objective.encoder
    shape, device = encoder.preprocessing.shape, next(encoder.parameters()).device
    sides = [view.size or encoder.preprocessing.image_size for view in objective.views]
    views = tuple(torch.randn(images, *shape[:-2], side, side, device=device) for side in sides)
    first = images * (dist.get_rank() if world() > 1 else 0)
    positions = torch.arange(first, first + images)
    while True:
        batch = Batch(views, positions, seed, positions)
        shown = objective.shown(batch, views[0])[1] if views else None
        if shown is None or len(shown) == encoder.config.channels:
            return batch
        seed += 1


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
