"""The volumes of a pod as local folders, and the one difference to a container: paths are rewritten.

Why it exists: the trainer reads its token, CA and data from mounted volumes, and writes to them. A process has no file system
of its own without root rights, so every mount appears below the pod's folder ("rootfs"), and each mountPath that occurs in
env values, command or args is rewritten to that place: at the start of a value, after a separator such as `=`, `:`, `"` or
a space, and after `file://`. Paths that are built into a program or stand in a mounted file are not rewritten; readOnly,
fsGroup and resource limits are not enforced; changes of a mounted ConfigMap or Secret do not arrive (renewed tokens do).
"""

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from testcluster import podenv
from testcluster.api import ApiClient, Object
from testcluster.podenv import NotReadyError, References

_TOKEN_RENEWAL = 0.8  # of the lifetime, as the kubelet does
_DEFAULT_TOKEN_SECONDS = 3600


@dataclass
class TokenFile:
    """A service account token in a volume, which must be renewed before it expires."""

    path: Path
    account: str
    audience: str | None
    seconds: int
    renew_at: float = 0.0  # time.monotonic()


@dataclass
class Volumes:
    """The folders of a pod's volumes by name, and the tokens in them."""

    folders: dict[str, Path] = field(default_factory=dict)
    tokens: list[TokenFile] = field(default_factory=list)


class PathMap:
    """Rewrites the container's paths to the pod's folder."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self.root = root
        longest_first = sorted({path.rstrip("/") for path in paths if path.rstrip("/")}, key=len, reverse=True)
        alternatives = "|".join(re.escape(path) for path in longest_first)
        self._pattern = re.compile(rf"(?:(?<![\w./~-])|(?<=file://))(?:{alternatives})(?![\w.-])") if alternatives else None

    def __call__(self, text: str) -> str:
        """The text with every mounted path rewritten, in one pass."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: str(self.place(match[0])), text)

    def place(self, path: str) -> Path:
        """Where an absolute path of the container lies on this machine."""
        return self.root / path.lstrip("/")


def mount(container: Object, volumes: Volumes, root: Path) -> PathMap:
    """Links the container's mounts and makes its termination log below `root`."""
    log = container.get("terminationMessagePath") or "/dev/termination-log"
    mounts = sorted(container.get("volumeMounts") or [], key=lambda entry: entry["mountPath"].count("/"))
    paths = PathMap(root, [log, *(entry["mountPath"] for entry in mounts)])
    for entry in mounts:
        target = volumes.folders[entry["name"]] / entry.get("subPath", "")
        if entry.get("subPath") and not target.exists():
            target.mkdir(parents=True)
        place = paths.place(entry["mountPath"].rstrip("/"))
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_symlink() or place.is_file():
            place.unlink()
        elif place.is_dir():
            shutil.rmtree(place)  # what was there is hidden by a mount, too
        place.symlink_to(target)
    paths.place(log).parent.mkdir(parents=True, exist_ok=True)
    paths.place(log).write_bytes(b"")
    return paths


async def create(client: ApiClient, pod: Object, references: References, root: Path, claims: Path) -> Volumes:
    """Makes and fills all volumes of the pod. Raises NotReadyError for what is missing or not supported."""
    made = Volumes()
    for volume in pod["spec"].get("volumes") or []:
        folder = root / volume["name"]
        if "persistentVolumeClaim" in volume:
            folder = claims / pod["metadata"]["namespace"] / volume["persistentVolumeClaim"]["claimName"]
        folder.mkdir(parents=True, exist_ok=True)
        made.folders[volume["name"]] = folder
        for token in await _fill(pod, volume, folder, references):
            await renew(client, pod, token)
            made.tokens.append(token)
    return made


async def renew(client: ApiClient, pod: Object, token: TokenFile) -> None:
    """Gets a token that is bound to this pod, and replaces the file in one step."""
    meta = pod["metadata"]
    spec: Object = {
        "expirationSeconds": token.seconds,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]},
    }
    if token.audience:
        spec["audiences"] = [token.audience]
    path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{token.account}/token"
    answer = await client.post(path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
    token.path.parent.mkdir(parents=True, exist_ok=True)
    fresh = token.path.with_name(f".{token.path.name}.new")
    fresh.write_text(answer["status"]["token"])
    fresh.replace(token.path)
    token.renew_at = time.monotonic() + _TOKEN_RENEWAL * token.seconds


async def _fill(pod: Object, volume: Object, folder: Path, references: References) -> list[TokenFile]:
    if "emptyDir" in volume or "persistentVolumeClaim" in volume:
        return []
    if "projected" in volume:
        tokens = []
        mode = volume["projected"].get("defaultMode", 0o644)
        for source in volume["projected"].get("sources") or []:
            tokens += await _fill_from(pod, source, folder, references, mode)
        return tokens
    # A volume of its own calls the Secret by another key than a projected one does.
    source = {key: dict(value) for key, value in volume.items() if key in ("configMap", "secret", "downwardAPI")}
    if not source:
        kind = ", ".join(key for key in volume if key != "name")
        raise NotReadyError(f"volume {volume['name']}: {kind} is not supported by the test cluster", "ContainerCreating")
    if "secret" in source:
        source["secret"]["name"] = source["secret"]["secretName"]
    mode = next(iter(source.values())).get("defaultMode", 0o644)
    return await _fill_from(pod, source, folder, references, mode)


async def _fill_from(pod: Object, source: Object, folder: Path, references: References, mode: int) -> list[TokenFile]:
    for key, kind in (("configMap", "configmaps"), ("secret", "secrets")):
        if key in source:
            await _write_keys(source[key], kind, folder, references, mode)
    for item in (source.get("downwardAPI") or {}).get("items") or []:
        if "fieldRef" in item:
            text = podenv.field(pod, item["fieldRef"]["fieldPath"])
        else:
            text = podenv.resource(pod, {}, item["resourceFieldRef"])
        _write(folder / item["path"], text.encode(), item.get("mode", mode))
    if "serviceAccountToken" in source:
        token = source["serviceAccountToken"]
        account = pod["spec"].get("serviceAccountName", "default")
        seconds = token.get("expirationSeconds", _DEFAULT_TOKEN_SECONDS)
        return [TokenFile(folder / token["path"], account, token.get("audience"), seconds)]
    unknown = set(source) - {"configMap", "secret", "downwardAPI"}
    if unknown:
        raise NotReadyError(f"projected {', '.join(sorted(unknown))} is not supported by the test cluster", "ContainerCreating")
    return []


async def _write_keys(selector: Object, kind: str, folder: Path, references: References, mode: int) -> None:
    optional = bool(selector.get("optional"))
    data = await references.read(kind, selector["name"], optional=optional)
    items = selector.get("items") or [{"key": key, "path": key} for key in data]
    for item in items:
        if item["key"] in data:
            _write(folder / item["path"], data[item["key"]], item.get("mode", mode))
        elif not optional:
            raise NotReadyError(f"{kind.removesuffix('s')} {selector['name']} has no key {item['key']}", "ContainerCreating")


def _write(file: Path, content: bytes, mode: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    file.chmod(mode)
