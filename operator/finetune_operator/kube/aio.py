"""The port's adapter on kubernetes.aio: its configuration and connection, our paths, dicts and errors."""

import json
import math
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import yaml
from kubernetes.aio import config as kube_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject

from finetune_operator.kube import port
from finetune_operator.kube.port import Object, Resource

PAGE = 500
TIMEOUT_SECONDS = 30.0
CONNECTIONS = 64

Observer = Callable[[str, str, str], None]
"""Told of every request: verb, resource, status code."""

Fence = Callable[[], float]
"""Seconds for which a write may still go on; none starts at 0. All writes of a connection pass here, so that none can forget it."""


async def load_configuration(kubeconfig: Path | None) -> Configuration:
    """From the file, from KUBECONFIG, or from the pod's ServiceAccount; ApiError where there is none of them."""
    configuration = Configuration()
    path = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG")
    try:
        if path:
            await kube_config.load_kube_config(config_file=path, client_configuration=configuration)
        else:
            kube_config.load_incluster_config(client_configuration=configuration)
    except (kube_config.ConfigException, OSError, yaml.YAMLError) as error:
        where = (
            f"the kubeconfig {path} cannot be used" if path else "there is no --kubeconfig, no KUBECONFIG and no ServiceAccount"
        )
        raise port.ApiError(0, "NoCredentials", f"{where}: {error}") from error
    configuration.connection_pool_maxsize = CONNECTIONS
    return configuration


class AioCluster:
    """See port.Cluster."""

    def __init__(
        self, configuration: Configuration, observer: Observer = lambda *_: None, fence: Fence = lambda: math.inf
    ) -> None:
        self.configuration = configuration
        self._rest = RESTClientObject(configuration)
        self._observer = observer
        self._fence = fence

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        return await self._call("GET", resource, _path(resource, namespace, name))

    async def list(self, resource: Resource, namespace: str | None, selector: str = "") -> AsyncIterator[Object]:
        token: str | None = ""
        while token is not None:
            query = {"limit": str(PAGE), "labelSelector": selector, "continue": token}
            page = await self._call(
                "GET", resource, _path(resource, namespace), {k: v for k, v in query.items() if v}, verb="LIST"
            )
            for item in page["items"]:
                yield item
            token = page["metadata"].get("continue") or None

    async def create(self, resource: Resource, namespace: str, body: Object) -> Object:
        return await self._call("POST", resource, _path(resource, namespace), body=body)

    async def delete(self, resource: Resource, namespace: str, name: str, uid: str, grace: int | None = None) -> None:
        # Without a propagation policy some versions of the Job API orphan the pods.
        body: Object = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        await self._call("DELETE", resource, _path(resource, namespace, name), body=body)

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Object, subresource: str = "") -> Object:
        path = _path(resource, namespace, name) + (f"/{subresource}" if subresource else "")
        return await self._call("PATCH", resource, path, body=patch, content_type="application/merge-patch+json")

    async def review(self, group: str, kind: str, spec: Object) -> Object:
        resource = Resource(group, "v1", f"{kind.lower()}s")
        body = {"apiVersion": f"{group}/v1", "kind": kind, "spec": spec}
        answer = await self._call("POST", resource, f"{resource.root}/{resource.plural}", body=body, asks=True)
        status: Object = answer.get("status", {})
        return status

    async def discover(self, path: str) -> Object:
        return await self._call("GET", Resource("", "", "discovery"), path)

    async def close(self) -> None:
        await self._rest.close()

    async def _call(
        self,
        method: str,
        resource: Resource,
        path: str,
        query: dict[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        verb: str | None = None,
        asks: bool = False,
    ) -> Object:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        # Asked each time: the client reads a renewed token from its file.
        token = await self.configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        if token:
            headers["authorization"] = token
        url = f"{self.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
        seconds = TIMEOUT_SECONDS
        if method != "GET" and not asks and (seconds := min(seconds, self._fence())) <= 0:
            raise port.NotLeading(0, "NotLeading", f"{verb or method} {resource.plural} was not begun: the lease has expired")
        code = "none"
        try:
            response = await self._rest.request(method, url, headers=headers, body=body, _request_timeout=seconds)
            code = str(response.status)
            data = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise port.Unavailable(0, "NoAnswer", f"the API server does not answer: {type(error).__name__} {error}") from error
        finally:
            self._observer(verb or method, resource.plural, code)
        answer = _decode(data)
        if 200 <= response.status < 300:
            return answer
        raise _error(method, response.status, answer, response.getheader("Retry-After"))


def _path(resource: Resource, namespace: str | None, name: str = "") -> str:
    scope = f"/namespaces/{quote(namespace, safe='')}" if namespace else ""
    return f"{resource.root}{scope}/{resource.plural}" + (f"/{quote(name, safe='')}" if name else "")


def _decode(data: bytes) -> Object:
    try:
        value = json.loads(data)
    except ValueError:  # a proxy's page
        return {"message": data[:200].decode(errors="replace")}
    return value if isinstance(value, dict) else {"message": str(value)[:200]}


def _error(method: str, status: int, answer: Object, retry_after: Any) -> port.ApiError:
    reason, message = str(answer.get("reason") or "Unknown"), str(answer.get("message") or "no message")
    kind: type[port.ApiError]
    if status == 404:
        kind = port.NotFound
    elif status == 409:
        kind = port.AlreadyExists if method == "POST" and reason == "AlreadyExists" else port.Conflict
    elif status in (400, 403, 413, 422):
        kind = port.Refused
    elif status == 429 or status >= 500:
        kind = port.Unavailable
    else:
        kind = port.ApiError
    seconds = float(retry_after) if retry_after and str(retry_after).isdigit() else None
    return kind(status, reason, message, seconds)
