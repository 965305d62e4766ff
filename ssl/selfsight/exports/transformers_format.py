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

from selfsight.blocks import QuickBlock
from selfsight.encoder import Encoder
from selfsight.exports.format import Format, require_extra, shape_of
from selfsight.exports.transformers_names import Tensors, refusal, tensors_for


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
    for kind in sorted({type(b).__name__ for b in model.blocks if type(b) not in (Block, QuickBlock, EvaBlock)}):
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
        raise refusal(encoder, ["layer scale or registers without a class token"])
    if hidden % encoder.width:
        raise refusal(encoder, [f"an MLP of {hidden} for a width of {encoder.width}, which is no whole multiple"])
    own = {"mlp_ratio": hidden // encoder.width, "qkv_bias": bias}
    return ("dinov2_with_registers", own | {"num_register_tokens": registers}) if registers else ("dinov2", own)


def _require_rope_of_dinov3(encoder: Encoder, rope: Any) -> None:
    fits = type(rope) is RotaryEmbeddingDinoV3 and encoder.backbone.pos_embed is None and encoder.has_class_token
    if not fits or not rope.rotate_half or rope.normalize_coords != "separate" or rope.temperature is None:
        raise refusal(encoder, ["rotary positions that are not DINOv3's"])


def target_of(encoder: Encoder) -> Any:
    """The config of the transformers model that this encoder is.

    Raises:
        UsageError: there is none; what does not fit is named.
    """
    require_extra("transformers")
    if why := list(_misfits(encoder)):
        raise refusal(encoder, why)
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
