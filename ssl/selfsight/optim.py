"""AdamW's parameter groups, the learning rate as a function of the step, and the running average of weights."""

from collections.abc import Sequence
from itertools import chain
from math import cos, pi

import torch
from torch import Tensor, nn

from selfsight.encoder import PLANE_TABLES, Encoder
from selfsight.errors import UsageError
from selfsight.recipe import OptimConfig
from selfsight.sharding import local

FUSED = ("cuda", "cpu", "mps", "xpu")  # devices whose AdamW torch has as one kernel


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step `step` in [0, steps): linear warmup from 0, then half a cosine to `min_lr`."""
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + cos(pi * min(1.0, done)))


def build_optimizer(objective: nn.Module, encoder: Encoder, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, grouped by weight decay and by depth; each group carries its `scale` of the rate.

    Vectors and tokens are not decayed. With layer_decay d, block i of L has scale d^(L - i), the stem d^(L + 1), and
    all that is not the encoder's (or comes after its blocks) 1, as in BEiT and MAE's fine-tuning.

    Raises:
        UsageError: layer_decay for a backbone without such blocks.
    """
    if config.layer_decay != 1.0 and not encoder.plain:
        raise UsageError(
            f"optim.layer_decay: {encoder.config.name} has no plain sequence of blocks to fall along; leave it at 1"
        )
    spared = {"pos_embed", "cls_token", "reg_token", "mask_token", *PLANE_TABLES}
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name.rpartition(".")[2] not in spared
        groups.setdefault((decayed, _scale(name, encoder, config.layer_decay)), []).append(parameter)
    described = [
        {"params": members, "weight_decay": config.weight_decay * decayed, "decayed": decayed, "scale": scale}
        for (decayed, scale), members in groups.items()
    ]
    return torch.optim.AdamW(described, lr=config.lr, betas=config.betas, **kernel([*chain(*groups.values())]))


def kernel(parameters: Sequence[Tensor]) -> dict[str, bool]:
    """AdamW as one kernel where the device has one, for whole tensors or FSDP's shards; else one for each operation."""
    return {"fused": True} if all(p.device.type in FUSED for p in parameters) else {"foreach": True}


def make_moments(optimizer: torch.optim.AdamW) -> None:
    """Give an optimizer the state that its first step would give it.

    Whether it fits is then known before, and what stays for the whole run lies apart from what comes and goes, which leaves
    fewer holes in memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counted = parameter.device if group["fused"] else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=counted),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def weight_decay_at(step: int, steps: int, config: OptimConfig) -> float:
    """Weight decay of step `step` in [0, steps): from `weight_decay` along half a cosine to `weight_decay_end`."""
    last = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    return last + (config.weight_decay - last) * 0.5 * (1 + cos(pi * step / steps))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give every group its share of the learning rate, and those that are decayed the weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = weight_decay * group["decayed"]


def _scale(name: str, encoder: Encoder, decay: float) -> float:
    prefix, depth = "encoder.backbone.", len(encoder.blocks)
    if decay == 1.0 or not name.startswith("encoder."):
        return 1.0
    part, *rest = name.removeprefix(prefix).split(".")
    if part == "blocks":
        return decay ** (depth - int(rest[0]))
    return 1.0 if part in {"norm", "fc_norm"} else decay ** (depth + 1)


@torch.no_grad()
def move_average(average: nn.Module, live: nn.Module, decay: float, took: Tensor | None = None) -> None:
    """average = decay * average + (1 - decay) * live, for all parameters and floating buffers, in place.

    Args:
        took: 1 or 0 on the device (a number without dimensions): at 0 the average stays what it is. None: 1.
    """
    theirs = [local(tensor.detach()) for tensor in live.state_dict().values() if tensor.is_floating_point()]
    ours = [local(tensor) for tensor in average.state_dict().values() if tensor.is_floating_point()]
    if took is None:
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        return
    # Chosen, so that the bits are those of the one or of the other: a weight of 0 would make 0.0 of -0.0.
    for own, moved in zip(ours, torch._foreach_lerp(ours, theirs, 1 - decay), strict=True):
        torch.where(took > 0, moved, own, out=own)
