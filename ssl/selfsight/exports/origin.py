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
    "notes",
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
    folder = path / "encoder" if is_file(path / "encoder" / "config.json") else path
    if is_file(folder / "config.json") and not from_checkpoint:
        ours = read_config(folder).get("selfsight")
        told = ours if isinstance(ours, dict) else {}
        return {key: value for key, value in told.items() if key not in _OWN}
    if not is_file(path / "state.json"):
        newest = checkpoint.newest(path / "checkpoints")[0] if (path / "checkpoints").is_dir() else None
        if newest is None:
            return {}
        path = newest
    state = checkpoint.load(path).state
    told = {"steps": state["step"], "recipe": state.get("recipe"), "version": state.get("version")}
    data = state.get("fingerprint", {}).get("data", {}).get("train")
    return {key: value for key, value in (told | {"data": data, "libraries": state.get("libraries")}).items() if value}


def run_facts(source: str, license: str, notes: tuple[str, ...], same: bool) -> Facts:
    """Scores and hours of the run that `source` is, or is the encoder of.

    Args:
        same: whether the weights that are exported are those that were scored.
    """
    path = Path(source)
    run = path.parent if path.name == "encoder" and is_file(path / "config.json") else path
    facts = facts_of(run, license=license, notes=notes)
    if facts.scores and not same:
        told = "the run's scores are of the encoder that it exported, which these weights are not: score them anew"
        return facts._replace(scores=(), notes=(*notes, told))
    return facts
