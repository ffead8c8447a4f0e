"""Every right that the operator needs, and why. The preflight asks for exactly these; the chart's roles are compared with it."""

from dataclasses import dataclass
from enum import StrEnum

from finetune_api.crd import CRD_NAME, SWEEP_CRD_NAME


class Scope(StrEnum):
    """Where a right is needed."""

    WATCHED = "watched"
    """In the namespaces that are watched (all, or the given ones)."""
    CLUSTER = "cluster"
    """The resource has no namespace."""
    OWN = "own"
    """In the operator's own namespace, on one object by name."""
    OWN_NEW = "own-new"
    """In the operator's own namespace, without a name: RBAC knows none yet when an object is created."""


@dataclass(frozen=True)
class Permission:
    """One row: verbs on a resource (with subresource behind a slash)."""

    verbs: tuple[str, ...]
    group: str
    resource: str
    scope: Scope
    why: str
    name: str = ""
    """The one object that it is about, where that is known."""


PERMISSIONS: tuple[Permission, ...] = (
    Permission(
        ("get", "list", "watch", "create", "patch"),
        "finetune.dev",
        "finetunejobs",
        Scope.WATCHED,
        "to know what is wanted; each trial of a sweep is one, and is stopped, suspended and judged by a patch",
    ),
    Permission(("patch",), "finetune.dev", "finetunejobs/status", Scope.WATCHED, "to say what happens"),
    Permission(("update",), "finetune.dev", "finetunejobs/finalizers", Scope.WATCHED, "to own children (blockOwnerDeletion)"),
    Permission(
        ("get", "list", "watch", "delete"),
        "finetune.dev",
        "hyperparametersweeps",
        Scope.WATCHED,
        "to know what is wanted; deleted when ttlSecondsAfterFinished is over",
    ),
    Permission(("patch",), "finetune.dev", "hyperparametersweeps/status", Scope.WATCHED, "to say what happens"),
    Permission(
        ("update",), "finetune.dev", "hyperparametersweeps/finalizers", Scope.WATCHED, "to own trials (blockOwnerDeletion)"
    ),
    Permission(
        ("get", "list", "watch", "create", "delete"), "batch", "jobs", Scope.WATCHED, "each attempt is a Job; suspend deletes it"
    ),
    Permission(
        ("get", "list", "watch", "delete"),
        "",
        "pods",
        Scope.WATCHED,
        "to see how the trainer's pod fares and who posts progress; a suspension that discards (checkpoint.onSuspend) ends it",
    ),
    Permission(("get", "create"), "", "services", Scope.WATCHED, "the pods of a job with numNodes > 1 find each other by name"),
    Permission(("create",), "", "events", Scope.WATCHED, "to tell users what was done (kubectl describe)"),
    Permission(("create",), "authentication.k8s.io", "tokenreviews", Scope.CLUSTER, "to know which pod posts progress"),
    Permission(
        ("get",),
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        Scope.CLUSTER,
        "to say at the start when it is older than the operator",
        CRD_NAME,
    ),
    Permission(
        ("get",),
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        Scope.CLUSTER,
        "the same for sweeps",
        SWEEP_CRD_NAME,
    ),
    Permission(("get", "patch"), "", "secrets", Scope.OWN, "the progress server's own CA, in one Secret by name"),
    Permission(
        ("get", "patch"), "coordination.k8s.io", "leases", Scope.OWN, "of several operators one writes: the Lease's holder"
    ),
    Permission(("create",), "coordination.k8s.io", "leases", Scope.OWN_NEW, "that Lease, the first time"),
)
