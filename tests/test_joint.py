"""Joint objectives against their parts, run one by one on the same weights and images.

Mutations that these tests caught when they were tried: weights dropped, constant, squared or swapped, only the last
part counted, terms not detached or not under the part's name, every part given all views, equal views not shared or
two of one part made one, no view ever shared, encodings not shared, shared by number or across encoders, the encoder
stored with each part, after_step and check of the first part only, step and steps swapped, the encoder scored in
place of the teacher, two teachers let through, augmentations of any part or of two, captions without names, pictures
of the joint's views, draws of stochastic depth taken from torch's generator.
"""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from selfsight import checkpoint
from selfsight.assemble import assemble
from selfsight.data.placer import Batch
from selfsight.data.views import View
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective, parse_objective
from selfsight.objectives.base import Objective, Setting
from selfsight.objectives.configs import JointConfig, VICRegConfig
from selfsight.objectives.joint import Joint, places
from selfsight.recipe import DataConfig, EncoderConfig, load

TINY: dict[str, Any] = {"image_size": 16, "patch": 4, "width": 24, "depth": 2, "heads": 2}
MAE: dict[str, Any] = {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
ROTATION: dict[str, Any] = {"name": "rotation"}
VICREG: dict[str, Any] = {
    "name": "vicreg",
    "expander_width": 8,
    "expander_layers": 2,
    "view": View(flip=0.0).model_dump(),
}
DINO: dict[str, Any] = {
    "name": "dino", "outputs": 8, "head_width": 8, "bottleneck": 4, "local_views": 0, "freeze_prototypes": 0.0
}  # fmt: skip
DATA2VEC: dict[str, Any] = {"name": "data2vec", "mask_size": 4}
TWO: dict[str, Any] = {**VICREG, "second_view": View(flip=1.0).model_dump()}
CPU = torch.device("cpu")


def make(encoder: dict[str, Any] | None = None, **parts: Any) -> Joint:
    """A joint of parts by name, each its objective's fields or (weight, fields)."""
    config = EncoderConfig(**(TINY | (encoder or {})))
    torch.manual_seed(0)
    built = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    tree = {}
    for name, part in parts.items():
        weight, fields = part if isinstance(part, tuple) else (1.0, part)
        tree[name] = {"weight": weight, "objective": copy.deepcopy(fields)}
    objective = build_objective(parse_objective({"name": "joint", "parts": tree}), built)
    assert isinstance(objective, Joint)
    return objective


def make_batch(objective: Objective, progress: float = 0.0, channels: int = 3, size: int = 16) -> Batch:
    """Other images in every view."""
    generator = torch.Generator().manual_seed(3)
    views = tuple(torch.randn(4, channels, size, size, generator=generator) for _ in objective.views)
    return Batch(views, torch.arange(100, 104), seed=7, progress=progress)


def alone(joint: Joint, name: str) -> Objective:
    """A part with the same weights, built by itself."""
    built = build_objective(joint.config.parts[name].objective, copy.deepcopy(joint.encoder))
    own = {key: value for key, value in built.state_dict().items() if key.startswith("encoder.")}
    built.load_state_dict(own | joint.parts[name].state_dict(), strict=True)
    return built


def places_of(joint: Joint, name: str) -> list[int]:
    """Where a part's views stand, found by looking for equal ones."""
    taken: list[int] = []
    for view in joint.objectives[list(joint.parts).index(name)].views:
        taken.append(next(i for i, other in enumerate(joint.views) if other == view and i not in taken))
    return taken


def own_batch(joint: Joint, batch: Batch, name: str) -> Batch:
    """Only the views of a part, and nothing that others have computed."""
    views = tuple(batch.views[place] for place in places_of(joint, name))
    return Batch(views, batch.positions, batch.seed, batch.keys, batch.progress)


# --- the sum ---


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_the_total_and_its_gradients_are_the_weighted_sum_of_the_parts(progress: float) -> None:
    joint = make(rebuild=(5.0, MAE), turn=((1.0, 0.1), ROTATION), agree=((0.0, 0.2), TWO), meet=(0.5, DINO))
    factors = {"rebuild": 5.0, "turn": 1.0 - 0.9 * progress, "agree": 0.2 * progress, "meet": 0.5}
    batch = make_batch(joint, progress)
    loss = joint(batch)
    loss.total.backward()
    total, gradients, terms = 0.0, {}, {}
    for name, factor in factors.items():
        part = alone(joint, name)
        own = part(own_batch(joint, batch, name))
        own.total.backward()
        total += factor * own.total.item()
        terms |= {name: own.total} | {f"{name}/{term}": value for term, value in own.terms.items()}
        for key, parameter in part.named_parameters():
            if parameter.grad is not None:
                place = key if key.startswith("encoder.") else f"parts.{name}.{key}"
                gradients[place] = gradients.get(place, 0) + factor * parameter.grad.double()
    assert loss.total.item() == pytest.approx(total, rel=1e-5)
    assert loss.terms.keys() == terms.keys()
    for name, value in terms.items():
        assert loss.terms[name].item() == pytest.approx(value.item(), rel=1e-4), name
        assert not loss.terms[name].requires_grad
    trained = {name: p for name, p in joint.named_parameters() if p.requires_grad}
    assert trained.keys() == gradients.keys()
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad.double(), gradients[name], rtol=1e-4, atol=1e-5), name


def test_weights_are_linear_in_progress() -> None:
    joint = make(a=((1.0, 0.2), ROTATION), b=((0.0, 4.0), ROTATION), c=(3.0, ROTATION))
    for progress in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert joint.weight("a", progress) == pytest.approx(1.0 - 0.8 * progress)
        assert joint.weight("b", progress) == pytest.approx(4.0 * progress)
        assert joint.weight("c", progress) == 3.0


def test_watched_vectors_and_pictures_go_by_the_parts_names() -> None:
    joint = make(rebuild=MAE, turn=ROTATION, agree=TWO, twin=VICREG)
    batch = make_batch(joint)
    assert list(joint(batch).watched) == ["agree/embedding", "twin/embedding"]
    shown = joint.pictures(batch)
    wanted: dict[str, Tensor] = {}
    for name in joint.parts:
        pictures = alone(joint, name).pictures(own_batch(joint, batch, name))
        wanted |= {f"{name}: {caption}": rows for caption, rows in pictures.items()}
    assert list(shown) == list(wanted)
    assert all(torch.allclose(shown[caption], rows, atol=1e-5) for caption, rows in wanted.items())


# --- views and encodings are shared ---


def test_equal_views_are_shared_and_two_of_one_part_stay_two() -> None:
    a, b, c = View(flip=0.0), View(flip=0.5), View(flip=1.0)
    views: list[View] = []
    assert places((a,), views) == (0,)
    assert places((View(flip=0.0), b), views) == (0, 1)
    assert places((b, b), views) == (1, 2)
    assert places((a, a, c, a), views) == (0, 3, 4, 5)
    assert places((b, c, b), views) == (1, 4, 2)
    assert views == [a, b, b, a, c, a]


def test_the_views_of_the_parts() -> None:
    plain = {"flip": 0.0}
    joint = make(turn=ROTATION | {"view": plain}, agree=VICREG, rebuild=MAE | {"view": {"flip": 1.0}}, other=TWO)
    assert joint.views == (View(flip=0.0), View(flip=0.0), View(flip=1.0))
    assert joint.used == {"turn": (0,), "agree": (0, 1), "rebuild": (2,), "other": (0, 2)}
    batch = make_batch(joint)
    for name in joint.parts:
        found = joint.part_of(batch, name)
        assert all(torch.equal(x, y) for x, y in zip(found.views, own_batch(joint, batch, name).views, strict=True))
        assert (found.positions is batch.positions, found.seed, found.progress) == (True, batch.seed, batch.progress)
        assert found.shared is batch.shared


@pytest.mark.parametrize(
    ("parts", "views", "passes"),
    [
        ({"a": VICREG}, 2, 1),
        ({"a": VICREG, "b": VICREG | {"expander_width": 16}}, 2, 1),
        ({"a": VICREG, "b": TWO}, 3, 2),
        ({"a": VICREG, "b": MAE, "c": ROTATION}, 4, 3),
        ({"a": VICREG | {"view": DINO.get("view", {})}, "b": TWO, "c": DINO}, 6, 3),
    ],
)
def test_a_view_that_several_parts_encode_whole_is_encoded_once(parts: dict[str, Any], views: int, passes: int) -> None:
    joint = make(**parts)
    seen: list[Tensor] = []
    joint.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    joint(make_batch(joint))
    assert (sum(map(len, seen)), len(seen)) == (4 * views, passes)
    joint(make_batch(joint))  # and nothing is left over for the next batch
    assert len(seen) == 2 * passes


def test_stochastic_depth_belongs_to_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws come from the batch, also where an encoding is shared, and other views have others."""
    joint = make({"drop_path": 0.5, "depth": 4}, turn=ROTATION, agree=VICREG, other=TWO)
    joint.train()
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(joint(make_batch(joint)).total.item())
    assert losses[0] == losses[1]


# --- what is stored ---


def test_every_tensor_is_stored_once_and_comes_back() -> None:
    joint = make(rebuild=MAE, turn=ROTATION, meet=DINO)
    state = joint.state_dict()
    places = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(set(places)) == len(places)
    assert {name.partition(".")[0] for name in state} == {"encoder", "parts"}
    assert not any(".encoder." in name for name in state)
    assert {name for name in state if name.startswith("encoder.")} == {
        f"encoder.{name}" for name in joint.encoder.state_dict()
    }
    parameters = [id(parameter) for _, parameter in joint.named_parameters(remove_duplicate=False)]
    assert len(set(parameters)) == len(parameters)
    other = make(rebuild=MAE, turn=ROTATION, meet=DINO)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(state, strict=True)
    assert other(make_batch(other)).total.item() == joint(make_batch(joint)).total.item()


def test_a_part_uses_the_joints_encoder_even_when_copied_or_moved() -> None:
    joint = make(turn=ROTATION, meet=DINO)
    for made in (joint, copy.deepcopy(joint), copy.deepcopy(joint).double()):
        assert all(part.encoder is made.encoder for part in made.objectives)
        assert made.scored is made.objectives[1].scored is not joint.encoder
    before = joint(make_batch(joint)).total.item()
    with torch.no_grad():
        for parameter in joint.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert joint(make_batch(joint)).total.item() != pytest.approx(before, rel=1e-3)


def test_a_checkpoint_of_a_joint_comes_back(small_fields: dict[str, Any], tmp_path: Any) -> None:
    del small_fields["objective.decoder_width"]
    recipe = load("digits/joint", small_fields)
    parts = assemble(recipe, CPU)
    batches, place = parts.batches(), parts.placer(CPU)
    for step in range(3):
        parts.objective(place(batches[step], step / 6)).total.backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.objective.after_step(step + 1, 6)
    assert parts.state()["scored"] == "encoder"
    path = checkpoint.save(tmp_path / "checkpoints", 3, parts.state(), parts.tensors(), keep=2)
    again = assemble(recipe, CPU)
    assert again.restore(checkpoint.load(path), "here") == 3
    losses = [made.objective(place(batches[3], 0.5)).total for made in (parts, again)]
    assert losses[0].item() == losses[1].item()
    lists = [name for name, _ in again.objective.named_parameters()]
    assert sum(name.startswith("encoder.") for name in lists) == len(list(again.encoder.named_parameters()))


# --- what is passed on ---


def test_steps_and_checks_reach_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = make(turn=ROTATION, agree=VICREG, other=TWO, meet=DINO)
    told: list[tuple[int, int, int]] = []
    for number, part in enumerate(joint.objectives):
        monkeypatch.setattr(part, "after_step", lambda step, steps, number=number: told.append((number, step, steps)))
    joint.after_step(3, 10)
    assert told == [(0, 3, 10), (1, 3, 10), (2, 3, 10), (3, 3, 10)]
    assert len([line for line in joint.check(Setting(16, "id", 0)) if "its statistics are those of 16" in line]) == 2
    assert joint.check(Setting(128, "id", 0)) == []
    with pytest.raises(UsageError, match="vicreg compares images"):
        joint.check(Setting(1, "id", 0))


def test_the_teacher_of_a_part_is_scored_moves_and_does_not_train() -> None:
    assert (joint := make(turn=ROTATION, agree=VICREG)).scored is joint.encoder
    joint = make(turn=ROTATION, meet=DINO | {"momentum": 0.75})
    teacher = joint.objectives[1].scored
    assert joint.scored is teacher is not joint.encoder
    joint.train()
    assert joint.encoder.training
    assert not any(module.training for module in teacher.modules())
    before = teacher.backbone.norm.weight.detach().clone()
    with torch.no_grad():
        joint.encoder.backbone.norm.weight.add_(1.0)
    joint.after_step(1, 100)
    assert torch.allclose(teacher.backbone.norm.weight, before + 0.25, atol=1e-6)


@pytest.mark.parametrize("second", [DINO, DATA2VEC])
def test_two_teachers_are_refused(second: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"objective.parts: two of them train a teacher; only one can be scored"):
        make(meet=DINO, turn=ROTATION, again=second)


def test_a_joint_of_joints_is_one_sum_on_one_encoder() -> None:
    inner = {"name": "joint", "parts": {"x": {"objective": ROTATION, "weight": 3.0}, "y": {"objective": VICREG}}}
    nested, flat = make(a=(2.0, inner), b=MAE), make(x=(6.0, ROTATION), y=(2.0, VICREG), b=MAE)
    state = {name.replace("parts.x", "parts.a.parts.x").replace("parts.y", "parts.a.parts.y"): value
             for name, value in flat.state_dict().items()}  # fmt: skip
    assert nested.state_dict().keys() == state.keys()
    nested.load_state_dict(state, strict=True)
    assert nested.views == flat.views
    loss = nested(make_batch(nested))
    assert loss.total.item() == pytest.approx(flat(make_batch(flat)).total.item(), rel=1e-5)
    assert {"a", "a/x", "a/x/accuracy", "a/y", "a/y/variance", "b", "b/floor"} <= set(loss.terms)


def test_a_fixed_number_of_augmentations_is_the_first_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from selfsight.objectives.rotation import Rotation

    real = Rotation.__init__

    def counted(self: Rotation, encoder: Any, config: Any) -> None:
        real(self, encoder, config)
        self.augmentations = 5 if config.turns == "all" else None

    monkeypatch.setattr(Rotation, "__init__", counted)
    fixed = ROTATION | {"turns": "all"}
    assert make(a=ROTATION, b=MAE).augmentations is None
    assert make(a=fixed, b=MAE).augmentations == 5
    for parts in ({"a": MAE, "b": fixed}, {"a": fixed, "b": fixed}):
        with pytest.raises(UsageError, match="a part with augmentations must be the first, and the only one"):
            make(**parts)


# --- in a recipe ---


def test_overrides_reach_into_parts() -> None:
    fields = {
        "objective.parts.rotation.weight": 0.5,
        "objective.parts.agree.weight": "[0.2, 0.4]",
        "objective.parts.rotation.objective.turns": "all",
        "objective.parts.agree.objective.view.flip": "0.25",
        "objective.parts.again": {"objective": {"name": "rotation"}},
    }
    config = load("recipes/digits/joint.yaml", fields).objective
    assert isinstance(config, JointConfig)
    assert list(config.parts) == ["rebuild", "rotation", "agree", "again"]
    assert (config.parts["rotation"].weight, config.parts["agree"].weight) == (0.5, (0.2, 0.4))
    assert config.parts["rotation"].objective.turns == "all"  # type: ignore[attr-defined]
    agree = config.parts["agree"].objective
    assert isinstance(agree, VICRegConfig)
    assert (agree.expander_width, agree.view.flip) == (256, 0.25)
    assert config.parts["rebuild"].weight == 5.0


def test_another_objective_in_a_part_keeps_nothing_of_the_old_one() -> None:
    """As in a recipe with a `base:`, and as for the objective itself."""
    config = load("digits/joint", {"objective.parts.rebuild.objective.name": "simmim"}).objective
    assert isinstance(config, JointConfig)
    assert config.parts["rebuild"].objective == parse_objective({"name": "simmim"})
    assert config.parts["rebuild"].weight == 5.0


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"rotation.objective.turnz": "all"}, ["rotation.objective[.:] ?turnz: no such field; did you mean .*turns"]),
        (
            {"rotation.objective.turnz": "all", "agree.objective.covarience": 1},
            ["rotation.objective[.:] ?turnz: no such", "agree.objective[.:] ?covarience: no such"],
        ),
        ({"rotation.objective.turns": "two"}, ["rotation.objective[.:] ?turns: .* not 'two'"]),
        ({"agree.objective.view.flip": 2}, ["agree.objective[.:] ?view.flip: .*not 2"]),
        (
            {"rotation.objective.name": "rotatoin"},
            ["rotation.objective(.name)?: no objective 'rotatoin'; did you mean rotation"],
        ),
        ({"rotation.objective": {"turns": "all"}}, ["rotation.objective(.name)?: no objective None"]),
        (
            {"rotation.objective.name": "rotatoin", "agree.weight": "much"},
            ["rotation.objective(.name)?: no objective 'rotatoin'", "agree.weight"],
        ),
        ({"rotation.wieght": 1}, ["rotation.wieght: no such field"]),
        ({"rotatoin.weight": 1}, ["rotatoin.objective: is missing"]),
        ({"rotation.objective": None}, ["rotation.objective: "]),
        ({"rotation.objective": "rotation"}, ["rotation.objective: "]),
    ],
)
def test_wrong_parts_are_named_by_their_path(fields: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(UsageError) as told:
        load("digits/joint", {f"objective.parts.{name}": value for name, value in fields.items()})
    lines = str(told.value).splitlines()
    for message in messages:
        assert any(re.match(rf"digits/joint: objective.parts.{message}", line) for line in lines), lines


def test_a_joint_has_parts() -> None:
    with pytest.raises(UsageError, match=r"objective.parts: "):
        load("digits/joint", {"objective.parts": {}})


@pytest.mark.parametrize("name", ["a.b", "", "keys", "training", "forward"])
def test_a_part_of_any_name_is_built_or_refused(small_fields: dict[str, Any], name: str) -> None:
    del small_fields["objective.decoder_width"]
    parts = {name: {"objective": {"name": "rotation"}}}
    try:
        built = assemble(load("digits/joint", small_fields | {"objective.parts": parts}), CPU)
    except UsageError as error:
        assert "objective.parts" in str(error)
    else:
        assert built.objective(make_batch(built.objective, channels=1, size=8)).terms.keys() >= {name}


def test_a_joint_with_an_after_step_of_its_own_must_say_that_it_heeds_the_device() -> None:
    class Own(Joint):
        def after_step(self, step: int, steps: int) -> None:
            """Something that nobody can take back."""

    class Heeding(Own):
        heeds_took = True

    config = JointConfig(parts={"first": {"objective": {"name": "rotation"}}})  # type: ignore[dict-item]
    encoder = EncoderConfig(image_size=8, channels=1, patch=4, width=16, depth=1, heads=2)
    found = [
        kind(build_encoder(encoder, preprocessing_of(DataConfig(train="x"), encoder), 0), config).heeds_took
        for kind in (Joint, Own, Heeding)
    ]
    assert found == [True, False, True]
