"""What timm's tensors are called in transformers' ViTs, in both directions."""

import re

import torch
from timm.models.eva import EvaBlock
from torch import Tensor

from selfsight.encoder import Encoder
from selfsight.errors import UsageError

Tensors = dict[str, Tensor]
_BLOCK = re.compile(r"(?:\w+\.)*layers?\.(\d+)\.(.+)")
# transformers' names in a block, of release 5 and of the files that it writes -> timm's.
_LEAVES = [
    (r"attention\.(?:attention\.)?(q)(?:_proj|uery)\.", "attn.qkv."),
    (r"attention\.(?:attention\.)?(k)(?:_proj|ey)\.", "attn.qkv."),
    (r"attention\.(?:attention\.)?(v)(?:_proj|alue)\.", "attn.qkv."),
    (r"attention\.(?:o_proj|output\.dense)\.", "attn.proj."),
    (r"(?:layernorm_before|norm1)\.", "norm1."),
    (r"(?:layernorm_after|norm2)\.", "norm2."),
    (r"(?:mlp\.fc1|mlp\.up_proj|intermediate\.dense)\.", "mlp.fc1."),
    (r"(?:mlp\.fc2|mlp\.down_proj|output\.dense)\.", "mlp.fc2."),
    (r"layer_scale([12])\.lambda1", "scale"),
]
_OUTSIDE = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?(?=weight|bias)", "patch_embed.proj."),
    (r"(?:layernorm|norm)\.(?=weight|bias)", "norm."),
]
_CONSTANT = re.compile(r"embeddings\.mask_token|pooler\.dense\.(weight|bias)")  # theirs alone


def place_of(name: str) -> tuple[str, int | None] | None:
    """What a tensor of transformers is called here, and which third of it, where queries, keys and values are one.

    None: of something that we do not have.
    """
    block = _BLOCK.fullmatch(name)
    start, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", name)
    for pattern, ours in _LEAVES if block else _OUTSIDE:
        if match := re.match(pattern, rest):
            third = "qkv".find(match[1]) if "qkv" in ours else None
            own = f"scale{match[1]}" if ours == "scale" else ours + rest[match.end() :]
            return start + own, third
    return None


def tensors_for(encoder: Encoder, wanted: Tensors) -> Tensors:
    """The encoder's tensors by the names and in the shapes of a transformers model.

    Raises:
        UsageError: one of ours without a place there, or one of theirs that we do not have.
    """
    ours, found, used = _folded(encoder), {}, set()
    for name, like in wanted.items():
        place = place_of(name)
        if place and place[0] in ours:
            used.add(place[0])
            tensor = ours[place[0]]
            found[name] = tensor if place[1] is None else tensor.chunk(3)[place[1]]
        elif name.endswith("dense.weight") and _CONSTANT.fullmatch(name):
            found[name] = torch.eye(len(like))
        elif _CONSTANT.fullmatch(name) or name.endswith(".bias"):
            found[name] = torch.zeros(like.shape)
        elif name.endswith("lambda1"):
            found[name] = torch.ones(like.shape)
        else:
            raise refusal(encoder, [f"no tensor for {name}"])
        if found[name].shape != like.shape:
            raise refusal(encoder, [f"{name} is {tuple(like.shape)} there and {tuple(found[name].shape)} here"])
    if left := sorted(set(ours) - used):
        raise refusal(encoder, [f"no place for {', '.join(left[:8])}{' and others' if left[8:] else ''}"])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def tensors_from(encoder: Encoder, theirs: Tensors) -> Tensors:
    """The inverse: timm's names for an encoder of that architecture; what only transformers has is left out."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, tensor in theirs.items():
        if _CONSTANT.fullmatch(name):
            continue
        place = place_of(name)
        parts.setdefault(place[0] if place else name, []).append(((place[1] if place else 0) or 0, tensor))
    joined = {name: torch.cat([t for _, t in sorted(part, key=lambda p: p[0])]) for name, part in parts.items()}
    wanted, gamma = encoder.backbone.state_dict(), _gamma(encoder)
    found = {re.sub(r"scale([12])$", gamma, name): tensor for name, tensor in joined.items()}
    found = {n: t for n, t in found.items() if n in wanted or not re.search(r"ls[12]\.gamma|gamma_[12]|\.bias", n)}
    return found | _unfolded_positions(encoder, found)


def _folded(encoder: Encoder) -> Tensors:
    """timm's tensors, with positions of prefix tokens where transformers has them: a class token's row, and in the registers."""
    model = encoder.backbone
    state = {
        re.sub(r"(ls([12])\.gamma|gamma_([12]))$", r"scale\2\3", n): t.cpu() for n, t in model.state_dict().items()
    }
    table = state.get("pos_embed")
    if table is not None:
        split = 0 if model.no_embed_class else encoder.prefix_tokens
        rows, state["pos_embed"] = table[:, :split], table[:, split:]
        if encoder.has_class_token:
            own = rows[:, :1] if split else torch.zeros_like(table[:, :1])
            state["pos_embed"], rows = torch.cat([own, state["pos_embed"]], dim=1), rows[:, 1:]
        if rows.shape[1] and "reg_token" in state:
            state["reg_token"] = state["reg_token"] + rows
    return state


def _unfolded_positions(encoder: Encoder, found: Tensors) -> Tensors:
    """The position table as timm has it; registers keep what was folded into them."""
    table = found.get("pos_embed")
    if table is None or table.ndim != 3:
        return {}
    start = 1 if encoder.has_class_token else 0
    rows, patches = table[:, :start], table[:, start:]
    if encoder.backbone.no_embed_class:
        return {"pos_embed": patches} | ({"cls_token": found["cls_token"] + rows} if start else {})
    zeros = table.new_zeros(1, encoder.prefix_tokens - start, table.shape[2])
    return {"pos_embed": torch.cat([rows, zeros, patches], dim=1)}


def _gamma(encoder: Encoder) -> str:
    """What timm calls a layer scale in this family."""
    return r"gamma_\1" if isinstance(encoder.blocks[0], EvaBlock) else r"ls\1.gamma"


def refusal(encoder: Encoder, why: list[str]) -> UsageError:
    """The error that names what does not fit."""
    return UsageError(
        f"export: no transformers model is exactly this {encoder.config.name}: {'; '.join(why)}; "
        "--to timm fits, and transformers' AutoModel reads it, too (with timm installed)"
    )
