"""The first 20 losses of every digits recipe, to four digits: a change that should not change what is learned does not.

A change that should: `SELFSIGHT_GOLDEN=write pytest tests/test_golden.py` writes them anew, and the commit says why.
"""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT

from selfsight.assemble import assemble
from selfsight.processes import join
from selfsight.recipe import load
from selfsight.run_folder import read_lines
from selfsight.train import train

GOLDEN = Path(__file__).with_name("golden.json")
RECIPES = sorted(path.stem for path in (ROOT / "recipes" / "digits").glob("*.yaml"))
FIELDS = {
    "train.steps": 20,
    "train.epochs": None,
    "train.log_every": 1,
    "train.workers": 0,
    "eval.train": None,
    "eval.test": None,
}


def losses(name: str, run_dir: Path) -> list[float]:
    recipe = load(f"digits/{name}", FIELDS | {"run_dir": str(run_dir)})
    run_dir.mkdir()
    accelerator = join(recipe)
    train(assemble(recipe, accelerator.device), accelerator)
    return [line["loss"] for line in read_lines(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_losses_are_those_that_were_written_down(name: str, tmp_path: Path) -> None:
    found = losses(name, tmp_path / "run")
    if os.environ.get("SELFSIGHT_GOLDEN") == "write":
        known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(
            json.dumps(known | {name: [float(f"{loss:.6g}") for loss in found]}, indent=1, sort_keys=True)
        )
    assert len(found) == 20
    assert found == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-3)
    assert min(found[10:]) < max(found[:10])
