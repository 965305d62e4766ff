"""Pretext objectives: the built-in ones stand in one visible dict."""

from importlib import import_module
from typing import TYPE_CHECKING

from selfsight.objectives.configs import MAEConfig, ObjectiveConfig

if TYPE_CHECKING:
    from selfsight.encoder import Encoder
    from selfsight.objectives.base import Objective

# name -> (its fields, where it lives); a new objective is one line here, one class of fields, one file and one test.
OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], str]] = {
    "mae": (MAEConfig, "selfsight.objectives.mae:MAE"),
}


def build_objective(config: ObjectiveConfig, encoder: "Encoder") -> "Objective":
    """The objective that a recipe names, around an encoder."""
    module, _, name = OBJECTIVES[config.name][1].partition(":")
    return getattr(import_module(module), name)(encoder, config)
