"""What all models share: camelCase on the wire, unknown fields refused, docstrings as field documentation, CEL beside code.

A rule that relates fields stands twice next to each other: once as a validator (CLI, trainer, operator) and once as CEL (API
server). A test feeds the same bad manifests to both.
"""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Cel:
    """One x-kubernetes-validations entry. `rule` sees the object as `self` (and `oldSelf` in a transition rule)."""

    rule: str
    message: str
    field_path: str | None = None


class Model(BaseModel):
    """Base of every model of the API."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        allow_inf_nan=False,
    )
    cel: ClassVar[tuple[Cel, ...]] = ()
