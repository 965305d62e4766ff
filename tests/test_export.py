"""What is exported is what was trained, for timm and for transformers, or it is not exported."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import look_in_this_process
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from selfsight import checkpoint, cli
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import StorageError, UsageError
from selfsight.exports.export import export, timm_line, verify_export
from selfsight.exports.formats import FORMATS
from selfsight.loading import load_encoder
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.train import pretrain
from selfsight.weights import load_weights

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}


def make(data: dict[str, Any] | None = None, **fields: Any) -> Encoder:
    config = EncoderConfig(**(TINY | fields))
    return build_encoder(config, preprocessing_of(DataConfig(train="x", **(data or {})), config), 3)


@pytest.fixture
def clean_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader runs in this process, which saves the seconds of starting another; each format has one test with its own."""
    look_in_this_process(monkeypatch)


def test_a_process_without_us_has_the_same_features(tmp_path: Path) -> None:
    """The one process of its own among the default tests; test_export_formats has ONNX's."""
    export(make(), tmp_path / "enc")
    (tmp_path / "enc" / "README.md").write_text("people write on cards")
    load_encoder(tmp_path / "enc")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool": "cls"},
        {"pool": "cls+mean", "registers": 2},
        {"channels": 5},
        {"class_token": False},
        {"drop_path": 0.2},
    ],
)
@torch.inference_mode()
def test_timm_loads_it_with_the_same_features(tmp_path: Path, fields: dict[str, Any], clean_process: None) -> None:
    encoder = make(**fields)
    assert export(encoder, tmp_path / "enc", {"note": "x"}) < 1e-5
    assert sorted(os.listdir(tmp_path)) == ["enc"]
    assert sorted(os.listdir(tmp_path / "enc")) == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{tmp_path / 'enc'}", pretrained=True, num_classes=0).eval()
    images = torch.randn(3, encoder.preprocessing.channels, 16, 16)
    encoder.eval()
    assert torch.allclose(model.forward_features(images), torch.cat(encoder(images), 1), atol=1e-5)
    if encoder.pool != "cls+mean":
        assert torch.allclose(model(images), encoder.embed(images), atol=1e-5)


@torch.inference_mode()
def test_transformers_loads_it_too(tmp_path: Path, clean_process: None) -> None:
    encoder = make().eval()
    export(encoder, tmp_path / "enc", {})
    images = torch.randn(2, 3, 16, 16)
    found = AutoModel.from_pretrained(tmp_path / "enc").eval()(images)
    assert torch.allclose(found.last_hidden_state, torch.cat(encoder(images), 1), atol=1e-5)


def test_the_config_claims_only_what_is_ours(tmp_path: Path, clean_process: None) -> None:
    export(make({"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9}), tmp_path / "enc", {"steps": 7})
    config = json.loads((tmp_path / "enc" / "config.json").read_text())
    ours = config["pretrained_cfg"]
    assert (ours["mean"], ours["std"], ours["crop_pct"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 0.9)
    assert (ours["input_size"], ours["tag"], ours["license"]) == ([3, 16, 16], "selfsight", "unknown")
    assert "augreg" not in json.dumps(config)
    assert config["selfsight"]["steps"] == 7


def test_it_comes_back_as_it_was(tmp_path: Path, clean_process: None) -> None:
    encoder = make({"mean": (0.1, 0.2, 0.3), "crop_pct": 0.9}, pool="cls")
    export(encoder, tmp_path / "enc", {})
    again = load_encoder(tmp_path / "enc")
    assert (again.preprocessing, again.config, again.pool) == (encoder.preprocessing, encoder.config, "cls")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), encoder.state_dict().values(), strict=True)
    )
    assert not again.training


WRONG_INPUTS = [
    ("depth", 12, "preprocessing.depth: "),
    ("depth", "8", "preprocessing.depth: "),
    ("depth", 32, "preprocessing.range: is missing"),
    ("range", [5], "preprocessing.range"),
    ("range", [5, 5], "preprocessing.range: give two finite"),
    ("range", "05", "preprocessing.range"),
    ("step", 0, "preprocessing.frame_step: "),
    ("step", 1.5, "preprocessing.frame_step: "),
    ("crop_pct", 2, "preprocessing.crop_pct: "),
    ("interpolation", "nearest", "preprocessing.interpolation: "),
    ("mean", [0.1, "0.2", 0.3], "preprocessing.mean.1: "),
    ("std", [0.1, 0.2, 0], "neither selfsight's"),
    ("std", [0.1, 0.2], "neither selfsight's"),
    ("frames", 1.0, "neither selfsight's"),
    ("frames", True, "neither selfsight's"),
]


def test_inputs_of_an_export_are_held_to_what_a_recipe_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)
    export(make(), tmp_path / "enc", {})
    config = json.loads((tmp_path / "enc" / "config.json").read_text())
    (tmp_path / "enc" / "manifest.json").unlink()
    own = config["selfsight"]["preprocessing"]

    def loaded(fields: dict[str, Any]) -> Encoder:
        config["selfsight"]["preprocessing"] = own | fields
        (tmp_path / "enc" / "config.json").write_text(json.dumps(config))
        return load_encoder(tmp_path / "enc")

    assert loaded({"depth": 32, "range": [-5, 2.5]}).preprocessing.range == (-5, 2.5)
    for field, value, told in WRONG_INPUTS:
        with pytest.raises(UsageError, match=told):
            loaded({field: value})


def test_features_that_differ_are_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    with pytest.MonkeyPatch.context() as unchecked:
        unchecked.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)
        export(make(), tmp_path / "enc", {})
    encoder = make()
    real = Encoder.embed
    with monkeypatch.context() as other:  # another function than the exported
        other.setattr(Encoder, "embed", lambda self, x, pool=None: real(self, x, "cls"))
        with pytest.raises(StorageError, match=r"timm's features differ from the live encoder's by .*, features up to"):
            export(encoder, tmp_path / "enc", {})
    tensors = load_file(tmp_path / "enc" / "model.safetensors")
    tensors["blocks.0.mlp.fc1.weight"] *= 1.1
    save_file(tensors, tmp_path / "enc" / "model.safetensors")
    with pytest.raises(StorageError, match="differ"):
        verify_export(encoder, tmp_path / "enc")
    assert sorted(os.listdir(tmp_path)) == ["enc"]


@pytest.mark.slow  # a process of its own; the next test has what is said of one
def test_an_export_that_timm_cannot_load_is_not_kept(tmp_path: Path) -> None:
    with (
        pytest.MonkeyPatch.context() as broken,
        pytest.raises(StorageError, match="a process of its own could not load the export: OSError: no"),
    ):
        broken.setattr(
            "selfsight.exports.export.FORMATS", {"timm": FORMATS["timm"]._replace(clean="raise OSError('no')")}
        )
        export(make(), tmp_path / "enc", {})
    assert os.listdir(tmp_path) == []


def test_a_process_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: no\n")

    monkeypatch.setattr("selfsight.exports.clean.subprocess.run", ended)
    with pytest.raises(StorageError, match="a process of its own could not load the export: OSError: no"):
        export(make(), tmp_path / "enc", {})
    assert os.listdir(tmp_path) == []


def test_runs_checkpoints_and_exports_are_one_encoder(
    small_fields: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], clean_process: None
) -> None:
    pretrain("digits/mae", small_fields)
    folder = Path(small_fields["run_dir"])
    newest = folder / "checkpoints" / "step-00000006"
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        features = [load_encoder(source).embed(images) for source in (folder, folder / "encoder", newest)]
        assert torch.equal(features[0], features[1])
        assert torch.equal(features[0], features[2])
    capsys.readouterr()
    assert cli.main(["export", str(newest), str(tmp_path / "out")]) == 0
    line = capsys.readouterr().out.strip()
    assert eval(line, {"timm": timm}).num_features == 16  # noqa: S307 - our own line, which users paste


def test_a_checkpoint_with_a_tensor_missing_is_refused(small_fields: dict[str, Any], unchecked_export: None) -> None:
    pretrain("digits/mae", small_fields)
    folder = Path(small_fields["run_dir"]) / "checkpoints"
    saved = checkpoint.load(folder / "step-00000006")
    del saved.tensors["model"]["encoder.backbone.norm.weight"]
    state = {key: value for key, value in saved.state.items() if key not in {"format", "step"}}
    path = checkpoint.save(folder, 7, state, saved.tensors, keep=2)
    with pytest.raises(UsageError, match=r"Missing key.*backbone.norm.weight"):
        load_encoder(path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("dear")
    with pytest.raises(UsageError, match="exists and is no export"):
        export(make(), tmp_path / "thesis", {})
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "dear"


def test_only_what_is_wholly_an_export_is_replaced(tmp_path: Path, unchecked_export: None) -> None:
    folder = tmp_path / "enc"
    export(make(), folder, {"steps": 1})
    export(make(), folder, {"steps": 2})
    (folder / "thesis.tex").write_text("dear")
    with pytest.raises(UsageError, match=r"exists and is no export \(thesis\.tex\)"):
        export(make(), folder, {"steps": 3})
    assert json.loads((folder / "config.json").read_text())["selfsight"]["steps"] == 2
    (folder / "thesis.tex").unlink()
    for odd in ("{}", "[]", "{", '{"selfsight": {}}'):  # somebody else's config.json
        (folder / "config.json").write_text(odd)
        with pytest.raises(UsageError, match="exists and is no export"):
            export(make(), folder, {})
    for name in ("config.json", "model.safetensors", "manifest.json", "README.md"):
        (folder / name).unlink()
    export(make(), folder, {})  # an empty folder
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="exists and is no export"):
        export(make(), tmp_path / "file", {})


def test_an_export_says_nothing_of_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked_export: None
) -> None:
    from selfsight.eval.leaks import pretraining_of

    home = "/home/rosalind"
    monkeypatch.setenv("HOME", home)
    data = [f"{home}/shards", f"x{home}/y", f"{home}2/z", "shards/mine"]
    recipe = {"run_dir": f"{home}/runs/mine", "data": {"train": data}, "objective": {"name": "mae"}}
    export(make(), tmp_path / "enc", {"recipe": recipe, "notes": [f"from {home}/runs/old"]})
    ours = json.loads((tmp_path / "enc" / "config.json").read_text())["selfsight"]
    assert ours["recipe"]["run_dir"] == "mine"
    assert ours["notes"] == ["from ~/runs/old"]
    # what is looked for when a score may have leaked: data's SPEC takes ~
    assert pretraining_of(tmp_path / "enc") == [["~/shards", f"x{home}/y", f"{home}2/z", "shards/mine"]]
    assert f"{home}/" not in (tmp_path / "enc" / "README.md").read_text().replace(f"x{home}/y", "")


@torch.no_grad()
def test_large_features_are_compared_by_their_size(tmp_path: Path, clean_process: None) -> None:
    encoder = make()
    encoder.backbone.norm.weight.mul_(1000)
    assert export(encoder, tmp_path / "enc", {}) < 1e-2


def test_what_is_no_encoder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds neither an export"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="neither selfsight's nor timm's"):
        load_encoder(tmp_path)


# -- volumes and channel tokens: timm has the backbone of one plane, a file of our own the rest

PLANES = [
    {"channels": 2, "frames": 6, "tube": 2},
    {"channels": 3, "frames": 4, "positions": "learned", "pool": "cls"},
    {"frames": 2, "tube": 2},
    {"channels": 5, "channel_tokens": True},
]


@pytest.mark.parametrize("fields", PLANES)
@torch.inference_mode()
def test_volumes_and_channels_come_back_as_they_were(
    tmp_path: Path, fields: dict[str, Any], clean_process: None
) -> None:
    channels = fields.get("channels", 3)
    statistics = {name: tuple(0.1 + 0.1 * i for i in range(channels)) for name in ("mean", "std")}
    encoder, folder = make(statistics, **fields).eval(), tmp_path / "enc"
    assert export(encoder, folder, {}) < 1e-5
    own = {name: table for name, table in encoder.named_parameters() if name in ("depth_embed", "channel_embed")}
    assert (folder / "planes.safetensors").is_file() == bool(own)
    unlisted = {"manifest.json", "README.md"}  # people write on cards
    assert set(json.loads((folder / "manifest.json").read_text())) == {p.name for p in folder.iterdir()} - unlisted
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1
    again = load_encoder(folder)
    assert (again.preprocessing, again.config) == (encoder.preprocessing, encoder.config)
    assert again.state_dict().keys() == encoder.state_dict().keys()
    volumes = torch.randn(2, *encoder.preprocessing.shape)
    assert torch.equal(again.embed(volumes), encoder.embed(volumes))
    told = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    stem = 1 if encoder.config.channel_tokens else channels * encoder.config.tube
    assert told["input_size"] == [stem, 16, 16]
    assert len(told["mean"]) == len(told["std"]) == stem
    assert ("one plane of patches; all of it: selfsight.load_encoder" in timm_line(folder)) == bool(own)
    assert timm_line(folder).startswith(f'timm.create_model("local-dir:{folder}"')


def test_the_means_of_a_tube_are_those_of_its_channels(tmp_path: Path, clean_process: None) -> None:
    export(make({"mean": (0.1, 0.2), "std": (0.3, 0.4)}, **PLANES[0]), tmp_path / "tube", {})
    export(make({"mean": (0.1, 0.3), "std": (1.0, 2.0)}, channels=2, channel_tokens=True), tmp_path / "tokens", {})
    found = [json.loads((tmp_path / name / "config.json").read_text())["pretrained_cfg"] for name in ("tube", "tokens")]
    assert (found[0]["mean"], found[0]["std"]) == ([0.1, 0.1, 0.2, 0.2], [0.3, 0.3, 0.4, 0.4])
    assert (found[1]["mean"], found[1]["std"]) == ([0.2], [1.5])


def test_volumes_whose_tables_differ_are_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_process: None
) -> None:
    def spoil(tensors: dict[str, torch.Tensor], path: Path, *_: Any) -> None:
        save_file({name: 1.5 * t if name == "depth_embed" else t for name, t in tensors.items()}, path)

    monkeypatch.setattr("selfsight.exports.timm_format.save_file", spoil)
    with pytest.raises(StorageError, match="features differ"):
        export(make(**PLANES[0]), tmp_path / "enc", {})
    assert os.listdir(tmp_path) == []


def test_a_damaged_export_of_volumes_is_refused(tmp_path: Path, clean_process: None) -> None:
    folder = tmp_path / "enc"
    export(make(**PLANES[0]), folder, {})
    config = (folder / "config.json").read_text()
    tables = (folder / "planes.safetensors").read_bytes()
    (folder / "planes.safetensors").write_bytes(tables[:-1] + b"x")
    with pytest.raises(StorageError, match=r"planes.safetensors is damaged"):
        load_encoder(folder)
    (folder / "manifest.json").unlink()
    (folder / "planes.safetensors").unlink()
    with pytest.raises(UsageError, match=r"planes.safetensors is not what its config.json describes \(depth_embed\)"):
        load_encoder(folder)
    (folder / "planes.safetensors").write_bytes(tables)
    load_encoder(folder)
    for old, new, told in (
        ('"frames": 6', '"frames": 8', r"\(depth_embed\)"),
        ('"tube": 2', '"tube": 6', r"\(nothing\)"),
        ('"width": 24', '"width": 4096', "its weights have"),
    ):
        (folder / "config.json").write_text(config.replace(old, new))
        with pytest.raises(UsageError, match=told):
            load_encoder(folder)
    for field in ('"frames": 6', '"channels": 2'):  # of the encoder, and not of its inputs
        (folder / "config.json").write_text(config.replace(field, field[:-1] + "4", 1))
        with pytest.raises(UsageError, match="inputs that its encoder does not take"):
            load_encoder(folder)


@torch.inference_mode()
def test_weights_of_an_export_know_their_tubes(tmp_path: Path, clean_process: None) -> None:
    """Three planes of two channels are not six channels."""
    tube = make(channels=2, frames=3, tube=3).eval()
    export(tube, tmp_path / "enc", {})
    plain = make(channels=2).eval()
    lines = load_weights(plain, str(tmp_path / "enc"), "x")
    assert lines[1:] == [
        "patch_embed.proj.weight: 24x6x4x4 resampled to 24x2x4x4, for patches of 1 planes in place of 3"
    ]
    image = torch.randn(2, 2, 16, 16)
    still = tube.embed(image[:, :, None].expand(-1, -1, 3, -1, -1))
    assert torch.allclose(plain.embed(image), still, atol=1e-5)
    again = make(channels=2, frames=3, tube=3).eval()
    assert len(load_weights(again, str(tmp_path / "enc"), "x")) == 1


@torch.no_grad()
def test_what_is_not_a_number_is_not_exported(tmp_path: Path, clean_process: None) -> None:
    encoder = make(pool="cls")
    real = encoder.embed
    encoder.embed = lambda *a: real(*a) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="differ from the live encoder's by nan"):
        export(encoder, tmp_path / "enc", {"format": "nonsense"})
    assert os.listdir(tmp_path) == []


def test_the_name_of_the_package_is_the_function() -> None:
    import selfsight

    assert selfsight.export is export and selfsight.load_encoder is load_encoder
