"""Classes by name: folders number their own in alphabetical order, so that a number may mean two things."""

from pathlib import Path

import pytest
from conftest import pictures

from selfsight.data.build import build
from selfsight.data.classes import class_names
from selfsight.data.folders import Reading
from selfsight.data.shards import Shards
from selfsight.errors import DataError, UsageError
from selfsight.eval.evaluate import scorable_sets


def packed(folder: Path, name: str, classes: list[str], like: Path | None = None) -> Path:
    for number, (image, _) in enumerate(pictures(10 * len(classes))):
        place = folder / "pictures" / name / classes[number % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number}.png")
    build(str(folder / "pictures" / name), folder / name, reading=Reading(classes=like))
    return folder / name


def test_a_number_that_means_two_classes_is_refused(tmp_path: Path) -> None:
    train = packed(tmp_path, "train", ["circle", "cross", "square"])
    test = packed(tmp_path, "test", ["circle", "square"])
    with pytest.raises(
        UsageError, match=rf"'square' is class 1 there, but class 2 in .*train; build it again with: --classes {train}"
    ):
        scorable_sets(str(train), str(test), (3,))
    again = packed(tmp_path, "again", ["circle", "square"], train)
    scorable_sets(str(train), str(again), (3,))
    assert sorted(set(Shards(str(again)).labels.tolist())) == [0, 2]
    assert class_names(Shards(str(again))) == ["circle", "cross", "square"]
    with pytest.raises(UsageError, match="has 1 classes that train lacks: hexagon"):
        scorable_sets(str(train), str(packed(tmp_path, "more", ["circle", "hexagon", "square"])), (3,))
    with pytest.raises(UsageError, match="hexagon are not among the classes circle, cross, square"):
        packed(tmp_path, "other", ["circle", "hexagon"], train)


def test_names_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    train = packed(tmp_path, "train", ["a", "b"])
    for rubbish in ("{", "3"):
        (train / "classes.json").write_text(rubbish)
        with pytest.raises(DataError, match="is no list of names; remove or repair it"):
            class_names(Shards(str(train)))
    with pytest.raises(DataError, match="is no list of names"):
        packed(tmp_path, "test", ["a", "b"], tmp_path / "nowhere")
