"""Reads YAML with kubectl's eyes, so that the manifest that trains on a laptop means the same in the cluster.

kubectl reads with sigs.k8s.io/yaml (a fork of go-yaml v2) and sends JSON. That is neither YAML 1.1 (PyYAML: `5e-5` is a
string, `n` a string, `1:30` the number 90, a date an object) nor YAML 1.2 (`no` is a string): here `5e-5` is a number, `n` and
`no` are false, `1:30` and a date stay strings, and `1e3` is a whole number. One thing is stricter on purpose: a key that stands
twice is an error.
"""

import re
from typing import Any

import yaml

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0[0-7_]+|0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+)$")
_FLOAT = re.compile(r"([-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_TRUE = ("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON")
_FALSE = ("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF")
_MAX_WHOLE = 1e21
"""From here on Go writes a float into JSON with an exponent."""


class KubeLoader(yaml.SafeLoader):
    """PyYAML's safe loader with kubectl's rules for plain words."""

    # Without those of the parent class: a date, 1:30 and = stay strings.
    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def _bool(_: KubeLoader, node: yaml.ScalarNode) -> bool:
    return node.value in _TRUE


def _int(_: KubeLoader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    digits = text.lstrip("+-")
    # A leading zero means octal; 0x, 0o and 0b are what Python reads too.
    value = int(digits, 8) if re.fullmatch("0[0-7]+", digits) else int(digits, 0)
    return -value if text.startswith("-") else value


def _float(_: KubeLoader, node: yaml.ScalarNode) -> float | int:
    value = float(node.value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return int(value) if value.is_integer() and abs(value) < _MAX_WHOLE else value


def _resolver(tag: str, pattern: re.Pattern[str], first: list[str]) -> None:
    KubeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)


# The first that matches wins; the letters are what the word may begin with.
_resolver("merge", re.compile("<<$"), ["<"])
_resolver("null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_resolver("bool", re.compile(f"({'|'.join((*_TRUE, *_FALSE))})$"), list("yYnNtTfFoO"))
_resolver("int", _INT, list("-+0123456789"))
_resolver("float", _FLOAT, list("-+.0123456789"))
KubeLoader.add_constructor("tag:yaml.org,2002:bool", _bool)
KubeLoader.add_constructor("tag:yaml.org,2002:int", _int)
KubeLoader.add_constructor("tag:yaml.org,2002:float", _float)
