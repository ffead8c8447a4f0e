"""What is wrong with an object, in sentences: field path, value, what is allowed."""

import re
from typing import Any

from pydantic import ValidationError


def explain(error: ValidationError) -> list[str]:
    """One sentence per problem: field path, value, what is allowed."""
    problems = []
    for e in error.errors():
        path = _path(e["loc"])
        if e["type"] == "extra_forbidden":
            problems.append(f"{path}: unknown field")
        elif e["type"] == "missing":
            problems.append(f"{path}: required, but not set")
        elif e["type"] == "core_fields":
            problems.append(f"{path}{'.' if path else ''}{e['msg']}")
        elif e["type"] in ("each_once", "volume"):
            # The input is a whole list or volume: the sentence says which part, and a value may be a secret.
            problems.append(f"{path}: {e['msg']}")
        elif e["type"] == "value_error":
            problems.append(f"{path}{_join(path, str(e['ctx']['error']))}")
        else:
            said = e["msg"][0].lower() + e["msg"][1:]
            if e["type"] == "string_type" and isinstance(e["input"], bool):
                said += "; YAML reads yes, no, on, off, y and n as booleans: put the word in quotes"
            problems.append(f"{path}: {_short(e['input'])} is not allowed: {said}")
    return problems


def _join(path: str, sentence: str) -> str:
    # A model's own sentence begins with the field's name where it is about one field: `labels: each label ...`.
    field, colon, rest = sentence.partition(": ")
    if colon and re.fullmatch(r"[A-Za-z]+(\[[^]]*\])?(\.[A-Za-z]+)*", field):
        return f"{'.' if path else ''}{field}: {rest}"
    return f": {sentence}"


def _path(loc: tuple[int | str, ...]) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f"{'.' if out else ''}{part}"
    return out


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
