"""What all models share: camelCase on the wire, unknown fields refused, docstrings as field documentation, CEL beside code.

A rule that relates fields stands twice next to each other: once as a validator (CLI, trainer, operator) and once as CEL (API
server). A test feeds the same bad manifests to both. `Shape` and `EachOnce` make both from one annotation.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel, to_snake
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


@dataclass(frozen=True)
class Cel:
    """One x-kubernetes-validations entry. `rule` sees the object as `self` (and `oldSelf` in a transition rule)."""

    rule: str
    message: str
    field_path: str | None = None


@dataclass(frozen=True)
class Shape:
    """Annotation of a string: it must match `pattern` (RE2 and Python in common, from ^ to $), which `sentence` says to people.

    A JSON schema `pattern` would do the same, but its message is the regular expression.
    """

    pattern: str
    sentence: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        literal = self.pattern.replace("\\", "\\\\").replace("'", "\\'")
        rule = {"rule": f"self.matches('{literal}')", "message": self.sentence}
        return {**handler(schema), "x-kubernetes-validations": [rule]}

    def _check(self, value: str) -> str:
        # fullmatch, because Python's $ also matches before a newline at the end.
        if not re.fullmatch(self.pattern.removeprefix("^").removesuffix("$"), value):
            raise PydanticCustomError("shape", "{sentence}", {"sentence": self.sentence})
        return value


@dataclass(frozen=True)
class EachOnce:
    """Annotation of a list: no item twice (list type set), or with `key` no two items with the same value of that field (list
    type map, merged item by item by server-side apply)."""

    key: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        if self.key is None:
            return {**handler(schema), "x-kubernetes-list-type": "set"}
        return {**handler(schema), "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [self.key]}

    def _check(self, items: list[Any]) -> list[Any]:
        what = self.key or "item"
        if (double := _first_double(self._key_of(item) for item in items)) is not None:
            raise PydanticCustomError(
                "each_once", "each {what} may be listed once, {double} is there twice", {"what": what, "double": repr(double)}
            )
        return items

    def _key_of(self, item: Any) -> Any:
        if self.key is None:
            return item
        return item[self.key] if isinstance(item, dict) else getattr(item, to_snake(self.key))


def _first_double(values: Iterable[Any]) -> Any:
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


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

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        # As in the API server: `epochs:` with nothing behind it means the default.
        if not isinstance(data, dict) or None not in data.values():
            return data
        optional = {n for n, field in cls.model_fields.items() if not field.is_required()}
        optional |= {cls.model_fields[n].alias or n for n in optional}
        return {k: v for k, v in data.items() if v is not None or k not in optional}
