"""The house itself: what must not shadow Python, what the wheel holds, what the command answers."""

import json
import os
import re
import ssl
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import selfsight
from selfsight import cli, fields
from selfsight.recipe import packaged_recipes
from selfsight.section import field_names


def test_ssl_at_the_root_is_pythons() -> None:
    assert not (ROOT / "ssl" / "__init__.py").exists()
    assert ssl.create_default_context()
    done = subprocess.run(
        [sys.executable, "-c", "import ssl, sys; print(ssl.__file__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stdout.startswith(str(ROOT / "ssl"))


def test_runs_from_a_checkout_that_is_not_installed() -> None:
    code = (
        "import sys; sys.path.insert(0, 'ssl'); import selfsight.data.order, selfsight.eval; print(selfsight.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "ssl" / "selfsight" / "__init__.py"


def test_runs_from_a_checkout_without_symbolic_links(tmp_path: Path) -> None:
    for name in ("ssl/selfsight", "data", "eval", "recipes"):
        for file in (ROOT / name).glob("*"):
            if file.is_file():
                target = tmp_path / name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    code = "import sys; sys.path.insert(0, 'ssl'); import selfsight.data.order as o; print(o.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "data" / "order.py"


def test_the_wheel_holds_every_package_file_once(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, capture_output=True, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert len(names) == len(set(names))
    for source, target in (
        ("ssl/selfsight", "selfsight"),
        ("data", "selfsight/data"),
        ("eval", "selfsight/eval"),
        ("recipes", "selfsight/recipes"),
    ):
        for file in (ROOT / source).rglob("*"):
            linked = source == "ssl/selfsight" and file.relative_to(ROOT / source).parts[0] in {
                "data",
                "eval",
                "recipes",
            }
            if file.is_file() and "__pycache__" not in file.parts and not linked:
                assert f"{target}/{file.relative_to(ROOT / source).as_posix()}" in names


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, selfsight, selfsight.cli, selfsight.fields; assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_starts_without_what_only_scoring_needs() -> None:
    """scikit-learn, scipy and pandas take more than a second to import."""
    code = "import sys, selfsight.train; assert not {'sklearn', 'scipy', 'pandas', 'transformers', 'onnx'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in selfsight.__all__:
        assert callable(getattr(selfsight, name))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        selfsight.nothing_of_the_kind  # noqa: B018


def test_help_lists_every_field_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    shown = capsys.readouterr().out
    for name, field in field_names(fields.Recipe):
        if name != "objective":
            assert f"--{name} " in shown
            assert field.description, name
    assert "--objective.mask_ratio  (float; default 0.75)" in shown


def test_the_committed_schema_is_the_recipes_own() -> None:
    assert json.loads((ROOT / "recipes" / "schema.json").read_text()) == fields.json_schema()


def test_the_knobs_are_these() -> None:
    """A new knob is a decision: add it here with the change that needs it."""
    names = {name for name, _ in field_names(fields.Recipe)}
    assert names == {
        "run_dir", "seed", "objective", "track",
        "data.train", "data.block", "data.mix", "data.mean", "data.std", "data.interpolation", "data.crop_pct", "data.depth", "data.range", "data.frame_step", "data.repeat", "data.cache", "data.fast_decode", "data.decode", "data.bad_share",
        "encoder.name", "encoder.image_size", "encoder.channels", "encoder.patch", "encoder.width", "encoder.depth",
        "encoder.heads", "encoder.class_token", "encoder.registers", "encoder.drop_path", "encoder.positions", "encoder.init",
        "encoder.weights", "encoder.pool", "encoder.frames", "encoder.tube", "encoder.channel_tokens", "encoder.channel_sampling",
        "optim.lr", "optim.min_lr", "optim.warmup", "optim.weight_decay", "optim.weight_decay_end", "optim.betas", "optim.layer_decay", "optim.clip",
        "train.epochs", "train.steps", "train.batch_size", "train.accumulate", "train.precision", "train.device",
        "train.compile", "train.cuda_graphs", "train.checkpoint_blocks", "train.workers", "train.threads", "train.ema", "train.on_collapse", "train.on_nonfinite", "train.deterministic", "train.parallel", "train.timeout",
            "train.log_every", "train.save_every", "train.keep", "train.keep_every",
        "eval.train", "eval.test", "eval.every", "eval.k", "eval.online_samples",
    }  # fmt: skip


def test_every_recipe_says_what_it_is_and_how_to_run_it() -> None:
    found = packaged_recipes()
    assert found
    for name, summary in found:
        head = (ROOT / "recipes" / name).read_text().split("\nrun_dir")[0].split("\nbase")[0]
        assert len(summary) > 20
        assert re.search(r"selfsight (pretrain|shards)", head), f"{name}: no command on top"


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert selfsight.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretain"])
    assert stop.value.code == 2


def test_an_error_is_lines_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "digits/mea"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("selfsight: digits/mea: no such recipe; nearest: recipes/digits/mae.yaml")
    assert shown.count("\n") == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "x", "--train", "a", "--test", "b", "--wrong", "1"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --wrong" in capsys.readouterr().err


def test_the_names_of_evaluators_are_known_before_torch_is() -> None:
    from selfsight.eval import DEFAULT, NAMES
    from selfsight.eval.evaluators import EVALUATORS

    assert tuple(EVALUATORS) == NAMES and set(DEFAULT) < set(NAMES)
    asked = "import sys, selfsight.cli; sys.exit(selfsight.cli.main(['eval', 'x', '--test', 'digits:test', '--with', 'knm']) + 10 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, env=os.environ).returncode == 2
