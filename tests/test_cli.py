"""Bad input at the command line: a line or two that say what, where and what to do, the right exit code, nothing lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, pictures
from safetensors.torch import save_file

from selfsight import checkpoint, cli
from selfsight.data.build import write_shards
from selfsight.encoder import build_encoder, preprocessing_of
from selfsight.errors import StorageError
from selfsight.exports.export import export
from selfsight.recipe import DataConfig, EncoderConfig
from selfsight.run_folder import RunLock

Fields = dict[str, Any]


def words(fields: Fields) -> list[str]:
    return [word for key, value in fields.items() for word in (f"--{key}", "null" if value is None else str(value))]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with a code and at most three lines; the answer is what it said."""

    def run(code: int, *arguments: Any) -> str:
        assert cli.main([str(argument) for argument in arguments]) == code
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert 1 <= len(told.strip().splitlines()) <= 3, told
        assert all(line.startswith("selfsight: ") for line in told.strip().splitlines()), told
        return told

    return run


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"optim.lrr": 1}, 2, "optim.lrr: no such field; did you mean optim.lr"),
        ({"optim.lr": "fast"}, 2, "optim.lr: Input should be a valid number"),
        ({"data.train": "/nowhere/*.tar"}, 65, "data.train: /nowhere/*.tar: no shards match; say where"),
        ({"data.train": "null", "data.mix": "[{train: /nowhere.tar}]"}, 65, "data.mix: 1 of 1 shards are missing"),
        (
            {"data.train": "/nowhere/a.tar"},
            65,
            "data.train: 1 of 1 shards are missing: /nowhere/a.tar; say where yours are: --data.train PATH",
        ),
        ({"train.batch_size": 500}, 2, "train.batch_size: 500 images, but"),
        ({"encoder.image_size": 9}, 2, "encoder.image_size: 9 is not a multiple of the patch of 2 pixels"),
        ({"encoder.name": "vit_tini"}, 2, "timm has no model 'vit_tini'; did you mean"),
        ({"objective.mask_ratio": 0.999}, 2, "leaves 0 visible"),
        ({"encoder.weights": "/nowhere.safetensors"}, 2, "neither a .safetensors file"),
        ({"data.mean": "[0.1, 0.2]"}, 2, "data.mean: has 2 values for 1 channels"),
        (
            {"eval.train": "/nowhere.tar", "eval.test": "/nowhere.tar"},
            65,
            "eval: 1 of 1 shards are missing: /nowhere.tar",
        ),
        (
            {"eval.train": "digits:train", "eval.test": "/nowhere.tar"},
            65,
            "/nowhere.tar; say where yours are (--eval.train",
        ),
        ({"eval.test": "digits:test"}, 2, "eval.test: needs eval.train"),
        ({"eval.train": "digits:train", "eval.k": "[2000]"}, 2, "k = 2000: the bank has only 1295 samples"),
    ],
)
def test_a_wrong_recipe(
    small_fields: Fields, fails: Callable[..., str], fields: Fields, code: int, message: str
) -> None:
    assert message in fails(code, "pretrain", "digits/mae", *words(small_fields | fields))


def test_a_missing_recipe_and_stray_words(fails: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such recipe; nearest: recipes/digits/mae.yaml" in fails(2, "pretrain", "recipes/digits/mea.yaml")
    assert "--help takes no value" in fails(2, "pretrain", "digits/mae", "--help=1")
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "digits/mae", "extra"])
    assert stop.value.code == 2
    capsys.readouterr()
    assert "no such recipe" in fails(2, "pretrain", "--seed", "1", "digits/mea")  # fields may stand before the recipe
    assert "--optim.lr needs a value" in fails(2, "pretrain", "digits/mae", "--optim.lr")


def test_weights_of_another_architecture(small_fields: Fields, tmp_path: Path, fails: Callable[..., str]) -> None:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=2, heads=2)
    other = build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0)
    save_file(other.backbone.state_dict(), tmp_path / "w.safetensors")
    told = fails(2, "pretrain", "digits/mae", *words(small_fields | {"encoder.weights": tmp_path / "w.safetensors"}))
    assert "is of another architecture; tensors 12 unexpected: blocks.1." in told


def test_a_stale_index(small_fields: Fields, tmp_path: Path, fails: Callable[..., str]) -> None:
    write_shards(iter(pictures(30)), tmp_path, "s")
    shard = tmp_path / "s-000000.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    told = fails(65, "pretrain", "digits/mae", *words(small_fields | {"data.train": tmp_path}))
    assert "is stale: the shard has" in told
    assert f"selfsight shards index {shard}" in told


def test_a_folder_in_use_and_a_folder_of_another_recipe(small_fields: Fields, fails: Callable[..., str]) -> None:
    folder = Path(small_fields["run_dir"])
    with RunLock(folder):
        assert f"in use by process {os.getpid()} on " in fails(2, "pretrain", "digits/mae", *words(small_fields))
        assert sorted(os.listdir(folder)) == ["run.lock"]
    assert cli.main(["pretrain", "digits/mae", *words(small_fields)]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code = cli.main(["pretrain", "digits/mae", *words(small_fields | {"seed": 5})])
    assert code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_no_space_for_the_first_checkpoint(small_fields: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("runs: a checkpoint needs 9 MiB, 1 MiB are free")

    monkeypatch.setattr(checkpoint, "_require_space", full)
    assert cli.main(["pretrain", "digits/mae", *words(small_fields)]) == 74
    lines = (Path(small_fields["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1  # found at step 1, not after an hour


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file-size limit to set here")
def test_a_really_full_disk(small_fields: Fields) -> None:
    """A limit on the size of files stands for the full disk: writing the checkpoint fails as it would there."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000));"
        "from selfsight.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", "digits/mae", *words(small_fields | {"encoder.width": 64})],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 74, done.stderr
    assert "could not be written" in done.stderr
    assert os.listdir(Path(small_fields["run_dir"]) / "checkpoints") == []


def test_eval_of_unsuitable_data(tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    config = EncoderConfig(image_size=8, channels=1, patch=2, width=16, depth=1, heads=2)
    export(build_encoder(config, preprocessing_of(DataConfig(train="x"), config), 0), tmp_path / "enc", {})
    for name, samples in (
        ("none", [(image, None) for image, _ in pictures(30)]), ("one", pictures(30, classes=1)), ("two", pictures(30)), ("three", pictures(30, classes=3)),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write_shards(iter(samples), tmp_path / name, "s")

    def told(code: int, train: str, test: str, *more: str) -> str:
        assert (
            cli.main(
                ["eval", str(tmp_path / "enc"), "--train", str(tmp_path / train), "--test", str(tmp_path / test), *more]
            )
            == code
        )
        return capsys.readouterr().err.splitlines()[-1]

    assert "30 of 30 samples have no label; scores need labels" in told(2, "none", "two")
    assert "all 30 samples have the label 0; scores need two classes" in told(2, "one", "two")
    assert "test has 1 classes that train lacks: 2" in told(2, "two", "three")
    assert "the bank has only 27 samples; choose k of at most 27" in told(2, "two", "two", "--k", "28")
    assert "--k: 'x' is not a list of whole numbers" in told(2, "two", "two", "--k", "x")
    assert "no evaluator knm" in told(2, "two", "two", "--with", "knm")
    assert "nor a model that timm knows" in fails(
        2, "eval", "nothing", "--train", tmp_path / "two", "--test", tmp_path / "two"
    )


def test_unsuitable_labels_are_said_before_the_training(
    small_fields: Fields, tmp_path: Path, fails: Callable[..., str]
) -> None:
    """A week of training must not end in a complaint about the labels that were to score it."""
    for name, samples in (("none", [(image, None) for image, _ in pictures(30)]), ("three", pictures(30, classes=3))):
        (tmp_path / name).mkdir()
        write_shards(iter(samples), tmp_path / name, "s")
    for train, test, message in (
        ("digits:train", tmp_path / "none", "30 of 30 samples have no label"),
        (tmp_path / "none", "digits:test", "30 of 30 samples have no label"),
        (tmp_path / "three", "digits:test", "test has 7 classes that train lacks: 3, 4"),
    ):
        assert message in fails(
            2, "pretrain", "digits/mae", *words(small_fields | {"eval.train": train, "eval.test": test})
        )
        assert not (Path(small_fields["run_dir"]) / "metrics.jsonl").exists()


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--debug", "pretrain", "nothing"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_workers_error_is_its_message(
    small_fields: Fields, tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(iter(pictures(30)), tmp_path, "s")
    shard = tmp_path / "s-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    assert (
        cli.main(["pretrain", "digits/mae", *words(small_fields | {"data.train": tmp_path, "train.workers": 1})]) == 65
    )
    told = capsys.readouterr().err
    assert (
        told.splitlines()[-1]
        == "selfsight: the run ended after step 0 of 6; run the same command to go on when that is mended"
    )
    assert told.splitlines()[-2].startswith("selfsight: 17 samples in a row are bad, last: s-000000.tar@")
    assert "Traceback" not in told


def test_recipes_are_listed_and_their_schema_is_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    assert "digits/mae.yaml" in capsys.readouterr().out
    assert cli.main(["recipes", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["optim"]


def test_quickstart_runs_on_overrides(
    small_fields: Fields, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfsight.eval.linear.LEAST_STEPS", 20)
    monkeypatch.setattr("selfsight.eval.linear.EPOCHS", 1)
    assert (
        cli.main(
            [
                "quickstart",
                *words(
                    small_fields
                    | {"data.train": "digits:train", "eval.train": "digits:train", "eval.test": "digits:test"}
                ),
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert "random-init" in shown.out
    assert "Raw pixels are hard to beat here" in shown.err
    assert "report.html" in shown.err
    assert 'timm.create_model("local-dir:' in shown.err


def test_launch_sh_helps_and_refuses() -> None:
    done = subprocess.run([ROOT / "launch.sh"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "./launch.sh quickstart" in done.stdout
    assert "#" not in done.stdout
    environment = {**os.environ, "NODES": "2", "VIRTUAL_ENV": sys.prefix, "PROCESSES": "1"}
    done = subprocess.run([ROOT / "launch.sh", "digits/mae"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (
        2,
        "launch.sh: NODES=2 needs MASTER_ADDR, the name of the first machine\n",
    )
