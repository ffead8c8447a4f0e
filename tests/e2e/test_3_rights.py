"""The rights of the operator, last of all: what it has, what it used in this run, and what it was refused."""

import json

import pytest

from e2e.world import RELEASE, ROOT, SYSTEM, World
from finetune_operator.kube.permissions import PERMISSIONS, Scope
from integration.jobs import Object, wait

CHART = str(ROOT / "charts/finetune-operator")
ACCOUNT = f"system:serviceaccount:{SYSTEM}:{RELEASE}"
UNUSED_BUT_JUSTIFIED = {
    # Asked by the admission of blockOwnerDeletion, not by the operator.
    ("update", "finetune.dev", "finetunejobs/finalizers"),
}


def can_i(world: World, namespace: str) -> list[str]:
    """`kubectl auth can-i --list` without what everybody may."""
    listed = world.kubectl("auth", "can-i", "--list", f"--as={ACCOUNT}", "-n", namespace).stdout.splitlines()[1:]
    everybody = ("selfsubject", " ")
    return [line for line in listed if not line.startswith(everybody) and "clustertrustbundles" not in line]


def test_its_account_has_no_wildcard_and_one_secret(installed: World) -> None:
    for namespace in ("default", SYSTEM):
        rules = can_i(installed, namespace)
        assert not [rule for rule in rules if "*" in rule], rules
        secrets = [rule for rule in rules if rule.startswith("secrets")]
        assert len(secrets) == (namespace == SYSTEM), secrets
        assert all("finetune-operator-progress-tls" in rule for rule in secrets)


def events(world: World) -> list[Object]:
    """What the API server recorded of the operator's account."""
    assert world.node is not None
    recorded = map(json.loads, world.node.cluster.audit_log.read_text().splitlines())
    return [event for event in recorded if event["user"].get("username") == ACCOUNT]


def test_every_right_was_used_and_none_was_missing(installed: World) -> None:
    if installed.node is None:
        pytest.skip("the audit log of a cluster of yours is not ours to read")
    used, allowed, refused = set(), set(), set()
    for event in events(installed):
        reference = event.get("objectRef") or {}
        resource = "/".join(filter(None, (reference.get("resource"), reference.get("subresource"))))
        used.add((event["verb"], reference.get("apiGroup", ""), resource))
        forbidden = event.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid"
        (refused if forbidden else allowed).add((event["verb"], event["requestURI"].partition("?")[0]))
    # `helm uninstall` may take the rights from a pod that has yet to let go of its Lease; what was allowed before is not missing.
    assert refused - allowed == set()
    granted = {(verb, row.group, row.resource) for row in PERMISSIONS for verb in row.verbs}
    assert granted - used == UNUSED_BUT_JUSTIFIED


def test_with_watched_namespaces_nothing_else_is_open(installed: World) -> None:
    team = installed.namespace("e2e-team")
    try:
        installed.helm(
            "upgrade", RELEASE, CHART, *installed.values(), f"--set=watchNamespaces={{{team}}}", "--wait", "--timeout=150s"
        )
        left = {rule.split()[0] for rule in can_i(installed, "default")}
        wanted = {f"{row.resource}.{row.group}" for row in PERMISSIONS if row.scope is Scope.CLUSTER}
        assert left == wanted
        assert "finetunejobs.finetune.dev" in {rule.split()[0] for rule in can_i(installed, team)}
    finally:
        installed.helm("upgrade", RELEASE, CHART, *installed.values(), "--wait", "--timeout=150s")
        installed.kubectl("delete", "namespace", team, "--wait=false")


def test_a_right_that_is_taken_away_is_told(installed: World) -> None:
    installed.kubectl("delete", "clusterrolebinding", f"{SYSTEM}-{RELEASE}")
    installed.kubectl("-n", SYSTEM, "delete", "pod", "-l", f"app.kubernetes.io/instance={RELEASE}")
    try:
        said = "The operator's account lacks rights: get finetunejobs.finetune.dev"
        wait(lambda: said in installed.operator_logs(), "what is missing, in the log", 60)
        assert "helm upgrade --install" in installed.operator_logs()
    finally:
        installed.helm("upgrade", RELEASE, CHART, *installed.values(), "--wait", "--timeout=150s")
    assert "leading" in installed.operator_logs()
