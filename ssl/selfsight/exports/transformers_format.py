"""transformers' own models, where the architecture is exactly theirs: ViT, IJepa, DINOv2 (with registers), DINOv3.

Nothing is approximated: a stem, norm, activation or token that the target does not have is a no that names it. Two things are
folded, which changes no feature: position embeddings of class and register tokens into what the target has for them, and
an absent layer scale or bias into ones or zeros.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight.encoder import Encoder
from selfsight.errors import UsageError
from selfsight.exports.format import Format, require_extra, shape_of

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
            raise _no(encoder, [f"no tensor for {name}"])
        if found[name].shape != like.shape:
            raise _no(encoder, [f"{name} is {tuple(like.shape)} there and {tuple(found[name].shape)} here"])
    if left := sorted(set(ours) - used):
        raise _no(encoder, [f"no place for {', '.join(left[:8])}{' and others' if left[8:] else ''}"])
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


def _misfits(encoder: Encoder) -> Iterator[str]:
    """What no transformers model of these families has."""
    model = encoder.backbone
    if encoder.volumetric:
        yield "planes, or channels that are tokens"
        return
    if not encoder.plain:
        yield f"a {type(model).__name__}, which is no plain ViT"
        return
    eps = set()
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__:
            if not re.fullmatch(r"blocks\.\d+\.norm[12]|norm", name) or not isinstance(module, nn.LayerNorm):
                yield f"{name} ({type(module).__name__})"
            eps.add(getattr(module, "eps", None))
    if len(eps) > 1:
        yield f"norms of different eps ({', '.join(map(str, sorted(eps, key=str)))})"
    if not isinstance(model.norm, nn.LayerNorm):
        yield "no norm after the last block, before the pool"
    for kind in sorted({type(b).__name__ for b in model.blocks if type(b) not in (Block, EvaBlock)}):
        yield f"blocks of another kind ({kind})"
    mlps = [getattr(block, "mlp", None) for block in model.blocks]
    for kind in sorted({type(mlp).__name__ for mlp in mlps if type(mlp) is not Mlp}):
        yield f"an MLP of another kind ({kind})"
    for kind in sorted({str(mlp.act) for mlp in mlps if type(mlp) is Mlp and _activation(mlp.act) is None}):
        yield f"the activation {kind}"
    if pool_of(encoder) is None:
        yield f"the pool of {encoder.config.name}'s own head"


def pool_of(encoder: Encoder) -> str | None:
    """How to make our feature of the tokens: cls, mean or cls+mean; None if neither."""
    if encoder.pool != "head":
        return encoder.pool
    return {"token": "cls", "avg": "mean"}.get(getattr(encoder.backbone, "global_pool", ""))


def _activation(module: Any) -> str | None:
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[module.approximate]
    return None


def _family(encoder: Encoder) -> tuple[str, dict[str, Any]]:
    """transformers' model type for this encoder, with what only its config has."""
    model = encoder.backbone
    registers = encoder.prefix_tokens - int(encoder.has_class_token)
    scaled = any(re.search(r"ls1\.gamma|gamma_1", name) for name in model.state_dict())
    hidden, bias = model.blocks[0].mlp.fc1.out_features, model.blocks[0].attn.qkv.bias is not None
    rope = getattr(model, "rope", None)
    if rope is not None:
        _require_rope_of_dinov3(encoder, rope)
        biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), bias)
        of_rope = {"rope_theta": rope.temperature, "num_register_tokens": registers}
        return "dinov3_vit", {"intermediate_size": hidden, **of_rope, **biases}
    if not registers and not scaled:
        own = {"intermediate_size": hidden, "qkv_bias": bias}
        # An identity: pooler_output is the class token, and not a layer that nobody trained.
        return ("vit", own | {"pooler_act": "linear"}) if encoder.has_class_token else ("ijepa", own)
    if not encoder.has_class_token:
        raise _no(encoder, ["layer scale or registers without a class token"])
    if hidden % encoder.width:
        raise _no(encoder, [f"an MLP of {hidden} for a width of {encoder.width}, which is no whole multiple"])
    own = {"mlp_ratio": hidden // encoder.width, "qkv_bias": bias}
    return ("dinov2_with_registers", own | {"num_register_tokens": registers}) if registers else ("dinov2", own)


def _require_rope_of_dinov3(encoder: Encoder, rope: Any) -> None:
    fits = type(rope) is RotaryEmbeddingDinoV3 and encoder.backbone.pos_embed is None and encoder.has_class_token
    if not fits or not rope.rotate_half or rope.normalize_coords != "separate" or rope.temperature is None:
        raise _no(encoder, ["rotary positions that are not DINOv3's"])


def _no(encoder: Encoder, why: list[str]) -> UsageError:
    return UsageError(
        f"export: no transformers model is exactly this {encoder.config.name}: {'; '.join(why)}; "
        "--to timm fits, and transformers' AutoModel reads it, too (with timm installed)"
    )


def target_of(encoder: Encoder) -> Any:
    """The config of the transformers model that this encoder is.

    Raises:
        UsageError: there is none; what does not fit is named.
    """
    require_extra("transformers")
    if why := list(_misfits(encoder)):
        raise _no(encoder, why)
    kind, own = _family(encoder)
    from transformers import AutoConfig

    first = encoder.backbone.blocks[0]
    return AutoConfig.for_model(
        kind,
        hidden_size=encoder.width,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=first.attn.num_heads,
        hidden_act=_activation(first.mlp.act),
        layer_norm_eps=encoder.backbone.norm.eps,
        image_size=encoder.preprocessing.image_size,
        patch_size=encoder.patch,
        num_channels=encoder.config.channels,
        **own,
    )


def _require(encoder: Encoder) -> None:
    config = target_of(encoder)
    from transformers import AutoModel

    with torch.device("meta"):
        wanted = AutoModel.from_config(config).state_dict()
    tensors_for(encoder, wanted)


def _write(encoder: Encoder, folder: Path, ours: dict[str, Any], dtype: torch.dtype) -> None:
    from transformers import AutoModel
    from transformers.utils import logging

    config = target_of(encoder)
    config.selfsight = ours
    model = AutoModel.from_config(config)
    model.load_state_dict(tensors_for(encoder, model.state_dict()), strict=True)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.to(dtype).save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    (folder / "preprocessor_config.json").write_text(json.dumps(_processor(encoder), indent=2))


def _processor(encoder: Encoder) -> dict[str, Any]:
    """Our preprocessing as a ViTImageProcessor's: shorter side, central crop, range, mean and deviation."""
    made = encoder.preprocessing
    low, high = made.values
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": math.floor(made.image_size / made.crop_pct)},
        "resample": {"bilinear": 2, "bicubic": 3}[made.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": made.image_size, "width": made.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / (high - low),
        "do_normalize": True,
        "image_mean": [mean + low / (high - low) for mean in made.mean],
        "image_std": list(made.std),
    }


def _expected(encoder: Encoder, images: Tensor) -> Tensors:
    found = {"tokens": torch.cat(encoder(images), dim=1), "pooled": encoder.embed(images)}
    return found | ({"pooler_output": found["tokens"][:, 0]} if encoder.has_class_token else {})


def _pool_code(encoder: Encoder) -> str:
    start = encoder.prefix_tokens
    return {
        "cls": "tokens[:, 0]",
        "mean": f"tokens[:, {start}:].mean(1)",
        "cls+mean": f"torch.cat([tokens[:, 0], tokens[:, {start}:].mean(1)], dim=1)",
    }[pool_of(encoder) or "mean"]


def _code(encoder: Encoder) -> str:
    return (
        "from transformers import AutoModel\n\n"
        "model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()\n"
        f"tokens = model(images).last_hidden_state\nfeatures = {_pool_code(encoder)}"
    )


TRANSFORMERS = Format(
    files=("model.safetensors", "preprocessor_config.json"),
    require=_require,
    write=_write,
    clean="""
import json
from pathlib import Path
from transformers import AutoModel
model, told = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
wrong = {kind: sorted(names) for kind, names in told.items() if names}
assert not wrong, wrong
own = json.loads(Path(folder, "config.json").read_text())["selfsight"]["pool"]
start = own["prefix"]
def outputs(images):
    found = model.eval()(images)
    tokens = found.last_hidden_state
    parts = {"cls": tokens[:, 0], "mean": tokens[:, start:].mean(1)}
    pooled = {"tokens": tokens, "pooled": torch.cat([parts[part] for part in own["name"].split("+")], 1)}
    return pooled if found.pooler_output is None else pooled | {"pooler_output": found.pooler_output}
""",
    expected=_expected,
    shape=shape_of,
    code=_code,
    half=True,
)
