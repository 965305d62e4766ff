"""Recipes: what is read, what is refused, and how it is said."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfsight import plainyaml
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import UsageError
from selfsight.objectives import build_objective
from selfsight.recipe import Recipe, load, packaged, packaged_recipes

MINIMAL = "run_dir: r\ndata: {train: x.tar}\nobjective: {name: mae}\ntrain: {epochs: 1}\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4), ("1e5", 1e5), ("-1.5E+3", -1500.0), (".5", 0.5), ("1.", 1.0), ("3", 3), ("-3", -3), ("0123", 123),
        ("1_000", 1000), ("no", "no"), ("off", "off"), ("yes", "yes"), ("true", True), ("False", False), ("null", None),
        ("~", None), ("1:30", "1:30"), ("0x10", "0x10"), ("0o17", "0o17"), ("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"),
        ("e5", "e5"), ("'5'", "5"), (".inf", float("inf")), ("=", "="), ("<<", "<<"), ("y", "y"), ("on", "on"), ("-.INF", float("-inf")),
        ("0b11", "0b11"), ("1e", "1e"), ("+7", 7), ("Null", None), ("TRUE", True), ("1__0", 10), ("190:20:30", "190:20:30"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    assert plainyaml.parse(f"a: {text}", "t") == {"a": value}
    assert type(plainyaml.parse(text, "t")) is type(value)


TEXT = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(TEXT, max_size=12)


@given(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(TEXT, max_size=5), inner, max_size=3),
    )
)
def test_what_is_dumped_is_read_back(value: Any) -> None:
    again = plainyaml.parse(plainyaml.dump(value), "t")
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2: the key 'a' stands twice"),
        ("a: {b: 1, b: 2}", "'b' stands twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['touch /tmp/x']", "line 1: tags"),
        ("a: !!python/name:os.system", "line 1: tags"),
        ("a: !thing 1", "line 1: tags"),
        ("a: 1\nb: !!int 5", "line 2: tags"),
        ("? [a]\n: 1", "line 1: a key is a word"),
        ("? {a: 1}\n: 1", "line 1: a key is a word"),
        ('a: "x\\0y"', "line 1: a character"),
        ('a: "\\ud800"', "line 1: a character"),
        ("[" * 50, "levels deep"),
        ("a: b: c", "mapping values"),
        ("- 1\n-2: [", "not a readable recipe"),
        ("a: \x00", "not a readable recipe"),
    ],
)
def test_what_is_not_read(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("*", r"\*")):
        plainyaml.parse(text, "t")


def test_an_alias_bomb_and_a_large_file_are_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x,x]\n" + "".join(
        f"{c}: &{c} [{', '.join('*' + chr(ord(c) - 1) for _ in range(9))}]\n" for c in "bcdefghi"
    )
    with pytest.raises(UsageError, match="aliases"):
        plainyaml.parse(bomb, "t")
    with pytest.raises(UsageError, match="larger than"):
        plainyaml.read(write(tmp_path / "r.yaml", "#" * 200_001))


def test_a_recipe_is_typed_and_frozen(tmp_path: Path) -> None:
    recipe = load(write(tmp_path / "r.yaml", MINIMAL + "optim: {lr: 5e-4}\n"))
    assert recipe.optim.lr == 5e-4
    assert recipe.objective.name == "mae"
    assert recipe.encoder.image_size == 224
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_overrides_are_dotted_and_typed(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", MINIMAL)
    fields = {"optim.lr": "1e-3", "encoder.patch": "8", "data.mean": "[0.1, 0.2, 0.3]", "objective.view.crop_scale": "null",
              "train.epochs": None, "train.steps": "7", "data.train": "a-{000..009}.tar", "eval.k": "[5]"}  # fmt: skip
    recipe = load(path, fields)
    assert (recipe.optim.lr, recipe.encoder.patch, recipe.data.mean, recipe.train.steps) == (
        1e-3,
        8,
        (0.1, 0.2, 0.3),
        7,
    )
    assert recipe.objective.view.crop_scale is None  # type: ignore[attr-defined]
    assert (recipe.data.train, recipe.eval.k) == ("a-{000..009}.tar", (5,))


def test_paths_are_taken_to_the_letter(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", MINIMAL)
    for text in ("*.tar", "{a,b}.tar", "a: b", "x #2", "2026", "&a"):
        assert load(path, {"data.train": text}).data.train == text
        assert str(load(path, {"run_dir": text}).run_dir) == text
    assert load(path, {"data.train": "[a.tar, b.tar]"}).data.train == ["a.tar", "b.tar"]
    assert load(path, {"eval.train": "null"}).eval.train is None


def test_bases_are_inherited(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", MINIMAL + "optim: {lr: 1.0, clip: 2.0}\nseed: 1\n")
    write(tmp_path / "sub" / "b.yaml", "base: ../a.yaml\noptim: {lr: 0.5}\n")
    recipe = load(write(tmp_path / "sub" / "c.yaml", "base: b.yaml\nseed: 2\n"))
    assert (recipe.optim.lr, recipe.optim.clip, recipe.seed) == (0.5, 2.0, 2)
    with pytest.raises(UsageError, match="circular"):
        load(write(tmp_path / "d.yaml", "base: d.yaml"))
    with pytest.raises(UsageError, match=r"base: 'none.yaml' is not a file beside it"):
        load(write(tmp_path / "e.yaml", "base: none.yaml"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("optim: {lrr: 1}", r"optim.lrr: no such field; did you mean optim.lr"),
        ("learning_rate: 1", r"learning_rate: no such field"),
        ("lr: 1", r"lr: no such field; did you mean optim.lr"),
        ("mask_ratio: 1", r"mask_ratio: no such field"),
        ("optim: {lr: fast}", r"optim.lr: .*valid number.*not 'fast'"),
        ("optim: {lr: .nan}", r"optim.lr: "),
        ("optim: {lr: -1}", r"optim.lr: .*greater than 0.*not -1"),
        ("encoder: {depth: 2.5}", r"encoder.depth: .*integer"),
        ("encoder: 3", r"encoder: "),
        ("train: {}", r"give either epochs or steps"),
        ("train: {epochs: 1, steps: 2}", r"give either epochs or steps \(.* --train.epochs null\)"),
        ("train: {checkpoint_blocks: foo}", r"^\S+: train.checkpoint_blocks: must be auto, true or false, not 'foo'$"),
        ("train: {checkpoint_blocks: 3}", r"^\S+: train.checkpoint_blocks: must be auto, true or false, not 3$"),
        (
            "data: {train: null, mix: [{train: [3, 4]}]}",
            r"^\S+: data.mix.0.train: must be str or list\[str\], not \[3, 4\]$",
        ),
        ("data: {train: 3}", r"^\S+: data.train: must be str, list\[str\] or null, not 3$"),
        ("data: {train: [3, 4]}", r"^\S+: data.train: must be str, list\[str\] or null, not \[3, 4\]$"),
        ("train: {epochs: 1, batch_size: 10, accumulate: 3}", r"batch_size 10 is not a multiple of accumulate 3"),
        ("objective: {name: mea}", r"objective.name: no objective 'mea'; did you mean mae"),
        ("objective: {mask_ratio: 0.5}", r"objective.name: no objective None"),
        (
            "objective: {name: mae, mask_ration: 0.5}",
            r"objective.mask_ration: no such field; did you mean objective.mask_ratio",
        ),
        ("objective: {name: mae, mask_ratio: 1.5}", r"objective.mask_ratio: .*less than 1"),
        ("objective: mae", r"objective: "),
        ("objective: {name: [a]}", r"objective.name: no objective"),
        ("seed: 18446744073709551616", r"seed: "),
        ("data: {}", r"data: give either train or mix"),
        ("data: {train: x, range: [5, 5]}", r"data.range: give two finite numbers, the lower first"),
        ("data: {train: x, range: [10, 5.5]}", r"data.range: give two finite numbers, the lower first"),
        ("data: {train: x, range: [.nan, 5]}", r"data.range.0: .*finite"),
        ("data: {train: x, range: [-.inf, 5]}", r"data.range.0: .*finite"),
        ("data: {train: x, range: [-1.7e308, 1.7e308]}", r"data.range: give two finite"),
    ],
)
def test_wrong_fields_are_named_with_their_neighbours(tmp_path: Path, more: str, message: str) -> None:
    tree = plainyaml.parse(MINIMAL, "t") | plainyaml.parse(more, "t")
    with pytest.raises(UsageError, match=message):
        load(write(tmp_path / "r.yaml", plainyaml.dump(tree)))


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", MINIMAL)
    with pytest.raises(UsageError) as told:
        load(path, {"optim.lr": "x", "objective.mask_ratio": "2", "sed": "1"})
    assert {line.partition("r.yaml: ")[2].partition(":")[0] for line in str(told.value).splitlines()} == {
        "optim.lr",
        "objective.mask_ratio",
        "sed",
    }


def test_missing_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such recipe; nearest: recipes/digits/mae.yaml"):
        load("recipes/digits/mea.yaml")
    with pytest.raises(UsageError, match="no such recipe"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="a mapping of keys"):
        load(write(tmp_path / "r.yaml", "- 1"))


@pytest.mark.parametrize("name", [name for name, _ in packaged_recipes()])
def test_packaged_recipes_are_valid_and_repeat_themselves(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    assert load("recipes/" + name) == recipe == load(name.removesuffix(".yaml"))
    resolved = write(tmp_path / "recipe.yaml", recipe.to_yaml())
    assert load(resolved) == recipe
    assert plainyaml.parse(recipe.to_yaml(), "t").keys() == Recipe.model_fields.keys()


def test_every_packaged_recipe_can_be_built() -> None:
    """Without memory, on the meta device: names, widths, grids, masks, heads and views fit each other."""
    for name, _ in packaged_recipes():
        recipe = load(name)
        teacher = getattr(recipe.objective, "teacher", None)
        with torch.device("meta"):
            encoder = build_encoder(recipe.encoder, preprocessing_of(recipe.data, recipe.encoder), 0)
            if teacher is None:
                assert build_objective(recipe.objective, encoder).views, name
        if teacher and not (packaged() / teacher).is_dir():  # a run of another recipe, or a model that timm can fetch
            runs = [str(load(other).run_dir) for other, _ in packaged_recipes()]
            assert teacher in runs or timm.get_pretrained_cfg(teacher).has_weights, name
