"""After the last step: the export, scores of exactly that export, and the report."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from selfsight import __version__, checkpoint, console
from selfsight.assemble import Parts, assemble, libraries
from selfsight.errors import Stopped, UsageError
from selfsight.eval.evaluate import evaluate
from selfsight.eval.ranks import ALONE, Ranks
from selfsight.exports.card import facts_of, hardware_of, weights_of
from selfsight.exports.export import export, timm_line, write_card_again
from selfsight.faults import faultpoint
from selfsight.quarantine import replaced
from selfsight.recipe import load
from selfsight.report import require_page, told_briefly, write_report
from selfsight.run_folder import write_atomically
from selfsight.score_tables import scores_of


def finish(parts: Parts, device: torch.device, workers: int, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Export, score, report. Done again from the last checkpoint when it was interrupted; kept when it was not.

    Args:
        ranks: all processes of the run, each with its share of the features; the first does everything else.

    Returns:
        What scores.json holds; empty on other ranks than the first.
    """
    faultpoint("finish")
    scores_file = parts.recipe.run_dir / "scores.json"  # written last
    finished = ranks.told(ranks.main and scores_file.exists())
    if ranks.main and finished:
        console.say(f"{parts.recipe.run_dir}: is finished; remove it, or name another run_dir, to run again")
        return read_scores(scores_file)
    if not ranks.main:
        if not finished and ranks.told(False):  # once the export is there
            _scores(parts, device, workers, ranks)
        return {}
    return _finish(parts, device, workers, ranks)


def _finish(parts: Parts, device: torch.device, workers: int, ranks: Ranks) -> dict[str, Any]:
    recipe, folder = parts.recipe, parts.recipe.run_dir
    scores_file = folder / "scores.json"
    provenance = {
        "version": __version__,
        "steps": parts.steps,
        "data": parts.shards.id,
        "recipe": recipe.model_dump(mode="json"),
        "hardware": hardware_of(device),
        "libraries": libraries(),
    }
    difference = export(parts.scored, folder / "encoder", provenance)
    console.say(f"exported to {folder / 'encoder'}; timm's features differ by {difference:.1e} at most")
    scores: dict[str, Any] = {"scores": []}
    if ranks.told(bool(recipe.eval.train and recipe.eval.test)):
        scores = _scores(parts, device, workers, ranks)
    scores["weights"] = weights_of(folder / "encoder")
    if told := replaced(folder):
        console.say(f"warning: {told} ({folder / 'quarantine.jsonl'})")
    _report(parts, scores, device)
    facts = facts_of(folder)._replace(scores=tuple(scores["scores"]))
    write_card_again(parts.scored, folder / "encoder", facts)
    write_atomically(scores_file, json.dumps(scores, indent=1))
    console.say(f"load it: {timm_line(folder / 'encoder')}")
    return scores


def _report(parts: Parts, scores: dict[str, Any], device: torch.device) -> None:
    folder = parts.recipe.run_dir
    try:
        console.say(f"report: {write_report(parts, scores, device)}")
    except Stopped:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a drawing fails of, the scores are not to be lost to it
        again = f"`selfsight report {folder}` tries again"
        console.say(f"warning: the report could not be written ({told_briefly(error)}); {again}")


def _scores(parts: Parts, device: torch.device, workers: int, ranks: Ranks) -> dict[str, Any]:
    """Scores of exactly what was exported; other ranks have the same weights, and their disk may not show it yet."""
    config = parts.recipe.eval
    return evaluate(
        str(parts.recipe.run_dir / "encoder") if ranks.main else parts.scored,
        config.train,
        config.test,
        k=config.k,
        workers=workers,
        device=device,
        ranks=ranks,
        say=console.say,
    )


def forget_scores(folder: Path) -> None:
    """Of a finished run that is to go on: what was scored is then no longer what the run is."""
    (folder / "scores.json").unlink(missing_ok=True)


def read_scores(path: Path) -> dict[str, Any]:
    """What scores.json holds.

    Raises:
        StorageError: something else.
    """
    found: Any = None
    with suppress(OSError, ValueError, TypeError, RecursionError):
        found = {"scores": None, **json.loads(path.read_text())}
    rows = scores_of(found, str(path))
    return found | {"scores": [row | {"value": own.value} for row, own in zip(found["scores"], rows, strict=True)]}


def report_again(folder: str | Path, out: Path | None = None) -> Path:
    """Write the report of a run, as far as it has come, from what its folder holds: into it, or to `out`.

    Raises:
        UsageError: `out` is a folder; not a run folder, one without a checkpoint, or one that another release wrote and this cannot read.
    """
    folder = Path(folder)
    if out is not None:
        require_page(out)
    if not (folder / "recipe.yaml").is_file():
        raise UsageError(f"{folder}: is no run folder (no {folder / 'recipe.yaml'})")
    newest, _ = checkpoint.newest(folder / "checkpoints")
    if newest is None:
        raise UsageError(
            f"{folder}: has no checkpoint to report on; `selfsight pretrain {folder / 'recipe.yaml'}` writes one after its first step"
        )
    saved = checkpoint.load(newest)
    try:
        recipe = load(folder / "recipe.yaml", {"run_dir": str(folder)})
    except UsageError as error:
        release = saved.state.get("version", "?")
        if release == __version__:
            raise
        raise UsageError(f"{error}\n{folder} was written by selfsight {release}; this is {__version__}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = assemble(recipe, device)
    parts.restore(saved, str(folder))
    scores = folder / "scores.json"
    return write_report(parts, read_scores(scores) if scores.exists() else {}, device, out)
