"""The environment of a container, computed as the kubelet does it.

Why it exists: the operator hands everything to the trainer by environment, so a wrong reference or an expansion that differs
must show in tests. Lowest to highest: what the image would bring, service variables, envFrom, env (with $(VAR) expansion).
"""

import math
import re
from base64 import b64decode
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from testcluster.api import ApiClient, ApiError, Object

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.\-][\w.\-]*)\)")
_SUFFIXES = {
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)},
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T", "P", "E"), start=1)},
    "m": Decimal("0.001"),
    "u": Decimal("0.000001"),
    "n": Decimal("0.000000001"),
    "": Decimal(1),
}


class NotReadyError(Exception):
    """Something the pod refers to is not there (yet); a pod waits for it. `reason` is the waiting reason."""

    def __init__(self, message: str, reason: str = "CreateContainerConfigError") -> None:
        super().__init__(message)
        self.reason = reason


class References:
    """Reads ConfigMaps and Secrets of one namespace, each once."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client, self._namespace = client, namespace
        self._known: dict[tuple[str, str], dict[str, bytes] | None] = {}

    async def read(self, kind: str, name: str, *, optional: bool) -> dict[str, bytes]:
        """The keys of a "configmaps" or "secrets" object; empty if it is optional and missing. Raises NotReadyError."""
        if (kind, name) not in self._known:
            self._known[kind, name] = await self._fetch(kind, name)
        data = self._known[kind, name]
        if data is None:
            if optional:
                return {}
            raise NotReadyError(f'{kind.removesuffix("s")} "{name}" not found')
        return data

    async def key(self, kind: str, selector: Object) -> bytes | None:
        """One value by a key selector; None if it is optional and missing. Raises NotReadyError."""
        optional = bool(selector.get("optional"))
        data = await self.read(kind, selector["name"], optional=optional)
        if selector["key"] not in data and not optional:
            raise NotReadyError(f'couldn\'t find key {selector["key"]} in {kind.removesuffix("s")} "{selector["name"]}"')
        return data.get(selector["key"])

    async def _fetch(self, kind: str, name: str) -> dict[str, bytes] | None:
        try:
            found = await self._client.get(f"/api/v1/namespaces/{self._namespace}/{kind}/{name}")
        except ApiError as error:
            if error.code == 404:
                return None
            raise
        if kind == "secrets":
            return {key: b64decode(value) for key, value in (found.get("data") or {}).items()}
        text = {key: value.encode() for key, value in (found.get("data") or {}).items()}
        return text | {key: b64decode(value) for key, value in (found.get("binaryData") or {}).items()}


async def environment(
    pod: Object, container: Object, references: References, base: Mapping[str, str], rewrite: Callable[[str], str]
) -> dict[str, str]:
    """All variables of the container. `rewrite` maps paths in the values of envFrom and env. Raises NotReadyError."""
    values: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        for key, kind in (("configMapRef", "configmaps"), ("secretRef", "secrets")):
            if key in source:
                data = await references.read(kind, source[key]["name"], optional=bool(source[key].get("optional")))
                values |= {source.get("prefix", "") + name: value.decode() for name, value in data.items()}
    for entry in container.get("env") or []:
        value = await _value(pod, container, entry, references, {**base, **values})
        if value is not None:
            values[entry["name"]] = value
    return {**base, **{name: rewrite(value) for name, value in values.items()}}


async def _value(pod: Object, container: Object, entry: Object, references: References, known: Mapping[str, str]) -> str | None:
    source = entry.get("valueFrom")
    if not source:
        return expand(entry.get("value", ""), known)
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return resource(pod, container, source["resourceFieldRef"])
    for key, kind in (("secretKeyRef", "secrets"), ("configMapKeyRef", "configmaps")):
        if key in source:
            value = await references.key(kind, source[key])
            return None if value is None else value.decode()
    raise NotReadyError(f"env {entry['name']}: {', '.join(source)} is not supported by the test cluster")


def expand(text: str, known: Mapping[str, str]) -> str:
    """Replaces $(NAME) by its value; an unknown name stays as it is, and $$ is one dollar sign (so $$(NAME) is literal)."""

    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return known.get(match[1], match[0])

    return _REFERENCE.sub(one, text)


def field(pod: Object, path: str) -> str:
    """The value of a downward API field; maps as a whole are written as the kubelet does, one key="value" a line."""
    match = re.fullmatch(r"metadata\.(annotations|labels)(?:\['(.+)'\])?", path)
    if match:
        entries: Mapping[str, str] = pod["metadata"].get(match[1]) or {}
        if match[2]:
            return entries.get(match[2], "")
        return "\n".join(f'{key}="{_escape(entries[key])}"' for key in sorted(entries))
    if path in ("status.podIP", "status.podIPs", "status.hostIP", "status.hostIPs"):
        return "127.0.0.1"
    value: Any = pod
    for part in path.split("."):
        value = (value or {}).get(part)
    return "" if value is None else str(value)


def resource(pod: Object, container: Object, selector: Object) -> str:
    """A container's limit or request divided by the divisor, rounded up; without a limit the node's size is meant."""
    name = selector.get("containerName")
    owner = container if not name else next(entry for entry in pod["spec"]["containers"] if entry["name"] == name)
    kind, _, wanted = selector["resource"].partition(".")
    resources = owner.get("resources") or {}
    quantity = (resources.get(kind) or {}).get(wanted) or (resources.get("limits") or {}).get(wanted)
    default = {"cpu": "2", "memory": "8Gi"}.get(wanted, "0") if kind == "limits" else "0"
    divisor = number(str(selector.get("divisor") or "1")) or Decimal(1)
    return str(math.ceil(number(str(quantity or default)) / divisor))


def number(quantity: str) -> Decimal:
    """A Kubernetes quantity such as 500m, 2Gi or 1e3."""
    match = re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)([numkMGTPE]?i?)", quantity)
    if match is None or match[2] not in _SUFFIXES:
        raise ValueError(f"{quantity!r} is no Kubernetes quantity")
    return Decimal(match[1]) * _SUFFIXES[match[2]]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
