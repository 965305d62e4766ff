"""Every recipe field with its meaning and default, as help text and as a JSON schema for editors."""

import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from selfsight.objectives import OBJECTIVES
from selfsight.recipe import Recipe
from selfsight.section import field_names, kind

_INDENT = 6


def field_list() -> str:
    """All fields, by section, for `--help`."""
    lines = ["recipe fields (--section.key value):"]
    lines += _described(Recipe, "", skip="objective")
    for name, (fields, _) in OBJECTIVES.items():
        lines += ["", f"  with objective.name {name}: {(fields.__doc__ or '').splitlines()[0]}"]
        lines += _described(fields, "objective.")
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file, in which everything may be left to a `base:`."""
    schema = Recipe.model_json_schema()
    kinds = []
    for fields, _ in OBJECTIVES.values():
        own = fields.model_json_schema(ref_template="#/$defs/{model}")
        schema["$defs"] |= own.pop("$defs", {}) | {fields.__name__: own}
        kinds.append({"$ref": f"#/$defs/{fields.__name__}"})
    schema["properties"]["objective"] = schema["$defs"]["JointPart"]["properties"]["objective"] = {"anyOf": kinds}
    schema["properties"]["base"] = {
        "type": "string",
        "description": "A recipe beside this one whose fields are the defaults.",
    }
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    return schema


def _described(model: type[BaseModel], prefix: str, skip: str = "") -> Iterator[str]:
    for name, field in field_names(model, prefix):
        if name == skip:
            continue
        default = "required" if field.default is PydanticUndefined else f"default {_plain(field.default)}"
        yield f"  --{name}  ({kind(field.annotation)}; {default})"
        yield textwrap.fill(field.description or "", 110, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)
