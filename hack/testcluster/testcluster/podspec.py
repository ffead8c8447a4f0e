"""Makes a process out of a pod's spec: its env, its volumes as folders, its command.

There is no chroot. Every mount path is a folder below the pod's own root, and mount paths that stand at the beginning of an env value, of a
command or of an argument are rewritten to that folder. That is the one difference from a real pod.
"""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Object = dict[str, Any]
Read = Callable[[str, str], Object]
"""(kind, name) -> the object of the pod's namespace."""
MintToken = Callable[[Object, Object], str]
"""(pod, the projection's serviceAccountToken) -> a token bound to the pod."""

_REFERENCE = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_FIELD = re.compile(r"metadata\.(annotations|labels)\['([^']+)'\]")


class PodFiles:
    """A pod's root folder: volumes, termination log, log."""

    def __init__(self, pod: Object, root: Path, read: Read, mint: MintToken) -> None:
        self.pod = pod
        self.root = root
        self.read = read
        self.mint = mint
        self.container: Object = pod["spec"]["containers"][0]
        self.log = root / "container.log"
        self.mounts: dict[str, Path] = {}

    def prepare(self) -> None:
        """Makes the volumes and the folders of the mounts."""
        volumes = {v["name"]: v for v in self.pod["spec"].get("volumes", [])}
        for mount in self.container.get("volumeMounts", []):
            folder = self.root / "volumes" / mount["name"]
            if not folder.exists():
                folder.mkdir(parents=True)
                self._fill(volumes[mount["name"]], folder)
            self.mounts[mount["mountPath"].rstrip("/")] = folder / mount.get("subPath", "")
        termination = self.container.get("terminationMessagePath", "/dev/termination-log")
        self.termination = self.root / "termination-log"
        self.mounts[termination] = self.termination

    def environment(self) -> dict[str, str]:
        """The container's env: envFrom, then env with references expanded, mount paths rewritten."""
        env: dict[str, str] = {}
        for source in self.container.get("envFrom", []):
            kind = "secret" if "secretRef" in source else "configmap"
            name = (source.get("secretRef") or source["configMapRef"])["name"]
            env.update(self._data(kind, name))
        for entry in self.container.get("env", []):
            if self._is_optional_and_missing(entry.get("valueFrom", {})):
                continue
            value = self._value_from(entry["valueFrom"]) if "valueFrom" in entry else self._expand(entry.get("value", ""), env)
            env[entry["name"]] = value
        return {name: self._rewrite(value) for name, value in env.items()}

    def command(self, image_commands: dict[str, list[str]], env: dict[str, str]) -> list[str]:
        """What to run. For an image in the map, its command stands in for `python` or for the image's own entrypoint."""
        stand_in = image_commands.get(self.container["image"], [])
        command = [self._rewrite(self._expand(c, env)) for c in self.container.get("command", [])]
        arguments = [self._rewrite(self._expand(a, env)) for a in self.container.get("args", [])]
        if command[:1] == ["python"] and stand_in:
            return [*stand_in, *command[1:], *arguments]
        return [*(command or stand_in), *arguments]

    def working_dir(self) -> Path:
        """The container's workingDir, or the root."""
        place = self.container.get("workingDir")
        return Path(self._rewrite(place)) if place else self.root

    # ------------------------------------------------------------------------------------------------------ helpers ----
    def _rewrite(self, text: str) -> str:
        for mount in sorted(self.mounts, key=len, reverse=True):
            if text == mount or text.startswith(f"{mount}/"):
                return f"{self.mounts[mount]}{text.removeprefix(mount)}"
        return text

    def _expand(self, text: str, env: dict[str, str]) -> str:
        def one(match: "re.Match[str]") -> str:
            if match.group(0) == "$$":
                return "$"
            return env.get(match.group(1), match.group(0))

        return _REFERENCE.sub(one, text)

    def _field(self, path: str) -> str:
        meta = self.pod["metadata"]
        if match := _FIELD.fullmatch(path):
            return str((meta.get(match.group(1)) or {}).get(match.group(2), ""))
        known = {
            "metadata.name": meta["name"],
            "metadata.namespace": meta["namespace"],
            "metadata.uid": meta["uid"],
            "spec.nodeName": self.pod["spec"].get("nodeName", ""),
            "spec.serviceAccountName": self.pod["spec"].get("serviceAccountName", "default"),
            "status.podIP": "127.0.0.1",
        }
        return str(known[path])

    def _value_from(self, source: Object) -> str:
        if "fieldRef" in source:
            return self._field(source["fieldRef"]["fieldPath"])
        kind = "secret" if "secretKeyRef" in source else "configmap"
        reference = source.get("secretKeyRef") or source["configMapKeyRef"]
        return self._data(kind, reference["name"])[reference["key"]]

    def _is_optional_and_missing(self, source: Object) -> bool:
        reference = source.get("secretKeyRef") or source.get("configMapKeyRef") or {}
        if not reference.get("optional"):
            return False
        try:
            return reference["key"] not in self._data("secret" if "secretKeyRef" in source else "configmap", reference["name"])
        except KeyError:  # the whole object is missing
            return True

    def _data(self, kind: str, name: str) -> dict[str, str]:
        data = self.read(kind, name).get("data") or {}
        return {k: base64.b64decode(v).decode() for k, v in data.items()} if kind == "secret" else dict(data)

    def _fill(self, volume: Object, folder: Path) -> None:
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        for source in sources:
            if token := source.get("serviceAccountToken"):
                (folder / token["path"]).write_text(self.mint(self.pod, token))
            for item in source.get("downwardAPI", {}).get("items", []):
                (folder / item["path"]).write_text(self._field(item["fieldRef"]["fieldPath"]))
            for kind in ("secret", "configMap"):
                if reference := source.get(kind):
                    name = reference.get("secretName") or reference["name"]
                    for key, value in self._data(kind.lower(), name).items():
                        (folder / key).write_text(value)
