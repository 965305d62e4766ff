"""The base of every part of a recipe: typed, frozen, closed to unknown keys; a field's docstring is its help."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of recipe fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
