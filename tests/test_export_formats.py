"""transformers, ONNX and torch.export: the live encoder's features, or a clear no; half precision, other sizes, the card."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from conftest import look_in_this_process
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

import selfsight as ss
from selfsight import cli
from selfsight.data.crops import resize_and_crop
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import NumericError, StorageError, UsageError
from selfsight.exports import torch_format
from selfsight.exports.card import Facts
from selfsight.exports.export import export
from selfsight.exports.resize import resized
from selfsight.exports.transformers_names import place_of
from selfsight.loading import load_encoder
from selfsight.recipe import DataConfig, EncoderConfig

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}
OWN: dict[str, Any] = {"patch": None, "width": 32, "depth": 2, "heads": 2}  # the patch is the model's


def make(data: dict[str, Any] | None = None, **fields: Any) -> Encoder:
    config = EncoderConfig(**(TINY | fields))
    encoder = build_encoder(config, preprocessing_of(DataConfig(train="x", **(data or {})), config), 3)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():  # nothing may be at a value at which a mistake does not show
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return encoder.eval()


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> None:
    look_in_this_process(monkeypatch)


@pytest.mark.slow  # below, ONNX has a process of its own, and the others are read in this one
@pytest.mark.parametrize("to", ["transformers", "onnx", "torch"])
def test_a_process_without_us_has_the_same_features(tmp_path: Path, to: str) -> None:
    encoder = make()
    assert ss.export(encoder, tmp_path / "enc", to=to) < 1e-4
    assert os.listdir(tmp_path) == ["enc"]
    assert json.loads((tmp_path / "enc" / "config.json").read_text())["selfsight"]["format"] == to


# -- transformers

FITTING: list[tuple[dict[str, Any], str]] = [
    ({}, "ViTModel"),
    ({"pool": "cls+mean", "channels": 2, "positions": "learned"}, "ViTModel"),
    ({"class_token": False}, "IJepaModel"),
    ({"registers": 3, "pool": "cls", "positions": "learned"}, "Dinov2WithRegistersModel"),
    ({"name": "vit_small_patch14_dinov2", "image_size": 28, **OWN}, "Dinov2Model"),
    ({"name": "vit_small_patch14_reg4_dinov2", "image_size": 28, "pool": "cls", **OWN}, "Dinov2WithRegistersModel"),
    ({"name": "vit_small_patch16_dinov3", "image_size": 32, "pool": "cls", **OWN}, "DINOv3ViTModel"),
    ({"pool": "head"}, "ViTModel"),
]


@pytest.mark.parametrize(("fields", "kind"), FITTING, ids=[f"{kind}-{i}" for i, (_, kind) in enumerate(FITTING)])
@torch.inference_mode()
def test_transformers_has_the_tokens_and_we_have_them_back(
    tmp_path: Path, fields: dict[str, Any], kind: str, clean_process: None
) -> None:
    encoder, folder = make(**fields), tmp_path / "enc"
    export(encoder, folder, to="transformers")
    model = AutoModel.from_pretrained(folder).eval()
    images = torch.randn(3, *encoder.preprocessing.shape)
    tokens = torch.cat(encoder(images), 1)
    found = model(images)
    assert type(model).__name__ == kind
    assert torch.allclose(found.last_hidden_state, tokens, atol=1e-4)
    if encoder.has_class_token:
        assert torch.allclose(found.pooler_output, tokens[:, 0], atol=1e-4)
    again = load_encoder(folder)
    assert again.config == encoder.config
    assert torch.allclose(again.embed(images), encoder.embed(images), atol=1e-5)


UNFIT = [
    ({"frames": 2}, "planes, or channels that are tokens"),
    ({"channels": 3, "channel_tokens": True}, "planes, or channels that are tokens"),
    ({"registers": 2, "class_token": False}, "layer scale or registers without a class token"),
    ({"name": "vit_base_patch16_clip_224", "image_size": 32, **OWN}, r"norm_pre \(LayerNorm\)"),
    ({"name": "vit_base_patch16_clip_quickgelu_224", "image_size": 32, **OWN}, "the activation QuickGELU"),
    ({"name": "swin_tiny_patch4_window7_224", "image_size": 32, "patch": None, "width": None, "depth": None, "heads": None, "init": "timm"}, "a SwinTransformer"),
    ({"name": "vit_base_patch16_siglip_224", "image_size": 32, "pool": "head", "class_token": None, **OWN}, "the pool of vit_base_patch16_siglip_224's own head"),
    ({"name": "eva02_tiny_patch14_224", "image_size": 28, **OWN}, "an MLP of another kind"),
    ({"name": "vit_relpos_small_patch16_224", "image_size": 32, **OWN}, "which is no plain ViT"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "told"), UNFIT, ids=[told for _, told in UNFIT])
def test_what_does_not_fit_is_named(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=f"no transformers model is exactly this .*{told}.*--to timm fits"):
        export(make(**fields), tmp_path / "enc", to="transformers")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("change", ["eps", "q_norm", "activation"])
def test_one_odd_block_is_enough_for_a_no(tmp_path: Path, change: str) -> None:
    encoder = make()
    if change == "eps":
        encoder.blocks[1].norm1.eps = 1e-5
    elif change == "activation":
        encoder.blocks[1].mlp.act = torch.nn.ReLU()
    else:
        encoder.blocks[1].attn.q_norm = torch.nn.LayerNorm(12)
    told = {"eps": "norms of different eps", "q_norm": "q_norm", "activation": "activation ReLU"}[change]
    with pytest.raises(UsageError, match=told):
        export(encoder, tmp_path / "enc", to="transformers")


def test_names_of_both_generations_have_one_place() -> None:
    pairs = [
        ("layers.3.attention.k_proj.bias", "encoder.layer.3.attention.attention.key.bias"),
        ("layers.0.attention.o_proj.weight", "encoder.layer.0.attention.output.dense.weight"),
        ("layers.11.mlp.fc1.weight", "encoder.layer.11.intermediate.dense.weight"),
        ("layers.11.mlp.fc2.bias", "encoder.layer.11.output.dense.bias"),
    ]
    for new, old in pairs:
        assert place_of(new) == place_of(old) != None  # noqa: E711
    assert place_of("layers.3.attention.k_proj.bias") == ("blocks.3.attn.qkv.bias", 1)
    assert place_of("layers.3.attention.v_proj.bias") == ("blocks.3.attn.qkv.bias", 2)
    assert place_of("classifier.weight") is None


@torch.inference_mode()
def test_the_image_processor_makes_our_inputs(tmp_path: Path, clean_process: None) -> None:
    encoder = make({"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.8, "interpolation": "bilinear"})
    export(encoder, tmp_path / "enc", to="transformers")
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (30, 45, 3), dtype=np.uint8))
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "enc")(picture, return_tensors="pt")["pixel_values"][0]
    made = encoder.preprocessing
    ours = torch.from_numpy(resize_and_crop(np.asarray(picture).transpose(2, 0, 1), 16, 0.8, "bilinear")) / 255
    ours = (ours - torch.tensor(made.mean)[:, None, None]) / torch.tensor(made.std)[:, None, None]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 0.03  # two levels of 255, by a deviation of 0.4: the resize rounds


def test_a_range_becomes_scale_and_mean(tmp_path: Path, clean_process: None) -> None:
    data = {"depth": 16, "range": (-1000, 2000), "mean": (0.25,), "std": (0.5,)}
    export(make(data, channels=1), tmp_path / "enc", to="transformers")
    told = json.loads((tmp_path / "enc" / "preprocessor_config.json").read_text())
    stored = torch.tensor([-1000.0, 0, 2000])
    theirs = (stored * told["rescale_factor"] - told["image_mean"][0]) / told["image_std"][0]
    assert torch.allclose(theirs, ((stored + 1000) / 3000 - 0.25) / 0.5)


def test_a_damaged_or_foreign_transformers_folder_is_refused(tmp_path: Path, clean_process: None) -> None:
    folder = tmp_path / "enc"
    export(make(), folder, to="transformers")
    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("key.weight", "k_proj.weight")))
    for wrong in ({n: t for n, t in tensors.items() if n != name}, tensors | {name: tensors[name][:, :5].contiguous()}):
        save_file(wrong, folder / "model.safetensors")
        with pytest.raises(UsageError, match=r"attn.qkv.weight|not what its config.json describes"):
            load_encoder(folder)
    save_file(tensors | {"classifier.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"unexpected: classifier.weight"):
        load_encoder(folder)


# -- ONNX and torch.export

GRAPHS: list[dict[str, Any]] = [
    {"channels": 2, "frames": 6, "tube": 2, "registers": 2, "pool": "cls+mean"},
    {"channels": 5, "channel_tokens": True},
]


def members(archive: Path, beside: Path) -> list[Path]:
    with zipfile.ZipFile(archive) as opened:
        return [Path(opened.extract(name, beside / "members")) for name in opened.namelist()]


@pytest.mark.parametrize("fields", [GRAPHS[0], pytest.param(GRAPHS[1], marks=pytest.mark.slow)])
@torch.inference_mode()
def test_a_graph_takes_any_number_of_images(
    tmp_path: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make({"mean": (0.3,) * fields.get("channels", 3), "std": (0.4,) * fields.get("channels", 3)}, **fields)
    export(encoder, tmp_path / "onnx", {"version": "9"}, to="onnx")
    look_in_this_process(monkeypatch)
    export(encoder, tmp_path / "torch", to="torch")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    module = torch.export.load(tmp_path / "torch" / "model.pt2").module()
    for count in (1, 2, 7):
        images = torch.randn(count, *encoder.preprocessing.shape)
        wanted = encoder.embed(images), encoder(images).patches
        found = [torch.from_numpy(value) for value in session.run(["features", "patches"], {"images": images.numpy()})]
        for mine, onnx_made, torch_made in zip(wanted, found, module(images), strict=True):
            assert torch.allclose(mine, onnx_made, atol=1e-4)
            assert torch.allclose(mine, torch_made, atol=1e-4)
    assert sorted(os.listdir(tmp_path / "onnx")) == ["README.md", "config.json", "manifest.json", "model.onnx"]
    for file in (tmp_path / "onnx" / "model.onnx", *members(tmp_path / "torch" / "model.pt2", tmp_path)):
        told = file.read_bytes()  # stack traces of the trace would tell the folders of this machine
        assert not [word for word in (b"/site-packages/", b"/selfsight/", b".py") if word in told], file
    graph = onnx.load(tmp_path / "onnx" / "model.onnx")
    told = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert (told["mean"], told["std"]) == ([0.3] * encoder.config.channels, [0.4] * encoder.config.channels)
    assert (told["image_size"], told["pool"], told["selfsight"]) == (16, encoder.pool, "9")
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())["selfsight"]
    assert torch_format.pickles_in(tmp_path / "torch" / "model.pt2") == []
    assert config["opset"] == next(entry.version for entry in graph.opset_import if not entry.domain)


def test_a_pt2_holds_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None) -> None:
    path, traced = tmp_path / "a.pt2", torch_format.trace(make())
    torch.export.save(traced, path)
    assert torch_format.pickles_in(path)  # what torch would write
    monkeypatch.setattr(torch_format, "pickles_in", lambda path: ["x.pt"])
    with pytest.raises(StorageError, match=r"pickles x.pt"):
        export(make(), tmp_path / "other", to="torch")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("file", ["model.onnx", "model.pt2"])
def test_a_graph_gives_no_encoder_back(tmp_path: Path, file: str) -> None:
    for name in (file, "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="is a graph, of which no encoder can be made"):
        load_encoder(tmp_path)


def test_features_of_another_function_are_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    real = torch_format.TORCH.write

    def other(encoder: Encoder, *more: Any) -> None:
        real(make(depth=1), *more)

    monkeypatch.setattr("selfsight.exports.export.FORMATS", {"torch": torch_format.TORCH._replace(write=other)})
    with pytest.raises(StorageError, match="torch's features differ"):
        export(make(), tmp_path / "enc", to="torch")
    monkeypatch.setattr(
        "selfsight.exports.export.FORMATS",
        {"torch": torch_format.TORCH._replace(write=lambda encoder, *more: real(make(width=48), *more))},
    )
    with pytest.raises(StorageError, match="another shape"):
        export(make(), tmp_path / "enc", to="torch")
    assert os.listdir(tmp_path) == []


# -- what is asked wrongly


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"to": "tensorflow"}, "no format 'tensorflow'; there are timm, transformers, onnx, torch"),
        ({"to": "onnx", "half": "fp16"}, "for timm, transformers"),
        ({"half": "fp8"}, "there are fp16, bf16"),
        ({"facts": Facts(license="my own!")}, "is no SPDX identifier"),
    ],
)
def test_wrong_options_are_told(tmp_path: Path, options: dict[str, Any], told: str, clean_process: None) -> None:
    with pytest.raises(UsageError, match=told):
        export(make(), tmp_path / "enc", **options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("to", "missing"), [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("transformers", "transformers")])  # fmt: skip
def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError, match=rf"needs {missing}: pip install 'selfsight\[export\]'"):
        export(make(), tmp_path / "enc", to=to)


# -- half precision


@pytest.mark.parametrize(("to", "half"), [("timm", "fp16"), ("timm", "bf16"), ("transformers", "bf16")])
@torch.inference_mode()
def test_half_precision_is_rounding_and_nothing_else(tmp_path: Path, to: str, half: str, clean_process: None) -> None:
    encoder, folder = make(registers=2), tmp_path / "enc"
    difference = export(encoder, folder, to=to, half=half)
    stored = load_file(folder / "model.safetensors")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["selfsight"]["dtype"] == str(dtype).removeprefix("torch.")
    again = load_encoder(folder)
    assert next(again.parameters()).dtype == torch.float32
    images = torch.randn(4, 3, 16, 16)
    ours, theirs = encoder.embed(images), again.embed(images)
    assert 0 < (ours - theirs).abs().max() < {"fp16": 0.01, "bf16": 0.08}[half] * ours.abs().max()
    assert 0 < difference < 0.08 * ours.abs().max()
    assert next(encoder.parameters()).dtype == torch.float32  # the live one is left alone


@torch.no_grad()
def test_weights_that_half_precision_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    encoder = make()
    encoder.backbone.norm.weight[3] = 1e5
    with pytest.raises(NumericError, match=r"backbone.norm.weight has 1e\+05, which fp16 cannot hold"):
        export(encoder, tmp_path / "enc", half="fp16")
    monkeypatch.setattr("selfsight.exports.export.HALF_TOLERANCE", {"bf16": 1e-6})
    with pytest.raises(NumericError, match="weights in bf16 move features by"):
        export(make(), tmp_path / "enc", half="bf16")
    assert os.listdir(tmp_path) == []


# -- other sizes


@torch.inference_mode()
def test_an_encoder_for_larger_images_is_any_size_made_permanent(tmp_path: Path, clean_process: None) -> None:
    encoder = make(positions="learned", registers=1)
    made, lines = resized(encoder, 32)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(torch.cat(made(images), 1), torch.cat(encoder(images, any_size=True), 1), atol=1e-5)
    assert lines == ("made for images of 32 pixels, trained on 16", "pos_embed: 1x18x24 resampled to 1x66x24")
    assert encoder.preprocessing.image_size == 16
    export(made, tmp_path / "enc", {"notes": list(lines)}, to="transformers")
    told = json.loads((tmp_path / "enc" / "preprocessor_config.json").read_text())
    assert (told["crop_size"], told["size"]) == ({"height": 32, "width": 32}, {"shortest_edge": 32})
    assert "pos_embed: 1x18x24 resampled to 1x66x24" in (tmp_path / "enc" / "README.md").read_text()


def test_sizes_that_do_not_fit_are_told() -> None:
    with pytest.raises(UsageError, match="18 is not a multiple of the patch of 4 pixels"):
        resized(make(), 18)
    with pytest.raises(UsageError, match=r"--image-size: encoder\.image_size"):
        resized(make(), 10**6)
    with pytest.raises(UsageError, match="--image-size 8192: describes an encoder that its weights do not fit"):
        resized(make(), 8192)


def test_rotary_positions_are_computed_anew() -> None:
    encoder = make(name="vit_small_patch16_dinov3", image_size=32, pool="cls", **OWN)
    made, lines = resized(encoder, 64)
    assert made.plane_grid == (4, 4)
    assert lines[-1] == "rotary positions computed for a grid of 4 x 4"
    assert made.embed(torch.randn(2, 3, 64, 64)).shape == (2, 32)


# -- the card


def scored(encoder: str, value: float, **more: Any) -> dict[str, Any]:
    told = {
        "encoder": encoder,
        "evaluator": "knn",
        "metric": "accuracy",
        "unit": "%",
        "value": value,
        "std": 0.5,
        "n": 3,
    }
    return told | {"test": "digits:test", "samples": 359, "protocol": f"kNN of {encoder}"} | more


def test_a_card_tells_what_is_recorded(tmp_path: Path, clean_process: None) -> None:
    recipe = {"objective": {"name": "dino"}, "data": {"train": "https://me:pw@host/a.tar?token=hunter2"}}
    facts = Facts(
        "Apache-2.0",
        (scored("pretrained", 91.26, interval=[88.0, 94.0]), scored("random-init", 20.0)),
        1.5,
        ("a note",),
    )
    provenance = {"recipe": recipe, "data": "abc123", "steps": 7, "hardware": "an abacus", "version": "0.9"}
    export(make(), tmp_path / "enc", provenance, facts=facts)
    card = (tmp_path / "enc" / "README.md").read_text()
    front = card.split("---")[1]
    assert json.loads((tmp_path / "enc" / "config.json").read_text())["pretrained_cfg"]["license"] == "Apache-2.0"
    assert "license: apache-2.0\nlibrary_name: timm\n" in front
    for line in (
        "pretrained with dino",
        "| pretrained | knn | accuracy | digits:test | 91.3% ± 0.5 | 88.0 to 94.0, n 3 |",
        "| random-init | knn | accuracy | digits:test | 20.0% ± 0.5 | n 3 |",
        "- kNN of pretrained",
        "- data: `abc123`",
        "- steps: 7",
        "- a note",
        "- device-hours: 90.0 min",
        "- hardware: an abacus",
        "by selfsight 0.9",
        "of 359 test images",
        "mean [0.485, 0.456, 0.406], divided by [0.229, 0.224, 0.225]",
    ):
        assert line in card, line
    assert "hunter2" not in card and "pw@" not in card
    assert "No licence was given" not in card and "- kNN of random-init" not in card


def test_a_card_invents_nothing(tmp_path: Path, clean_process: None) -> None:
    export(make(), tmp_path / "enc")
    card = (tmp_path / "enc" / "README.md").read_text()
    assert "license: unknown" in card and "No scores are recorded here." in card and "No licence was given" in card
    for word in ("None", "hardware", "hours", "pretrained with", "## Recipe", "steps"):
        assert word not in card, word


def test_a_card_shows_small_numbers_and_holds_odd_text(tmp_path: Path, unchecked_export: None) -> None:
    small = {"unit": "", "metric": "uniformity", "evaluator": "health"}
    facts = Facts(scores=(scored("a|b", -0.0123, **small | {"std": 0.00041}), scored("c", 50, n=1, protocol="x\n# y")))
    recipe = {"objective": {"name": "`mae`\n"}, "note": "```\n# not a title\n````"}
    export(make(), tmp_path / "enc", {"recipe": recipe, "libraries": 5, "data": "a`b\n\nc"}, facts=facts)
    card = (tmp_path / "enc" / "README.md").read_text()
    assert "| a\\|b | health | uniformity | digits:test | −0.0123 ± 0.00041 | n 3 |" in card
    assert "| c | knn | accuracy | digits:test | 50.0% |  |" in card
    assert "- x # y" in card and "- data: `a'b c`" in card and "versions" not in card
    assert "# vit_small_patch16_224, pretrained with 'mae'\n" in card or ", pretrained with 'mae'\n" in card
    fence = "`" * 5
    assert card.count(f"\n{fence}") == 2 and yaml.safe_load(card.split(f"{fence}yaml\n")[1].split(fence)[0]) == recipe


CARDS: list[tuple[str, dict[str, Any]]] = [("timm", {}), ("timm", {"pool": "cls+mean", "registers": 2}), ("transformers", {"pool": "cls+mean"}), ("onnx", {}), ("torch", {"frames": 2})]  # fmt: skip


def test_what_a_card_says_of_loading_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    monkeypatch.chdir(tmp_path)  # the code goes to other folders
    exec(code_of_cards(tmp_path, [card for card in CARDS if card[0] != "onnx"]), {})


@pytest.mark.slow
def test_what_every_card_says_of_loading_is_true_without_us(tmp_path: Path, clean_process: None) -> None:
    code = code_of_cards(tmp_path, CARDS) + '\nassert "selfsight" not in sys.modules'
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def code_of_cards(tmp_path: Path, cases: list[tuple[str, dict[str, Any]]]) -> str:
    """The code of cards, run beside them, and comparisons with the features of the encoder."""
    whole = ["import os, sys"]
    for i, (to, fields) in enumerate(cases):
        encoder, folder = make(**fields), tmp_path / str(i)
        export(encoder, folder, to=to)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        images = torch.randn(2, *encoder.preprocessing.shape)
        save_file({"images": images}, tmp_path / f"{i}.in")
        given = f'from safetensors.torch import load_file\nimages = load_file("{tmp_path}/{i}.in")["images"]\n'
        head, body = code.split("# normalised, see below\n")
        whole += [f'os.chdir("{folder}")', head, given, body]
        whole.append("features = torch.as_tensor(features).detach()")
        with torch.inference_mode():
            wanted = encoder.embed(images)
        save_file({"wanted": wanted}, tmp_path / f"{i}.out")
        whole.append(f'wanted = load_file("{tmp_path}/{i}.out")["wanted"]')
        whole.append(f"assert torch.allclose(features, wanted, atol=1e-4), ({i}, features.shape, wanted.shape)")
    return "\n".join(whole)


def test_the_command_takes_a_timm_folder_to_other_formats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_process: None
) -> None:
    export(make(), tmp_path / "enc", {"steps": 7})
    words = ["export", str(tmp_path / "enc"), str(tmp_path / "hf"), "--to", "transformers", "--image-size", "32", "--license", "MIT"]  # fmt: skip
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out == f'transformers.AutoModel.from_pretrained("{tmp_path}/hf")\n'
    assert "pos_embed: 1x17x24 resampled to 1x65x24" in err
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "license: mit" in card and "- steps: 7" in card
    for wrong in (
        ["--private"],
        ["--labels", "x"],
        ["--license", "?"],
        ["--push", "noslash"],
        ["--weights", "teacher"],
    ):
        assert cli.main(["export", str(tmp_path / "enc"), str(tmp_path / "no"), *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "no").exists()
