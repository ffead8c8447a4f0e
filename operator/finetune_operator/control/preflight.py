"""Before anything else: is the API server there, is the CRD installed, are the rights given? One sentence for each thing that is missing."""

import asyncio

from finetune_api import crd, names
from finetune_operator.kube import port
from finetune_operator.kube.permissions import PERMISSIONS, Permission, Scope
from finetune_operator.kube.port import JOBS, SWEEPS, Cluster


class NotReady(Exception):  # noqa: N818
    """The operator cannot work here; the sentences say what to do."""


async def check(cluster: Cluster, namespaces: list[str], own_namespace: str, own_objects: dict[str, str]) -> None:
    """Raises NotReady. `own_objects`: names in the own namespace by resource; rights on a resource that is not there are not asked for."""
    try:
        await cluster.discover("/version")
        await _crd(cluster)
        missing = await _missing_rights(cluster, namespaces, own_namespace, own_objects)
        unknown = {} if missing else await _unknown_fields(cluster)
    except port.ApiError as error:
        raise NotReady(f"The API server at hand cannot be used: {error.message}") from error
    if missing:
        raise NotReady(
            f"The operator's account lacks rights: {'; '.join(missing)}. Install the chart's roles (helm upgrade --install) and start again."
        )
    for name, fields in unknown.items():
        listed = ", ".join(fields[:5]) + (f" and {len(fields) - 5} more" if len(fields) > 5 else "")
        raise NotReady(
            f"The CRD {name} is older than this operator: it does not know {listed}, and would drop them without a word. "
            "Upgrade it (helm upgrade with crds.install=true, or kubectl apply -f crds/) and start again."
        )


async def _crd(cluster: Cluster) -> None:
    install = "install it (kubectl apply -f crds/, or the chart) and start again."
    try:
        served = await cluster.discover(JOBS.root)
    except port.NotFound as error:
        raise NotReady(f"The CRD {JOBS.plural}.{names.GROUP} is not installed: {install}") from error
    plurals = {r["name"] for r in served.get("resources", [])}
    for resource in (JOBS, SWEEPS):
        if not {resource.plural, f"{resource.plural}/status"} <= plurals:
            raise NotReady(f"The CRD {resource.plural}.{names.GROUP} does not serve {resource.version} with a status: {install}")


async def _unknown_fields(cluster: Cluster) -> dict[str, list[str]]:
    """By CRD the fields of our schema that the one in the cluster lacks; the other way round (a newer CRD) does no harm."""
    found = {}
    for ours in crd.crds():
        name = ours["metadata"]["name"]
        served = await cluster.discover(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
        if missing := sorted(_paths(_schema(ours)) - _paths(_schema(served))):
            found[name] = missing
    return found


def _schema(definition: port.Object) -> port.Object:
    version = next(v for v in definition["spec"]["versions"] if v["name"] == JOBS.version)
    schema: port.Object = version["schema"]["openAPIV3Schema"]
    return schema


def _paths(schema: port.Object, path: str = "") -> set[str]:
    found: set[str] = set()
    for name, child in schema.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        found |= {here} | _paths(child, here) | _paths(child.get("items", {}), f"{here}[]")
    return found


async def _missing_rights(cluster: Cluster, namespaces: list[str], own_namespace: str, own_objects: dict[str, str]) -> list[str]:
    asked: list[tuple[Permission, str, str | None, str]] = []
    for permission in PERMISSIONS:
        if permission.scope is Scope.CLUSTER:
            places: list[str | None] = [None]
        elif permission.scope in (Scope.OWN, Scope.OWN_NEW):
            places = [own_namespace] if permission.resource in own_objects else []
        else:
            places = list(namespaces) or [None]
        name = own_objects.get(permission.resource, "") if permission.scope is Scope.OWN else permission.name
        asked.extend((permission, verb, place, name) for place in places for verb in permission.verbs)
    answers = await asyncio.gather(*(_allowed(cluster, *question) for question in asked))
    return [
        f"{verb} {permission.resource}{'.' + permission.group if permission.group else ''}"
        f"{' ' + name if name else ''}{' in ' + place if place else ''} ({permission.why})"
        for (permission, verb, place, name), allowed in zip(asked, answers, strict=True)
        if not allowed
    ]


async def _allowed(cluster: Cluster, permission: Permission, verb: str, namespace: str | None, name: str) -> bool:
    resource, _, subresource = permission.resource.partition("/")
    attributes = {
        "verb": verb,
        "group": permission.group,
        "resource": resource,
        "subresource": subresource,
        "namespace": namespace or "",
        "name": name,
    }
    answer = await cluster.review("authorization.k8s.io", "SelfSubjectAccessReview", {"resourceAttributes": attributes})
    return bool(answer.get("allowed"))
