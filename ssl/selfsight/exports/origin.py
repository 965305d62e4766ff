"""Where an encoder's weights come from, as far as it is recorded beside them."""

from pathlib import Path
from typing import Any

from selfsight import checkpoint
from selfsight.exports.card import Facts, facts_of
from selfsight.weights import is_file, read_config

_OWN = (
    "format",
    "dtype",
    "pool",
    "encoder",
    "preprocessing",
    "opset",
    "scores",
)  # of one export, and not of its weights


def provenance_of(source: str, from_checkpoint: bool = False) -> dict[str, Any]:
    """What the config.json of an export, or a checkpoint, says of its weights; {} of a timm model.

    Args:
        from_checkpoint: of a run's newest checkpoint, and not of the encoder that it exported.
    """
    try:
        return _recorded(Path(source), from_checkpoint)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # what is wrong with it, loading says better


def _recorded(path: Path, from_checkpoint: bool) -> dict[str, Any]:
    folder = export_in(path)
    state = path if is_file(path / "state.json") else _newest(path / "checkpoints")
    if is_file(folder / "config.json") and not (from_checkpoint and state):
        ours = read_config(folder).get("selfsight")
        told = ours if isinstance(ours, dict) else {}
        return {key: value for key, value in told.items() if key not in _OWN}
    if state is None:
        return {}
    saved = checkpoint.load(state).state
    told = {"steps": saved["step"], "recipe": saved.get("recipe"), "version": saved.get("version")}
    data = saved.get("fingerprint", {}).get("data", {}).get("train")
    return {key: value for key, value in (told | {"data": data, "libraries": saved.get("libraries")}).items() if value}


def _newest(folder: Path) -> Path | None:
    return checkpoint.newest(folder)[0] if folder.is_dir() else None


def export_in(path: Path) -> Path:
    """The export that a folder is, or that it holds if it is a run."""
    return path / "encoder" if is_file(path / "encoder" / "config.json") else path


def run_facts(source: str, license: str, same: bool) -> Facts:
    """Scores and hours of the run that `source` is, or is the encoder of; of another export those in its config.json.

    Args:
        same: whether the weights that are exported are those that were scored.
    """
    folder = export_in(Path(source))
    facts = facts_of(folder.parent if folder.name == "encoder" else Path(source), license=license)
    if not facts.scores and is_file(folder / checkpoint.MANIFEST):  # which holds scores and weights together
        facts = facts._replace(scores=_rows(folder))
    if facts.scores and not same:
        told = "the run's scores are of the encoder that it exported, which these weights are not: score them anew"
        return facts._replace(scores=(), notes=(*facts.notes, told))
    return facts


def _rows(folder: Path) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(dict(row) for row in read_config(folder)["selfsight"]["scores"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()


def name_of(source: str) -> str:
    """A source as it is told: of a path the end, which says nothing about a machine."""
    path = Path(source)
    if path.parent.name == "checkpoints":
        return "/".join(path.parts[-3:])
    return path.resolve().parent.name if path.name == "encoder" else path.resolve().name
