"""What every peer's step has in common."""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from works import WORKS, Training, recipe_of


@dataclass(frozen=True)
class Shape:
    """Dimensions of a ViT and, for MAE, of its decoder: those of selfsight's model for the same work."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder: dict[str, int]
    """width, depth and heads."""


def shape_of(spec: dict[str, Any]) -> Shape:
    """From the recipe's sections, and from timm where they are silent."""
    work, recipe = WORKS[spec["work"]], recipe_of(spec | {"compile": False})
    with torch.device("meta"):
        vit = timm.create_model(recipe.encoder.name)
    # Against the cross-attention decoder stands the paper's own.
    given = {} if work.objective.get("decoder") == "cross" else work.objective
    paper = {"width": 512, "depth": 8, "heads": 16}
    decoder = {name: given.get(f"decoder_{name}", own) for name, own in paper.items()}
    patch = recipe.encoder.patch or vit.patch_embed.patch_size[0]
    return Shape(
        recipe.encoder.image_size, patch, vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, decoder
    )


def images(spec: dict[str, Any], side: int) -> Tensor:
    """A batch on the device."""
    return torch.randn(spec["batch"], 3, side, side, device=spec["device"])


def spared(model: nn.Module, also: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Parameter groups in which vectors (and what is named) are not decayed, as timm's for MAE and SimMIM's are."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vectors = [p for name, p in named if p.ndim == 1 or name.endswith(".bias") or name in also]
    ids = {id(p) for p in vectors}
    return [{"params": vectors, "weight_decay": 0.0}, {"params": [p for _, p in named if id(p) not in ids]}]


def training(
    spec: dict[str, Any],
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    norm: bool = False,
    before: Callable[[], object] = lambda: None,
    compiled: Callable[[], object] | None = None,
    note: str = "",
) -> Training:
    """A plain loop's step.

    Args:
        norm: take the gradient's norm, where the peer's own loop does (by torch's foreach, which is faster than theirs).
        before: what comes before the forward pass.
        compiled: other than to compile the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    bf16 = spec["precision"] == "bf16"

    def step() -> None:
        before()
        with torch.autocast(spec["device"], torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        if norm:
            get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        optimizer.step()
        optimizer.zero_grad()

    return Training(step, sum(parameter.numel() for parameter in trained), compiled or model.compile, note)


def explicit_attention(model: nn.Module) -> None:
    """Have timm's attention multiply, take the softmax and multiply, as it did before it knew fused attention."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's
            module.fused_attn = False


@contextmanager
def standing_in(**modules: dict[str, Any]) -> Any:
    """Modules (dots as two underscores) of these attributes, where others' code imports what it does not need.

    They take the place of modules that are there, for a while; `absent.stand_in` has empty ones for what is not, for good.
    """
    made = {}
    for name, attributes in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update({"__path__": []} | attributes)
        made[module.__name__] = module
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
