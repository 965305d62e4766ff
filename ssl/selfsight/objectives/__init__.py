"""Pretext objectives: the built-in ones stand in one visible dict."""

from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, get_type_hints

from selfsight.errors import UsageError
from selfsight.objectives.configs import (
    Data2VecConfig,
    DINOConfig,
    DistillConfig,
    JointConfig,
    MAEConfig,
    ObjectiveConfig,
    RotationConfig,
    SimMIMConfig,
    VICRegConfig,
)

if TYPE_CHECKING:
    from selfsight.encoder import Encoder
    from selfsight.objectives.base import Objective

# name -> (its fields, where it lives); a new objective is one line here, one class of fields, one file and one test.
OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], str]] = {
    "mae": (MAEConfig, "selfsight.objectives.mae:MAE"),
    "simmim": (SimMIMConfig, "selfsight.objectives.simmim:SimMIM"),
    "vicreg": (VICRegConfig, "selfsight.objectives.vicreg:VICReg"),
    "rotation": (RotationConfig, "selfsight.objectives.rotation:Rotation"),
    "distill": (DistillConfig, "selfsight.objectives.distill:Distill"),
    "dino": (DINOConfig, "selfsight.objectives.dino:DINO"),
    "data2vec": (Data2VecConfig, "selfsight.objectives.data2vec:Data2Vec"),
    "joint": (JointConfig, "selfsight.objectives.joint:Joint"),
}
GROUP = "selfsight.objectives"  # of entry points, by which installed packages bring theirs
_plugins: dict[str, type["Objective"]] = {}


def load_plugin(module: str) -> None:
    """Take the objectives of a module, which holds them in a dict `OBJECTIVES` of names to classes.

    Code comes from the command line or from a program, never from a recipe, which holds names only.

    Raises:
        UsageError: no such module, no such dict, or a name that is taken.
    """
    try:
        found = getattr(import_module(module), "OBJECTIVES", None)
    except (ImportError, ValueError, TypeError) as error:  # the last two: an empty or a relative name
        raise UsageError(f"--plugin {module}: cannot be imported ({error})") from None
    if not isinstance(found, dict) or not found:
        raise UsageError(f"--plugin {module}: has no OBJECTIVES, a dict of names to classes")
    for name, made in found.items():
        _config_of(name, made, f"--plugin {module}")
        if _plugins.get(name, made) is not made:
            raise UsageError(f"--plugin {module}: the name {name} is another plugin's")
    _plugins.update(found)


@cache
def _installed() -> dict[str, Any]:
    """Entry points of installed packages, by name; none is imported before a recipe asks for it."""
    return {point.name: point for point in entry_points(group=GROUP)}


def config_type(name: object) -> type[ObjectiveConfig]:
    """The fields of an objective.

    Raises:
        UsageError: no objective of this name.
    """
    if isinstance(name, str) and name in OBJECTIVES:
        return OBJECTIVES[name][0]
    if isinstance(name, str) and (name in _plugins or name in _installed()):
        return _config_of(name, _find(name), f"objective {name}")
    known = [*OBJECTIVES, *_plugins, *_installed()]
    near = get_close_matches(str(name), known, 3, 0.3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    raise UsageError(f"no objective {name!r}; {hint} (one from elsewhere needs its package installed, or --plugin)")


def parse_objective(tree: dict[str, Any]) -> ObjectiveConfig:
    """The typed fields of an objective, from a mapping with its name.

    Raises:
        UsageError: no objective of this name.
        pydantic.ValidationError: wrong fields.
    """
    return config_type(tree.get("name")).model_validate(tree)


def build_objective(config: ObjectiveConfig, encoder: "Encoder") -> "Objective":
    """The objective that a recipe names, around an encoder."""
    return _find(config.name)(encoder, config)


def _find(name: str) -> type["Objective"]:
    if name in OBJECTIVES:
        module, _, attribute = OBJECTIVES[name][1].partition(":")
        return getattr(import_module(module), attribute)
    if name in _plugins:
        return _plugins[name]
    try:
        return _installed()[name].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"objective {name}: its package cannot be imported ({error})") from None


def _config_of(name: str, made: Any, where: str) -> type[ObjectiveConfig]:
    """The fields of somebody's objective: the annotation of its `config`."""
    from selfsight.objectives.base import Objective

    if name in OBJECTIVES:
        raise UsageError(f"{where}: the name {name} is a built-in objective's")
    if not (isinstance(made, type) and issubclass(made, Objective)):
        raise UsageError(f"{where}: {name} is not a subclass of selfsight.objectives.base.Objective")
    fields = get_type_hints(made)["config"]
    typed = isinstance(fields, type) and issubclass(fields, ObjectiveConfig)
    if not typed or fields.model_fields["name"].default != name:
        raise UsageError(f"{where}: {made.__name__} needs the annotation config: FIELDS, whose name is {name!r}")
    return fields
