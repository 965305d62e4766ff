"""Features in files: written and read again, anybody's arrays, and everything that cannot be right."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import selfsight as ss
from selfsight import cli
from selfsight.data.shards import Shards
from selfsight.encoder import Encoder, build_encoder, preprocessing_of
from selfsight.errors import DataError, NumericError, SelfsightError, UsageError
from selfsight.eval.embed import embed, embed_to, require_writable_as, stored
from selfsight.eval.evaluate import evaluate
from selfsight.eval.features import PLAIN
from selfsight.eval.labels import same_width
from selfsight.eval.stored import read
from selfsight.recipe import DataConfig, EncoderConfig

SETS = ("digits:train", "digits:test")


def made(seed: int = 0) -> Encoder:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    return build_encoder(config, preprocessing_of(DataConfig(train="x"), config), seed).eval()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return made()


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_stored_features_score_as_the_encoder_does(encoder: Encoder, tmp_path: Path, ending: str) -> None:
    files = [tmp_path / f"{spec.partition(':')[2]}.{ending}" for spec in SETS]
    told = [
        embed_to(file, stored(encoder, spec, ["mean", "cls"], PLAIN)) for file, spec in zip(files, SETS, strict=True)
    ]
    assert told[0] == f"{files[0]}: 1,438 samples, mean 16, cls 16"
    live = evaluate(encoder, *SETS, evaluators=["knn"], pools=["mean", "cls"])
    found = evaluate(None, *map(str, files), evaluators=["knn"])
    ours, theirs = found["scores"][0], live["scores"][0]
    assert [score["encoder"] for score in found["scores"]] == ["stored", "majority"]
    assert {k: v for k, v in ours.items() if k not in ("encoder", "train", "test", "dataset")} == {
        k: v for k, v in theirs.items() if k not in ("encoder", "train", "test", "dataset")
    }
    assert found["scores"][1]["value"] == live["scores"][-1]["value"]
    again = read(files[0])
    assert again.about["data"] == "digits:train"
    assert again.pool == "mean"
    assert again.prints is not None and (again.prints == Shards("digits:train").prints).all()
    same = evaluate(None, str(files[1]), str(files[1]), evaluators=["knn"])
    assert same["warnings"] == ["359 of the 359 test images are in train, too; their score is worth little"]


def test_embed_in_python(encoder: Encoder) -> None:
    features = ss.embed(encoder, "digits:test", pools=["cls"])
    assert list(features.vectors) == ["cls"]
    assert list(embed(encoder, "digits:test").vectors) == ["mean"]
    assert features.labels.tolist() == Shards("digits:test").labels.tolist()
    with pytest.raises(UsageError, match=r"no pool gym; this encoder has mean, cls"):
        embed(encoder, "digits:test", pools=["gym"])
    with pytest.raises(UsageError, match="attentive: is learned by the linear probe"):
        embed(encoder, "digits:test", pools=["attentive"])


def arrays(count: int = 40, width: int = 6, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return {"features": rng.normal(size=(count, width)).astype(np.float32) + 2 * labels[:, None], "labels": labels}


def save(folder: Path, name: str = "a.npz", **more: Any) -> str:
    np.savez(folder / name, **{key: value for key, value in (arrays() | more).items() if value is not None})
    return str(folder / name)


def test_anybodys_arrays(tmp_path: Path) -> None:
    test = arrays(30, seed=1)
    scores = []
    np.savez(tmp_path / "a.npz", **arrays())
    np.savez(tmp_path / "b.npz", **test)
    for name, own in (("a", arrays()), ("b", test)):
        save_file({key: torch.from_numpy(value) for key, value in own.items()}, tmp_path / f"{name}.safetensors")
        np.save(tmp_path / f"{name}.npy", own["features"].astype(np.float64))
        np.save(tmp_path / f"{name}.labels.npy", own["labels"].astype(np.uint32))
    for ending in ("npz", "safetensors", "npy"):
        found = evaluate(None, str(tmp_path / f"a.{ending}"), str(tmp_path / f"b.{ending}"), evaluators=["knn"], k=(3,))
        scores.append(found["scores"][0]["value"])
    assert scores[0] == scores[1] == scores[2] > 90
    grouped = read(save(tmp_path, "g.npz", groups=np.arange(40) // 4))
    assert grouped.features.groups.tolist() == (np.arange(40) // 4).tolist()
    lists = read(save(tmp_path, "l.npz", labels=np.eye(40, 3, dtype=np.uint8)))
    assert lists.features.multilabel and lists.features.labels.dtype == torch.bool
    several = read(
        save(tmp_path, "p.npz", **{"features": None, "features.b": np.ones((40, 2)), "features.a": np.ones((40, 3))})
    )
    assert list(several.features.vectors) == ["b", "a"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "object labels": ({"labels": np.array(["cat", 3] * 20, object)}, "it holds Python objects, which are never unpickled"),
    "object features": ({"features": np.array([[1.0], None], object)}, "never unpickled"),
    "no features": ({"features": None}, "holds labels, but no `features`"),
    "one axis": ({"features": np.ones(40, np.float32)}, r"features are float32 of shape \(40,\); they must be"),
    "integers": ({"features": np.ones((40, 3), np.int64)}, "features are int64 of shape"),
    "no columns": ({"features": np.ones((40, 0), np.float32)}, "they must be floating point"),
    "shorter labels": ({"labels": np.arange(39) % 2}, r"labels are int64 of shape \(39,\), but there are 40 features"),
    "halves": ({"labels": np.arange(40) / 2}, "labels are not whole numbers"),
    "below": ({"labels": np.arange(40) - 3}, "label -3 is below 0"),
    "counts": ({"labels": np.full((40, 3), 2)}, "lists of labels are"),
    "groups": ({"groups": np.zeros((2, 2), np.int64)}, "groups are int64 of shape"),
    "lengths": ({"features.a": np.ones((30, 3)), "features.b": np.ones((40, 3))}, "pools of different lengths, 30, 40"),
    "words": ({"labels": np.array(["a"] * 40)}, "cannot be read as stored features"),
    "hashes": ({"hashes": np.zeros((40, 3), np.uint8)}, "hashes are uint8 of shape"),
    "prints": ({"prints": np.zeros(3, np.int64)}, "prints are int64 of shape"),
    "prints of 32 bits": ({"prints": np.zeros(40, np.int32)}, "prints are int32 of shape"),
    "prints of floats": ({"prints": np.zeros(40)}, "prints are float64 of shape"),
    "one column": ({"labels": np.arange(40)[:, None] % 2}, r"labels are int64 of shape \(40, 1\); .* single labels are"),
    "pools of a number": ({"about": np.array('{"pools": 5}')}, "pools that are no list of names"),
    "pools of lists": ({"about": np.array('{"pools": [["a"]]}')}, "pools that are no list of names"),
    "pools of NaN": ({"about": np.array('{"pools": NaN}')}, "pools that are no list of names"),
    "deep": ({"about": np.array("[" * 99999)}, "cannot be read as stored features"),
    "about": ({"about": np.array("[1]")}, "what is told about it is no object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_right_is_refused(tmp_path: Path, case: str) -> None:
    change, told = BAD[case]
    with pytest.raises(DataError, match=told):
        read(save(tmp_path, **change))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    broken = arrays()["features"]
    broken[3, 2] = broken[5, 1] = value
    with pytest.raises(NumericError, match=r"not finite \(features, 2 of 40 samples of .*a.npz\)"):
        read(save(tmp_path, features=broken))


@pytest.mark.parametrize("ending", ["npz", "npy", "safetensors"])
@pytest.mark.parametrize("body", [b"", b"PK\3\4", b"\x93NUMPY", pickle.dumps({"features": [1]}), b"\xff" * 99])
def test_files_of_another_kind_are_refused(tmp_path: Path, ending: str, body: bytes) -> None:
    (tmp_path / f"a.{ending}").write_bytes(body)
    with pytest.raises(DataError, match="cannot be read as stored features"):
        read(tmp_path / f"a.{ending}")
    with pytest.raises(DataError, match="not found"):
        read(tmp_path / f"b.{ending}")


def test_sets_that_do_not_go_together_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    first, wide = save(tmp_path), save(tmp_path, "wide.npz", features=np.ones((40, 9), np.float32))

    def refused(kind: type[SelfsightError], told: str, *given: Any, **more: Any) -> None:
        with pytest.raises(kind, match=told):
            evaluate(*given, **({"evaluators": ["knn"], "k": (3,)} | more))

    refused(
        DataError,
        r"a.npz has features of width features 6, .*wide.npz of features 9: not of one encoder",
        None,
        first,
        wide,
    )
    refused(UsageError, "one holds features, the other images", None, first, "digits:test")
    refused(UsageError, "a.npz: holds features; leave the encoder out", encoder, first, first)
    refused(UsageError, "digits:test: holds images; name an encoder", None, "digits:train", "digits:test")
    none = save(tmp_path, "none.npz", labels=None)
    refused(UsageError, "none.npz: 40 of 40 samples have no label; scores need labels", None, none, first)
    one = save(tmp_path, "one.npz", labels=np.full(40, 3))
    refused(UsageError, "one.npz: all 40 samples have the label 3; scores need two classes", None, first, one)
    new = save(tmp_path, "new.npz", labels=np.arange(40) % 3)
    refused(UsageError, "test has 1 classes that train lacks: 2", None, first, new)
    lists = save(tmp_path, "lists.npz", labels=np.eye(40, 3))
    refused(UsageError, "train has single labels, test has lists of labels", None, first, lists)
    refused(UsageError, "k = 99: the bank has only 36 samples", None, first, first, k=(99,))
    wider = np.zeros((40, 5))
    wider[:, 4] = 1
    refused(
        UsageError, "test has 1 classes that train lacks: 4", None, lists, save(tmp_path, "wider.npz", labels=wider)
    )
    files = [tmp_path / "x.npz", tmp_path / "y.npz"]
    embed_to(files[0], stored(encoder, "digits:train", None, PLAIN))
    embed_to(files[1], stored(made(1), "digits:test", None, PLAIN))
    refused(DataError, "hold features of different encoders", None, str(files[0]), str(files[1]))


def test_lists_of_fewer_classes_are_padded() -> None:
    fit, held = torch.ones(4, 5, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)
    padded = same_width(fit, held)
    assert [own.shape for own in padded] == [(4, 5), (3, 5)]
    assert padded[1].sum(0).tolist() == [3, 3, 0, 0, 0]
    assert [own.shape for own in same_width(held, fit)] == [(3, 5), (4, 5)]
    single = torch.arange(4)
    assert same_width(single, single) == (single, single)


def test_embed_from_the_command_line(
    encoder: Encoder, tmp_path: Path, unchecked_export: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from selfsight.exports.export import export

    export(encoder, tmp_path / "enc", {})
    for spec in SETS:
        assert cli.main(["embed", str(tmp_path / "enc"), spec, str(tmp_path / f"{spec[7:]}.safetensors")]) == 0
    assert f"{tmp_path / 'train.safetensors'}: 1,438 samples, mean 16" in capsys.readouterr().out
    files = ["--train", str(tmp_path / "train.safetensors"), "--test", str(tmp_path / "test.safetensors")]
    assert cli.main(["eval", *files, "--with", "knn", "--json"]) == 0
    shown = capsys.readouterr()
    assert {score["encoder"] for score in json.loads(shown.out)["scores"]} == {"stored", "majority"}
    assert "random-init and pixels would need the model and the images" in shown.err


@pytest.mark.parametrize("name", ["x.pt", "x.npy", "folder.npz"])
def test_a_target_that_cannot_be_written_is_told_before_anything_is_encoded(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UsageError, match=r"written as \.safetensors or \.npz|is a folder"):
        require_writable_as(tmp_path / name)
