"""The chart's roles: exactly those of the permissions table, as rendered and as a real API server grants them."""

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import chart
import pytest

from finetune_operator.kube.permissions import PERMISSIONS, Scope
from testcluster import Cluster

Object = dict[str, Any]


def rules_of(objects: list[Object], namespace: str, watched: list[str]) -> dict[tuple[str, str, str], set[str]]:
    """(scope, group, resource) -> verbs that the operator's ServiceAccount has by the rendered roles."""
    granted: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    by_name = {p.resource: sorted(q.name for q in PERMISSIONS if q.resource == p.resource) for p in PERMISSIONS}
    cluster_wide = {"tokenreviews", "customresourcedefinitions"}
    for binding in (o for o in objects if o["kind"] in ("ClusterRoleBinding", "RoleBinding")):
        [subject] = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == (chart.SERVICE_ACCOUNT, namespace)
        where = binding["metadata"].get("namespace")
        role = chart.one(
            objects, binding["roleRef"]["kind"], name=binding["roleRef"]["name"], **({"namespace": where} if where else {})
        )
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    if where is None and resource in cluster_wide:
                        assert sorted(rule.get("resourceNames", [""])) == by_name[resource]
                        scope = Scope.CLUSTER
                    elif "resourceNames" in rule:
                        assert where == namespace
                        assert rule["resourceNames"] == [chart.OWN_NAMES[resource]]
                        scope = Scope.OWN
                    elif where == namespace and resource == "leases":
                        scope = Scope.OWN_NEW
                    else:
                        assert where in (watched or [None])
                        scope = Scope.WATCHED
                    granted[scope, group, resource] |= set(rule["verbs"])
    return granted


@pytest.mark.parametrize("watched", [[], ["team-a", "team-b"]], ids=["all-namespaces", "two-namespaces"])
def test_rights_are_exactly_those_of_the_permissions_table(helm_binary: Path, watched: list[str]) -> None:
    objects = chart.render(helm_binary, "ops", {"watchNamespaces": watched})
    wanted = {(p.scope, p.group, p.resource): set(p.verbs) for p in PERMISSIONS}
    assert rules_of(objects, "ops", watched) == wanted
    if watched:
        # Each of the namespaces has all the rights, not one a part of them.
        roles = [chart.one(objects, "Role", namespace=n)["rules"] for n in watched]
        assert roles[0] == roles[1]


def test_without_rbac_there_is_no_role(helm_binary: Path) -> None:
    kinds = {o["kind"] for o in chart.render(helm_binary, "ops", {"rbac": {"create": False, "aggregate": False}})}
    assert not {k for k in kinds if "Role" in k}


def may(cluster: Cluster, kubeconfig: Path, verb: str, resource: str, *args: str) -> bool:
    command = ["auth", "can-i", verb, resource, *args, "--kubeconfig", str(kubeconfig)]
    return cluster.kubectl(*command, check=False).stdout.strip() == "yes"


def test_the_token_has_these_rights_and_no_others(cluster: Cluster, helm_binary: Path, namespace: str) -> None:
    kubeconfig = chart.install(cluster, namespace, helm=helm_binary)
    assert "client-certificate" not in kubeconfig.read_text(encoding="utf-8")
    for p in PERMISSIONS:
        resource, _, sub = p.resource.partition("/")
        target = f"{resource}.{p.group}" if p.group else resource
        args = [f"--subresource={sub}"] if sub else []
        if name := chart.OWN_NAMES[p.resource] if p.scope is Scope.OWN else p.name:
            target += f"/{name}"
        own = p.scope in (Scope.OWN, Scope.OWN_NEW)
        scope = [] if p.scope is Scope.CLUSTER else ["-n", namespace if own else "default"]
        for verb in p.verbs:
            assert may(cluster, kubeconfig, verb, target, *args, *scope), f"{verb} {target} {args}"
    for verb, target in (
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "secrets"),
        ("get", "secrets/other"),
        ("create", "pods"),
        ("deletecollection", "pods"),
        ("create", "pods/exec"),
        ("get", "configmaps"),
        ("update", "finetunejobs.finetune.dev"),
        ("delete", "finetunejobs.finetune.dev"),
        ("create", "hyperparametersweeps.finetune.dev"),
        ("patch", "hyperparametersweeps.finetune.dev"),
        ("patch", "jobs.batch"),
        ("list", "services"),
        ("delete", "services"),
        ("get", "leases.coordination.k8s.io/other"),
        ("list", "leases.coordination.k8s.io"),
        ("get", "customresourcedefinitions.apiextensions.k8s.io/others.example.com"),
        ("patch", "customresourcedefinitions.apiextensions.k8s.io/finetunejobs.finetune.dev"),
    ):
        assert not may(cluster, kubeconfig, verb, target, "-n", namespace), f"{verb} {target}"


def wait_until_may(cluster: Cluster, kubeconfig: Path, verb: str, resource: str, *args: str) -> None:
    """The controller that aggregates roles takes a moment."""
    deadline = time.monotonic() + 60
    while not may(cluster, kubeconfig, verb, resource, *args):
        assert time.monotonic() < deadline, f"still may not {verb} {resource}"
        time.sleep(0.2)


def test_with_watched_namespaces_the_others_are_closed(cluster: Cluster, helm_binary: Path, namespace: str) -> None:
    kubeconfig = chart.install(cluster, namespace, {"watchNamespaces": [namespace]}, helm=helm_binary)
    assert may(cluster, kubeconfig, "create", "jobs.batch", "-n", namespace)
    assert not may(cluster, kubeconfig, "create", "jobs.batch", "-n", "default")
    assert not may(cluster, kubeconfig, "list", "finetunejobs.finetune.dev", "--all-namespaces")
    assert may(cluster, kubeconfig, "create", "tokenreviews.authentication.k8s.io")


@pytest.mark.slow
def test_editors_of_a_namespace_may_write_jobs_and_viewers_may_read(helm_binary: Path) -> None:
    with Cluster(controllers=("clusterrole-aggregation-controller",)) as cluster:
        cluster.kubectl("create", "namespace", "ops")
        chart.install(cluster, "ops", helm=helm_binary)
        for user, role in (("ed", "edit"), ("vi", "view")):
            cluster.kubectl("create", "rolebinding", user, f"--clusterrole={role}", f"--user={user}", "-n", "default")
        ed, vi = cluster.kubeconfig_for("ed"), cluster.kubeconfig_for("vi")
        jobs = ("finetunejobs.finetune.dev", "-n", "default")
        wait_until_may(cluster, ed, "create", *jobs)
        wait_until_may(cluster, vi, "list", *jobs)
        assert may(cluster, ed, "list", *jobs)
        assert not may(cluster, vi, "create", *jobs)
        assert not may(cluster, ed, "patch", *jobs, "--subresource=status")
