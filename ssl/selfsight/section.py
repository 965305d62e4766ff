"""The base of every part of a recipe: typed, frozen, closed to unknown keys; a field's docstring is its help."""

from collections.abc import Iterator
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

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
    # pydantic has a problem for each kind that such a field takes: `train.checkpoint_blocks.bool`.
    mixed, told = dict(_mixed(model, prefix)), set[str]()
    for problem in error.errors():
        parts = [*filter(None, prefix.split(".")), *(str(part) for part in problem["loc"])]
        name, anywhere = ".".join(parts), ".".join("*" if part.isdigit() else part for part in parts)
        if union := next((known for known in mixed if anywhere.startswith(f"{known}.")), ""):
            whole = ".".join(parts[: union.count(".") + 1])
            if whole not in told:
                yield f"{whole}: must be {kind(mixed[union])}, not {problem['input']!r}"
            told.add(whole)
        elif problem["type"] == "extra_forbidden":
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


def _mixed(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Fields of several kinds, below lists too: (`data.mix.*.train`, annotation)."""
    for name, field in field_names(model, prefix):
        if len(_kinds(field.annotation)) > 1:
            yield name, field.annotation
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                yield from _mixed(part, f"{name}.*.")


def kind(annotation: Any) -> str:
    """What a field takes, in words: `one of ['ddp', 'fsdp']`, `int or null`, `auto, true or false`."""
    if kinds := _kinds(annotation):
        null = [NoneType] * (NoneType in get_args(annotation))
        *words, last = [word for one in (*kinds, *null) for word in _words(one)]
        return f"{', '.join(words)} or {last}"
    if get_origin(annotation) is dict:
        return "a mapping"
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("Literal", "one of ")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The parts of a union, but for null."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return tuple(part for part in parts if part is not NoneType)


def _words(part: Any) -> list[str]:
    """What to write for a part of a union."""
    if get_origin(part) is Literal:
        return [str(value) for value in get_args(part)]
    return {bool: ["true", "false"], NoneType: ["null"]}.get(part) or [kind(part)]
