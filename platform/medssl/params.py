"""The base of every parameter group of a recipe: frozen, unknown keys refused, each field described."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Params(BaseModel):
    """Frozen parameters. A field's description is the docstring below it; `canonical()` is what gets hashed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    def canonical(self) -> dict[str, Any]:
        """Plain JSON values of all fields, defaults included, so that the hash does not depend on what was left out."""
        return self.model_dump(mode="json")
