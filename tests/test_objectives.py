"""The registry: built-in objectives, those of --plugin, those of installed packages, and nothing else; and what
objectives share. PLUGIN below is the example of an objective of one's own.

Mutations that these tests caught when they were tried: plugins not registered or not checked, an empty or wrong
OBJECTIVES, a built-in's name, no class, another name in the fields, near names of built-ins only or without installed
ones, plugins or installed packages not looked up, entry points imported at once, not checked or of another group,
another error of the import, tokens shared by view number or across encoders, the first view for every view, pools
without `head`, draws of stochastic depth taken from torch's generator or the same for every view.
"""

import copy
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from selfsight import cli, objectives
from selfsight.assemble import assemble
from selfsight.data.placer import Batch
from selfsight.data.views import View
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.loading import load_encoder
from selfsight.objectives import OBJECTIVES, build_objective, config_type, load_plugin, parse_objective
from selfsight.objectives.base import EMATaught, Objective
from selfsight.objectives.configs import DINOConfig, MAEConfig, ObjectiveConfig, VICRegConfig
from selfsight.recipe import DataConfig, EncoderConfig, load
from selfsight.run_folder import read_lines

CPU = torch.device("cpu")
Fields = dict[str, Any]
Module = Callable[[str, str], str]
PLUGIN = '''
"""An objective of one's own: tell how bright an image is, in thirty lines outside the package."""

from typing import Literal

from pydantic import Field
from torch import nn

from selfsight.data.placer import Batch
from selfsight.data.views import View
from selfsight.data.views import View
from selfsight.encoder import Encoder
from selfsight.objectives.base import Loss, Objective
from selfsight.objectives.configs import ObjectiveConfig


class BrightnessConfig(ObjectiveConfig):
    """Brightness: regress the mean of an image's pixels."""

    name: Literal["brightness"] = "brightness"
    """Which objective."""
    scale: float = Field(1.0, gt=0)
    """Factor on the loss."""
    view: View = View()
    """The one view."""


class Brightness(Objective):
    """Regress the mean of an image's pixels."""

    config: BrightnessConfig

    def __init__(self, encoder: Encoder, config: BrightnessConfig) -> None:
        super().__init__(encoder, config)
        self.views = (config.view,)
        self.head = nn.Linear(encoder.feature_width, 1)

    def forward(self, batch: Batch) -> Loss:
        """Mean squared error."""
        wanted = batch.views[0].mean((1, 2, 3))
        error = (self.head(self.feature(batch, 0))[:, 0] - wanted).square().mean()
        return Loss(self.config.scale * error, {"floor": wanted.var(correction=0)})


OBJECTIVES = {"brightness": Brightness}
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Writes a module outside the package; what it has registered is forgotten afterwards."""
    before, known = set(sys.modules), dict(objectives._plugins)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")

    def write(name: str, text: str) -> str:
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / "elsewhere" / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield write
    objectives._plugins.clear()
    objectives._plugins.update(known)
    objectives._installed.cache_clear()
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def installed(tmp_path: Path, *points: str) -> None:
    """As if a package with these entry points were installed."""
    folder = tmp_path / "elsewhere" / "far_away-1.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: far-away\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[selfsight.objectives]\n" + "\n".join(points) + "\n")
    importlib.invalidate_caches()
    objectives._installed.cache_clear()


def encode(**fields: Any) -> Encoder:
    tiny = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}
    config = EncoderConfig(**(tiny | fields))
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)


# --- by name ---


def test_every_built_in_objective_is_what_its_line_says() -> None:
    for name, (fields, place) in OBJECTIVES.items():
        assert config_type(name) is fields
        assert fields.model_fields["name"].default == name
        found = objectives._find(name)
        assert f"{found.__module__}:{found.__name__}" == place
        assert issubclass(found, Objective)
        assert found.__annotations__["config"] is fields


def test_fields_are_parsed_and_built() -> None:
    config = parse_objective({"name": "mae", "mask_ratio": 0.5, "decoder_width": 16, "decoder_heads": 2})
    assert isinstance(config, MAEConfig)
    assert config.mask_ratio == 0.5
    encoder = encode()
    built = build_objective(config, encoder)
    assert (type(built).__name__, built.encoder, built.config) == ("MAE", encoder, config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mea", "no objective 'mea'; did you mean mae"),
        ("vicregg", "no objective 'vicregg'; did you mean vicreg"),
        ("DINO", "no objective 'DINO'; there are mae, simmim, vicreg, rotation, distill, dino, data2vec, joint"),
        ("zzz", "no objective 'zzz'; there are mae, simmim, .* needs its package installed, or --plugin"),
        (None, "no objective None"),
        (["mae"], "no objective"),
        (3, "no objective 3"),
        ({}, "no objective"),
    ],
)
def test_names_that_are_not_known(name: Any, message: str) -> None:
    for ask in (config_type, lambda name: parse_objective({"name": name})):
        with pytest.raises(UsageError, match=message):
            ask(name)


def test_a_recipe_holds_names_and_no_code(module: Module, tmp_path: Path) -> None:
    module("evil", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\nOBJECTIVES = {{'evil': Evil}}\n")
    for name in ("os.system", "evil", "evil.Evil", "evil:Evil", "selfsight.objectives.mae:MAE", "../evil", "evil.py"):
        with pytest.raises(UsageError, match=r"objective.name: no objective"):
            load("digits/mae", {"objective.name": name})
        with pytest.raises(UsageError, match="no objective"):
            load("digits/joint", {"objective.parts.rotation.objective.name": name})
    with pytest.raises(UsageError, match="plugin: no such field"):
        load("digits/mae", {"plugin": "evil"})
    assert "evil" not in sys.modules
    assert not (tmp_path / "ran").exists()


# --- --plugin ---


def test_the_documented_objective_is_one(module: Module, small_shards: Path) -> None:
    text = (ROOT / "docs" / "objectives.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(example.splitlines()) <= 35
    load_plugin(module("documented", example))
    sets = {"run_dir": "never-made", "data.train": str(small_shards), "eval.train": None, "eval.test": None}
    parts = assemble(load("digits/mae", sets | {"objective.name": "brightness"}), CPU)
    batch = parts.placer(CPU)(parts.batches()[0])
    loss = parts.objective(batch)
    loss.total.backward()
    target = batch.views[0].flatten(1).double().mean(1)
    assert loss.terms["floor"].item() == pytest.approx((target - target.mean()).square().mean().item(), rel=1e-4)
    assert all(p.grad is not None for p in parts.objective.parameters() if p.requires_grad)


def test_a_plugin_may_lie_in_the_folder_where_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lies_here.py").write_text("OBJECTIVES = {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert cli.main(["pretrain", "digits/mae", "--plugin", "lies_here"]) == 2
    assert "--plugin lies_here: has no OBJECTIVES" in capsys.readouterr().err


def test_an_objective_from_elsewhere_trains(
    module: Module, small_fields: Fields, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example: `selfsight pretrain RECIPE --plugin bright --objective.name brightness --objective.scale 0.5`."""
    monkeypatch.setattr("selfsight.exports.export.verify_export", lambda encoder, folder: 0.0)
    module("bright", PLUGIN)
    del small_fields["objective.decoder_width"]
    run = Path(small_fields["run_dir"])
    words = [
        word for key, value in small_fields.items() for word in (f"--{key}", "null" if value is None else str(value))
    ]
    wanted = ["--objective.name", "brightness", "--objective.scale", "0.5", "--objective.view.flip=0.0"]
    assert cli.main(["pretrain", "digits/mae", *wanted, *words]) == 2
    assert "no objective 'brightness'" in capsys.readouterr().err
    assert cli.main(["pretrain", "digits/mae", "--plugin", "bright", *wanted, *words]) == 0, capsys.readouterr().err
    lines = read_lines(run / "metrics.jsonl")
    assert len(lines) == 6
    assert {"loss", "loss/floor"} <= set(lines[0])
    objective = assemble(load(run / "recipe.yaml", {"run_dir": str(run / "again")}), CPU).objective
    assert (type(objective).__module__, objective.config.scale) == ("bright", 0.5)  # type: ignore[attr-defined]
    first = Batch((torch.randn(8, 1, 8, 8),), torch.arange(8), 0)
    loss = objective(first)
    with torch.no_grad():
        told = objective.head(objective.encoder.embed(first.views[0]))[:, 0]  # type: ignore[operator]
    assert loss.total.item() == pytest.approx(0.5 * (told - first.views[0].mean((1, 2, 3))).square().mean().item())
    with pytest.raises(UsageError, match=r"objective.scales: no such field; did you mean objective.scale"):
        load("digits/mae", {"objective.name": "brightness", "objective.scales": 1})
    with pytest.raises(UsageError, match=r"objective.scale: .*greater than 0"):
        load("digits/mae", {"objective.name": "brightness", "objective.scale": 0})
    objectives._plugins.clear()
    assert load_encoder(run).config.width == 16  # the encoder is of use without the objective's code
    assert cli.main(["report", str(run)]) == 2
    assert "no objective 'brightness'" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--plugin", "bright"]) == 0


def test_one_from_elsewhere_takes_part_in_a_joint(module: Module, small_fields: Fields) -> None:
    load_plugin(module("bright", PLUGIN))
    del small_fields["objective.decoder_width"]
    part = {"objective": {"name": "brightness", "scale": 2.0}}
    recipe = load("digits/joint", small_fields | {"objective.parts.bright": part})
    parts = assemble(recipe, CPU)
    loss = parts.objective(parts.placer(CPU)(parts.batches()[0]))
    assert {"rebuild", "rotation", "agree", "bright", "bright/floor"} <= set(loss.terms)


def test_several_plugins_and_one_twice(module: Module) -> None:
    dim = PLUGIN.replace("brightness", "dimness").replace("Brightness", "Dimness")
    names = f"{module('bright', PLUGIN)},{module('dim', dim)},bright"
    assert cli.main(["pretrain", "digits/none", "--plugin", names]) == 2  # no such recipe, but they are loaded
    assert config_type("brightness").__name__ == "BrightnessConfig"
    assert config_type("dimness").__name__ == "DimnessConfig"
    with pytest.raises(UsageError, match="no objective 'brightnes'; did you mean brightness"):
        config_type("brightnes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "broken: has no OBJECTIVES, a dict of names to classes"),
        ("OBJECTIVES = {}", "has no OBJECTIVES"),
        ("OBJECTIVES = ['brightness']", "has no OBJECTIVES"),
        ("import nothing_of_this_name", "--plugin broken: cannot be imported .*nothing_of_this_name"),
        (PLUGIN.replace('"brightness": B', '"mae": B'), "broken: the name mae is a built-in objective's"),
        (PLUGIN.replace('"brightness": B', '"other": B'), "Brightness needs the annotation config: .* name is 'other'"),
        (PLUGIN.replace("    config: BrightnessConfig\n", ""), "Brightness needs the annotation config: FIELDS"),
        (PLUGIN.replace("config: BrightnessConfig\n", "config: dict\n"), "Brightness needs the annotation config"),
        (PLUGIN.replace("Brightness(Objective)", "Brightness(nn.Module)"), "brightness is not a subclass of"),
        (PLUGIN + "\nOBJECTIVES = {'brightness': Brightness.__new__(Brightness)}", "brightness is not a subclass"),
        (PLUGIN + "\nOBJECTIVES = {'brightness': 'Brightness'}", "brightness is not a subclass"),
    ],
)  # fmt: skip
def test_plugins_that_are_none(module: Module, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_plugin(module("broken", text))
    assert objectives._plugins == {}


@pytest.mark.parametrize("name", ["nowhere_at_all", "nowhere.at.all", "", ".relative", "a b"])
def test_a_plugin_that_is_not_there(module: Module, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(UsageError, match=f"--plugin {name}: cannot be imported"):
        load_plugin(name)
    assert cli.main(["pretrain", "digits/mae", f"--plugin={name},"]) == 2
    assert "cannot be imported" in capsys.readouterr().err


def test_a_plugin_does_not_take_anothers_name(module: Module) -> None:
    load_plugin(module("bright", PLUGIN))
    before = objectives._plugins["brightness"]
    with pytest.raises(UsageError, match="brightness"):
        load_plugin(module("second", PLUGIN))
    assert objectives._plugins["brightness"] is before


# --- installed packages ---


def test_installed_packages_bring_objectives(module: Module, tmp_path: Path, small_fields: Fields) -> None:
    module("far", PLUGIN)
    installed(tmp_path, "brightness = far:Brightness")
    assert config_type("mae") is MAEConfig
    with pytest.raises(UsageError, match="no objective 'brightnes'; did you mean brightness"):
        config_type("brightnes")
    assert "far" not in sys.modules  # not imported before it is asked for
    del small_fields["objective.decoder_width"]
    recipe = load("digits/mae", {"objective.name": "brightness", "objective.scale": "3"} | small_fields)
    assert "far" in sys.modules
    parts = assemble(recipe, CPU)
    assert type(parts.objective) is sys.modules["far"].Brightness
    parts.objective(parts.placer(CPU)(parts.batches()[0])).total.backward()


@pytest.mark.parametrize(
    ("point", "name", "message"),
    [
        ("other = far:Brightness", "other", "objective other: Brightness needs the annotation config: .* is 'other'"),
        ("thing = far:View", "thing", "objective thing: thing is not a subclass"),
        ("lost = far:Nothing", "lost", "lost.*Nothing"),
        ("gone = far_gone:Brightness", "gone", "gone.*far_gone"),
    ],
)
def test_installed_objectives_that_are_none(
    module: Module, tmp_path: Path, point: str, name: str, message: str
) -> None:
    module("far", PLUGIN)
    installed(tmp_path, point)
    with pytest.raises(UsageError, match=message):
        config_type(name)


def test_a_built_in_name_is_the_built_in_objective(module: Module, tmp_path: Path) -> None:
    module("far", PLUGIN)
    installed(tmp_path, "mae = far:Brightness")
    assert config_type("mae") is MAEConfig
    assert objectives._find("mae").__module__ == "selfsight.objectives.mae"
    assert "far" not in sys.modules


# --- overrides ---


def test_overrides_of_an_objective_may_stand_in_any_order() -> None:
    for fields in (
        {"objective.name": "vicreg", "objective.covariance": 7.0},
        {"objective.covariance": 7.0, "objective.name": "vicreg"},
    ):
        config = load("digits/mae", fields).objective
        assert isinstance(config, VICRegConfig)
        assert config.covariance == 7.0


def test_overrides_are_left_as_they_were_given() -> None:
    fields = {"objective.view": {"flip": 0.5}, "objective.view.flip": 0.25}
    before = copy.deepcopy(fields)
    load("digits/mae", fields)
    assert fields == before


# --- what objectives share ---


def make_batch(count: int = 4) -> Batch:
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return Batch((images, images.clone()), torch.arange(100, 100 + count), seed=7)


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean", "head"])
def test_a_feature_is_what_is_embedded(pool: str) -> None:
    objective, batch = Objective(encode(pool=pool, registers=1), ObjectiveConfig(name="none")), make_batch()
    batch = Batch((batch.views[0], batch.views[1].flip(0)), batch.positions, batch.seed)
    feature = objective.feature(batch, 1)
    assert feature.requires_grad
    assert torch.allclose(feature, objective.encoder.embed(batch.views[1]), atol=1e-6)


def test_tokens_are_encoded_once_for_each_view_encoder_and_batch() -> None:
    encoder, batch = encode(), make_batch()
    objective = Objective(encoder, ObjectiveConfig(name="none"))
    calls: list[int] = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    first = objective.tokens(batch, 0)
    assert objective.tokens(batch, 0) is first
    objective.feature(batch, 0)
    assert len(calls) == 1
    assert objective.tokens(batch, 1) is not first
    assert objective.tokens(make_batch(), 0) is not first
    assert len(calls) == 3
    other = Objective(encode(), ObjectiveConfig(name="none"))
    with torch.no_grad():
        other.encoder.backbone.norm.bias.add_(1.0)
    assert not torch.allclose(other.tokens(batch, 0).patches, first.patches)


@pytest.mark.parametrize("pool", ["mean", "head"])
def test_stochastic_depth_belongs_to_the_image(pool: str) -> None:
    objective = Objective(encode(drop_path=0.5, depth=6, pool=pool), ObjectiveConfig(name="none")).train()
    batch = make_batch()
    feature = objective.feature(batch, 0)
    torch.manual_seed(99)
    assert torch.equal(objective.feature(make_batch(), 0), feature)
    alone = Batch((batch.views[0][2:3],), batch.positions[2:3], batch.seed)
    assert torch.allclose(objective.feature(alone, 0)[0], feature[2], atol=1e-5)
    elsewhere = Batch(batch.views, batch.positions + 1, batch.seed)
    assert not torch.allclose(objective.feature(elsewhere, 0), feature, atol=1e-4)


@pytest.mark.parametrize("pool", ["mean", "head"])
def test_stochastic_depth_differs_between_views(pool: str) -> None:
    """Two views of equal pixels, as two draws of the same augmentation may be, lose other blocks."""
    objective = Objective(encode(drop_path=0.5, depth=6, pool=pool), ObjectiveConfig(name="none")).train()
    batch = make_batch()
    assert not torch.allclose(objective.feature(batch, 0), objective.feature(batch, 1), atol=1e-4)


def test_a_view_given_in_part_keeps_the_objectives_own() -> None:
    own = load("imagenet/dino-s16").objective
    changed = load("imagenet/dino-s16", {"objective.local_view.size": 64}).objective
    assert isinstance(own, DINOConfig) and isinstance(changed, DINOConfig)
    assert own.local_view.jitter == 0.8
    assert changed.local_view == own.local_view.model_copy(update={"size": 64})
    pair = load("imagenet/vicreg-s16", {"objective.second_view.shift": 8}).objective
    assert isinstance(pair, VICRegConfig) and pair.second_view is not None
    assert pair.view.crop_scale == (0.08, 1.0)
    assert pair.second_view == pair.view.model_copy(update={"shift": 8})
    assert VICRegConfig(second_view=View(flip=1.0)).second_view == View(flip=1.0)


@pytest.mark.parametrize("name", ["mae", "simmim", "data2vec"])
def test_what_follows_the_tokens_is_not_trained_by_who_does_not_use_it(name: str, small_shards: Path) -> None:
    """DDP waits for a gradient of every parameter that is trained."""
    own = {"objective.decoder_width": 16} if name == "mae" else {"objective.mask_size": 4}
    sizes = {"encoder.width": 16, "encoder.depth": 1, "encoder.heads": 2, "train.steps": 1, "train.epochs": None}
    sets = {"run_dir": "never-made", "data.train": str(small_shards), "eval.train": None, "eval.test": None}
    model = {"encoder.name": "vit_base_patch16_siglip_224", "encoder.pool": "head", "objective.name": name}
    parts = assemble(load("digits/mae", sets | sizes | model | own), torch.device("cpu"))
    parts.objective(parts.placer(torch.device("cpu"))(parts.batches()[0])).total.backward()
    lacking = [key for key, p in parts.objective.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert not any(p.requires_grad for key, p in parts.encoder.named_parameters() if "attn_pool" in key)


def test_one_image_at_a_time_is_refused_by_who_compares_them(small_shards: Path) -> None:
    sets = {"run_dir": "never-made", "data.train": str(small_shards), "eval.train": None, "eval.test": None}
    for name in ("vicreg", "dino"):
        with pytest.raises(UsageError, match=rf"train.batch_size: {name} compares images with each other"):
            assemble(load(f"digits/{name}", sets | {"train.batch_size": 4, "train.accumulate": 4}), torch.device("cpu"))
    parts = assemble(load("digits/dino", sets | {"train.batch_size": 4, "train.accumulate": 2}), torch.device("cpu"))
    assert parts.fingerprint()["train"]["accumulate"] == 2
    alone = assemble(load("digits/mae", sets | {"train.batch_size": 4, "train.accumulate": 4}), torch.device("cpu"))
    assert "accumulate" not in alone.fingerprint()["train"]


# --- steps of which only the device knows whether they were taken ---


def test_who_defines_what_follows_a_step_says_whether_it_heeds_the_device() -> None:
    class Careless(EMATaught):
        def after_step(self, step: int, steps: int) -> None:
            self.did = step

    class Careful(Careless):
        heeds_took = True

        def after_step(self, step: int, steps: int) -> None:
            super().after_step(step, steps)

    class Quiet(EMATaught):
        pass

    assert (Objective.heeds_took, EMATaught.heeds_took, Quiet.heeds_took) == (False, True, True)
    assert (Careless.heeds_took, Careful.heeds_took) == (False, True)
    assert objectives._find("dino").heeds_took and objectives._find("data2vec").heeds_took
    assert all(
        objectives._find(name).heeds_took or objectives._find(name).after_step is Objective.after_step
        for name in OBJECTIVES
        if name != "joint"
    )


@pytest.mark.parametrize(("taught", "heeds"), [("dino", True), ("data2vec", False)])
def test_a_joint_heeds_the_device_if_its_parts_do(taught: str, heeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    kind = objectives._find(taught)
    monkeypatch.setattr(kind, "heeds_took", heeds)
    monkeypatch.setattr(kind, "after_step", lambda self, step, steps: told.append(self.took))
    parts = {"first": {"objective": {"name": "rotation"}}, "second": {"objective": {"name": taught}}}
    if taught == "data2vec":
        parts["second"]["objective"]["mask_size"] = 4  # type: ignore[assignment]
    else:
        parts["second"]["objective"] |= {"outputs": 8, "local_views": 0}  # type: ignore[dict-item]
    joint = build_objective(parse_objective({"name": "joint", "parts": parts}), encode())
    assert joint.heeds_took == heeds
    joint.took = torch.tensor(0.0)
    joint.after_step(1, 2)
    assert told == [joint.took]
