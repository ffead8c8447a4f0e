"""The narrow port to the API server: ten methods, dicts in and out, our own errors. Nothing else knows a client library."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """A kind as its URL spells it."""

    group: str
    version: str
    plural: str

    @property
    def root(self) -> str:
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


JOBS = Resource("finetune.dev", "v1alpha1", "finetunejobs")
SWEEPS = Resource("finetune.dev", "v1alpha1", "hyperparametersweeps")
CHILDREN = Resource("batch", "v1", "jobs")
PODS = Resource("", "v1", "pods")
EVENTS = Resource("", "v1", "events")
SERVICES = Resource("", "v1", "services")
SECRETS = Resource("", "v1", "secrets")
LEASES = Resource("coordination.k8s.io", "v1", "leases")


class ApiError(Exception):
    """The API server refused, or could not be asked. `message` is its own sentence."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after


class NotFound(ApiError):  # noqa: N818
    """404."""


class Conflict(ApiError):  # noqa: N818
    """409: the object is not the one that was read (resourceVersion or uid)."""


class AlreadyExists(ApiError):  # noqa: N818
    """409 on create."""


class Refused(ApiError):  # noqa: N818
    """400, 403 or 422: the request as such will not be accepted, now."""


class Unavailable(ApiError):  # noqa: N818
    """429, 5xx or no answer: the same request may be accepted later."""


class NotLeading(ApiError):  # noqa: N818
    """Not asked: this process's lease has expired, and another one may be writing by now."""


class Cluster(Protocol):
    """What the operator asks of an API server. Raises ApiError and nothing else."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Object: ...
    def list(self, resource: Resource, namespace: str | None, selector: str = "") -> AsyncIterator[Object]:
        """Page by page; `namespace` None is all."""

    async def create(self, resource: Resource, namespace: str, body: Object) -> Object: ...
    async def delete(self, resource: Resource, namespace: str, name: str, uid: str, grace: int | None = None) -> None:
        """With background propagation, if the object still has this uid. `grace`: seconds that a pod gets, else its own."""

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Object, subresource: str = "") -> Object:
        """A JSON merge patch (RFC 7386); with metadata.resourceVersion in it, only onto the version that was read."""

    async def review(self, group: str, kind: str, spec: Object) -> Object:
        """Creates a TokenReview or SelfSubjectAccessReview; its status."""

    async def discover(self, path: str) -> Object:
        """GET of a discovery path such as /version."""

    async def close(self) -> None: ...


def merge_patch(old: Object, new: Object) -> Object:
    """The JSON merge patch that turns old into new: what is gone becomes null, lists are replaced."""
    patch: Object = {key: None for key in old if key not in new}
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            if difference := merge_patch(old[key], value):
                patch[key] = difference
        elif key not in old or old[key] != value:
            patch[key] = value
    return patch
