"""The rights of the operator, last of all: what it has, what it used in this run, and what it was refused."""

from datetime import UTC, datetime

import pytest

from e2e.test_1_smoke import job
from e2e.world import RELEASE, ROOT, SYSTEM, World
from finetune_operator.kube.permissions import PERMISSIONS, Scope
from integration.jobs import Jobs, wait
from testcluster import audit

pytestmark = pytest.mark.alone
CHART = str(ROOT / "charts/finetune-operator")
ACCOUNT = f"system:serviceaccount:{SYSTEM}:{RELEASE}"
UNUSED_BUT_JUSTIFIED = {
    # Asked by the admission of blockOwnerDeletion, not by the operator.
    ("update", "finetune.dev", "finetunejobs/finalizers"),
    ("update", "finetune.dev", "hyperparametersweeps/finalizers"),
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


def requests(world: World) -> list[audit.Request]:
    """What the API server recorded of the operator's account."""
    if world.audit_log is None:
        pytest.skip("the audit log of a cluster of yours is not ours to read")
    return audit.requests(world.audit_log, ACCOUNT)


def refused(world: World) -> list[audit.Request]:
    """Every refusal, but those of pods whose rights a test took away: Helm removes a role before its pod is gone."""
    far = datetime.max.replace(tzinfo=UTC)
    return [r for r in requests(world) if r.refused and r.time < world.rights_end.get(r.pod, far)]


def test_every_right_was_used_and_nothing_was_refused(installed: World) -> None:
    asked = requests(installed)
    assert all(r.pod for r in asked), "somebody else has a token of the operator's account"
    assert refused(installed) == []
    granted = {(verb, row.group, row.resource) for row in PERMISSIONS for verb in row.verbs}
    assert granted - {(r.verb, r.group, r.resource) for r in asked} == UNUSED_BUT_JUSTIFIED


def test_with_watched_namespaces_nothing_else_is_open_and_nothing_is_missing(installed: World) -> None:
    team, other = installed.namespace("e2e-team"), installed.namespace("e2e-other")
    watching, ignored = Jobs(installed.cluster, team), Jobs(installed.cluster, other)
    upgrade = ("upgrade", RELEASE, CHART, *installed.values(), "--wait", "--timeout=150s")
    before = installed.operator_pods()
    installed.rights_change()
    try:
        installed.helm(*upgrade, f"--set=watchNamespaces={{{team}}}")
        wait(lambda: not set(before) & set(installed.operator_pods()), "the pods of before gone", 90)
        left = {rule.split()[0] for rule in can_i(installed, "default")}
        wanted = {f"{row.resource}.{row.group}" for row in PERMISSIONS if row.scope is Scope.CLUSTER}
        assert left == wanted
        assert "finetunejobs.finetune.dev" in {rule.split()[0] for rule in can_i(installed, team)}
        ignored.apply(job(ignored, "ignored", epochs=1))
        watching.apply(job(watching, "served", epochs=1))
        assert watching.wait_state("served", "Complete", 180)["trainerStatus"]["progressPercentage"] == 100
        assert "status" not in ignored.get("ignored")
        assert ignored.list("jobs") == []
        assert "forbidden" not in installed.operator_logs().lower()
    finally:
        installed.rights_change()
        installed.helm(*upgrade)
        for namespace in (team, other):
            installed.kubectl("delete", "namespace", namespace, "--wait=false")
    if installed.ours:
        assert refused(installed) == []


def test_a_right_that_is_taken_away_is_told(installed: World) -> None:
    installed.rights_change()
    installed.kubectl("delete", "clusterrolebinding", f"{SYSTEM}-{RELEASE}")
    installed.kubectl("-n", SYSTEM, "delete", "pod", "-l", f"app.kubernetes.io/instance={RELEASE}")
    try:
        said = "The operator's account lacks rights: get finetunejobs.finetune.dev"
        wait(lambda: said in installed.operator_logs(), "what is missing, in the log", 60)
        assert "helm upgrade --install" in installed.operator_logs()
    finally:
        installed.helm("upgrade", RELEASE, CHART, *installed.values(), "--wait", "--timeout=150s")
    assert "leading" in installed.operator_logs()
