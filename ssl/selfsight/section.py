"""The base of every part of a recipe: typed, frozen, closed to unknown keys; a field's docstring is its help."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A group of recipe fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field below a model, as (dotted name, pydantic's field)."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and name != "objective":
            yield from field_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def explain(error: ValidationError, prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """What is wrong with each field, in a line, with the nearest right names."""
    for problem in error.errors():
        name = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = [prefix + field for field, _ in field_names(model)]
            known += ["objective.name"] if not prefix else []
            near = get_close_matches(name, known, 3, 0.6) or [
                k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]
            ]
            yield f"{name}: no such field" + (f"; did you mean {' or '.join(near)}?" if near else "")
        elif problem["type"] == "missing":
            yield f"{name}: is missing"
        elif problem["type"] in ("tuple_type", "list_type"):
            yield f"{name}: must be a list, such as [0, 255], not {problem['input']!r}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = problem["input"] if isinstance(problem["input"], str | int | float | bool | list | None) else None
            yield f"{name or 'recipe'}: {message}" + (f", not {value!r}" if value is not None else "")
