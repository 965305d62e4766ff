"""What makes a step faster or smaller and is not part of the maths: a recipe's precision, compiling, recomputing."""

from functools import partial

import torch

from selfsight.compiled import compile_blocks
from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.footprint import free_memory
from selfsight.fp8 import to_float8
from selfsight.memory import SHARE, Kept, agreed, blocks_to_recompute, measure, recomputable
from selfsight.objectives.across import world
from selfsight.objectives.base import Objective, blocks_of
from selfsight.precision import ARITHMETIC, FP8_MULTIPLE, resolve
from selfsight.recipe import Recipe
from selfsight.sharding import is_sharded


def switch(recipe: Recipe, objective: Objective, average: Encoder | None, device: torch.device) -> list[str]:
    """Set the objective, on its device, to the recipe's precision, recomputing and compiling; the answer is notes.

    Raises:
        UsageError: a switch that the device does not have, or that goes with none of these blocks.
    """
    train, notes, images = recipe.train, [], recipe.train.batch_size // (recipe.train.accumulate * world())
    precision, sharded = resolve(train.precision, device), is_sharded(objective)
    if sharded and (precision == "fp8" or train.cuda_graphs):
        raise UsageError(
            "train.parallel: fsdp goes with neither precision fp8 nor cuda_graphs; leave them out, or take ddp"
        )
    if precision == "fp8":
        if images % FP8_MULTIPLE:
            raise UsageError(
                f"train.batch_size: fp8 multiplies {FP8_MULTIPLE} at a time; a rank has {images} images at once"
            )
        notes.append(f"fp8: {to_float8(blocks_of(objective))} linear layers multiply in 8 bits while they train")
        if not train.compile:
            notes.append(
                "warning: train.precision fp8 without train.compile: casts are kernels of their own, and cost more than they spare"
            )
    depth = recomputable(objective.encoder)
    if train.checkpoint_blocks == "auto" and sharded:  # a unit is gathered anew for its backward pass anyway
        objective.encoder.checkpoint_blocks = depth if device.type == "cuda" else 0
        notes += [f"recomputes all {depth} blocks, as sharded runs do"] if device.type == "cuda" else []
    elif train.checkpoint_blocks == "auto":
        if device.type == "cuda" and depth:
            bf16 = ARITHMETIC[precision][0] == "bf16"
            autocast = partial(torch.autocast, "cuda", torch.bfloat16, enabled=bf16)
            # The feeder has up to two steps' micro-batches at hand, and those of the step itself stay until its end.
            kept = measure(objective, average, recipe.seed, autocast, waiting=3 * train.accumulate)
            objective.encoder.checkpoint_blocks, told = fit(kept, free_memory(device), images, depth, device)
            notes += told
    else:
        objective.encoder.checkpoint_blocks = depth * train.checkpoint_blocks
    require_graphs(recipe, device)
    if train.cuda_graphs and objective.encoder.checkpoint_blocks:
        raise UsageError(
            "train.cuda_graphs: the step does not fit in memory without recomputing blocks; take fewer images at once"
        )
    if train.compile:
        compile_blocks(objective, blocks_of(objective), train.cuda_graphs)
    return notes


def require_graphs(recipe: Recipe, device: torch.device) -> None:
    """Raise UsageError if the recipe wants CUDA graphs and the device has none."""
    if recipe.train.cuda_graphs and device.type != "cuda":
        raise UsageError("train.cuda_graphs: are a GPU's; leave it off on a CPU")


def fit(kept: Kept, free: int, images: int, depth: int, device: torch.device) -> tuple[int, list[str]]:
    """How many blocks all ranks recompute, and what to say of it."""
    count = agreed(blocks_to_recompute(free, kept, images, depth), device)
    needed, has = kept.needed(images, depth, count) / 2**30, free / 2**30
    if needed > SHARE * has:
        return count, [
            f"warning: a step needs about {needed:,.1f} GiB with every block recomputed, and {has:,.1f} are free; raise train.accumulate"
        ]
    return count, [f"recomputes {count} of {depth} blocks: {needed:,.1f} of {has:,.1f} GiB"] if count else []
