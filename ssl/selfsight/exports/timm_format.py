"""timm's local-dir format, which is its hub format, too; transformers reads it through its timm wrapper."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from selfsight.encoder import PLANE_TABLES, Encoder
from selfsight.exports.format import Format, write_config
from selfsight.weights import PLANES

CLEAN = """
import timm
model = timm.create_model("local-dir:" + folder, pretrained=True, num_classes=0).eval()
def outputs(images):
    tokens = model.forward_features(images)
    return {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True)}
"""
_POOLED = ("cls", "mean", "head")  # that timm has, too


def _write(encoder: Encoder, folder: Path, ours: dict[str, Any], dtype: torch.dtype) -> None:
    made = encoder.preprocessing
    mean, std = _of_plane(encoder, made.mean), _of_plane(encoder, made.std)
    data_config = {
        "input_size": (len(mean), made.image_size, made.image_size),
        "mean": mean,
        "std": std,
        "interpolation": made.interpolation,
        "crop_pct": made.crop_pct,
        "crop_mode": "center",
    }
    # Without these, timm would claim the tag and licence of the architecture's default weights.
    claims = {"pretrained_cfg": {"tag": "selfsight", "license": ours.get("license", "unknown")}, "selfsight": ours}
    save_for_hf(encoder.backbone, str(folder), model_config=claims, safe_serialization=True, data_config=data_config)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes", None)  # given twice, it breaks transformers' AutoModel
    write_config(folder, config)
    if dtype != torch.float32:
        stored = load_file(folder / "model.safetensors")
        stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    own = {name: table.detach().cpu() for name, table in encoder.named_parameters() if name in PLANE_TABLES}
    if own:
        save_file({name: table.to(dtype) for name, table in own.items()}, folder / PLANES)


def _of_plane(encoder: Encoder, values: tuple[float, ...]) -> tuple[float, ...]:
    """A value for each channel that the backbone's stem takes: of one plane of patches, as timm sees it."""
    if encoder.config.channel_tokens:
        return (sum(values) / len(values),)
    return tuple(value for value in values for _ in range(encoder.config.tube))


def _shape(encoder: Encoder) -> tuple[int, ...]:
    """Of one plane of patches."""
    size = encoder.preprocessing.image_size
    return len(_of_plane(encoder, encoder.preprocessing.mean)), size, size


def _expected(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """Of volumes and of channel tokens timm has the backbone, which takes one plane of patches."""
    if not encoder.plain or encoder.volumetric:
        found = {"tokens": encoder.backbone.forward_features(images)}
    else:
        found = {"tokens": torch.cat(encoder(images), dim=1)}
    return found | ({"pooled": encoder.embed(images)} if encoder.pool in _POOLED and not encoder.volumetric else {})


def _code(encoder: Encoder) -> str:
    if encoder.volumetric:
        return (
            "import selfsight  # timm has the backbone of one plane of patches\n\n"
            "features = selfsight.load_encoder(folder).embed(images)"
        )
    load = (
        'import timm\n\nmodel = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()\n'
        "features = model(images)"
    )
    if encoder.pool not in _POOLED:
        load = load.replace("model(images)", "model.forward_features(images)")
        prefix = encoder.prefix_tokens
        load += f"  # tokens\nfeatures = torch.cat([features[:, 0], features[:, {prefix}:].mean(1)], dim=1)"
    return load


TIMM = Format(
    files=("model.safetensors",),
    require=lambda encoder: None,
    write=_write,
    clean=CLEAN,
    expected=_expected,
    shape=_shape,
    code=_code,
    tolerance=1e-5,
    half=True,
)
