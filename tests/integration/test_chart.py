"""The chart, rendered by real Helm and taken by a real API server: rights, Pod Security, values, upgrade and uninstall."""

import base64
import json
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import chart
import pytest
import yaml

from finetune_operator.__main__ import build_parser
from finetune_operator.kube.permissions import PERMISSIONS, Scope
from testcluster import Cluster

Object = dict[str, Any]

VALUES: dict[str, Object] = {
    "defaults": {},
    "two-namespaces": {"watchNamespaces": ["default", "kube-public"]},
    "own-account": {"serviceAccount": {"create": False, "name": "default"}},
    "no-rbac": {"rbac": {"create": False, "aggregate": False}},
    "no-crds": {"crds": {"install": False}},
    "everything": {
        "fullnameOverride": "tuner",
        "image": {"repository": "example.com/team/operator", "tag": "1.2.3", "pullPolicy": "Always"},
        "imagePullSecrets": ["pull-a", "pull-b"],
        "trainer": {"image": "example.com/team/trainer:9", "modelMirror": "s3://mirror/models"},
        "log": {"level": "warning", "format": "json"},
        "watchNamespaces": ["default"],
        "serviceAccount": {"annotations": {"example.com/role": "tuner"}},
        "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
        "podLabels": {"team": "ml"},
        "podAnnotations": {"prometheus.io/scrape": "true"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "infra", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "priorityClassName": "system-cluster-critical",
    },
}


def one(objects: list[Object], kind: str, **fields: str) -> Object:
    found = [o for o in objects if o["kind"] == kind and all(o["metadata"].get(k) == v for k, v in fields.items())]
    assert len(found) == 1, f"{kind} {fields}: {[(o['kind'], o['metadata']['name']) for o in objects]}"
    return found[0]


def operator_container(objects: list[Object]) -> Object:
    container: Object = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return container


def values_keys(values: Object, path: str = "") -> set[str]:
    return {f"{path}{k}" for k in values} | {
        key for k, v in values.items() if isinstance(v, dict) for key in values_keys(v, f"{path}{k}.")
    }


# ---------------------------------------------------------------------------------------------------------- values --
def test_helm_lint_is_clean(helm_binary: Path) -> None:
    done = subprocess.run([str(helm_binary), "lint", "--strict", str(chart.CHART)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_every_rendering_is_taken_by_the_api_server(cluster: Cluster, helm_binary: Path, namespace: str, values: Object) -> None:
    objects = chart.render(helm_binary, namespace, values)
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    done = cluster.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "--server-side", "--force-conflicts", "-f", "-", stdin=everything
    )
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"wachNamespaces": ["a"]}, "wachNamespaces"),
        ({"image": {"repo": "x"}}, "repo"),
        ({"trainer": {"modelmirror": "s3://a/b"}}, "modelmirror"),
        ({"rbac": {"enabled": True}}, "enabled"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"watchNamespaces": "default"}, "watchNamespaces"),
        ({"watchNamespaces": ["Team A"]}, "watchNamespaces"),
        ({"trainer": {"modelMirror": "models"}}, "modelMirror"),
        ({"replicas": 2}, "replicas"),
        ({"log": {"level": "loud"}}, "level"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_a_mistake_in_values_is_refused_by_name(helm_binary: Path, values: Object, said: str) -> None:
    with pytest.raises(chart.RefusedError) as error:
        chart.render(helm_binary, "default", values)
    assert said in str(error.value)


def test_every_value_has_a_schema_a_default_and_a_comment() -> None:
    text = (chart.CHART / "values.yaml").read_text(encoding="utf-8")
    schema = json.loads((chart.CHART / "values.schema.json").read_text(encoding="utf-8"))

    def known(node: Object, path: str = "") -> set[str]:
        return {f"{path}{k}" for k in node.get("properties", {})} | {
            key for k, v in node.get("properties", {}).items() for key in known(v, f"{path}{k}.")
        }

    free = {"resources.requests", "resources.limits", "resources.claims", "global"}
    defaults = {k for k in values_keys(yaml.safe_load(text)) if not k.startswith("resources.")}
    assert known(schema) - free == defaults
    lines = text.splitlines()
    for i, line in enumerate(lines):
        # A value is a key with something behind it; a key that only opens a group explains itself.
        if re.match(r"^( {2})?[a-zA-Z]+: \S", line):
            assert lines[i - 1].strip().startswith("#"), f"values.yaml:{i + 1} {line!r} has no comment"


# ---------------------------------------------------------------------------------------------------------- rights --
def rules_of(objects: list[Object], namespace: str, watched: list[str]) -> dict[tuple[str, str, str], set[str]]:
    """(scope, group, resource) -> verbs that the operator's ServiceAccount has by the rendered roles."""
    granted: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    cluster_wide = {"tokenreviews"}
    for binding in (o for o in objects if o["kind"] in ("ClusterRoleBinding", "RoleBinding")):
        [subject] = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == (chart.SERVICE_ACCOUNT, namespace)
        where = binding["metadata"].get("namespace")
        role = one(
            objects, binding["roleRef"]["kind"], name=binding["roleRef"]["name"], **({"namespace": where} if where else {})
        )
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    if "resourceNames" in rule:
                        assert where == namespace
                        assert rule["resourceNames"] == [chart.OWN_NAMES[resource]]
                        scope = Scope.OWN
                    elif where == namespace and resource == "leases":
                        scope = Scope.OWN_NEW
                    elif where is None and resource in cluster_wide:
                        scope = Scope.CLUSTER
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
        roles = [one(objects, "Role", namespace=n)["rules"] for n in watched]
        assert roles[0] == roles[1]


def test_without_rbac_there_is_no_role(helm_binary: Path) -> None:
    kinds = {o["kind"] for o in chart.render(helm_binary, "ops", VALUES["no-rbac"])}
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
        if p.scope is Scope.OWN:
            target += f"/{chart.OWN_NAMES[p.resource]}"
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
        ("delete", "pods"),
        ("create", "pods/exec"),
        ("get", "configmaps"),
        ("update", "finetunejobs.finetune.dev"),
        ("delete", "finetunejobs.finetune.dev"),
        ("patch", "jobs.batch"),
        ("list", "services"),
        ("delete", "services"),
        ("get", "leases.coordination.k8s.io/other"),
        ("list", "leases.coordination.k8s.io"),
    ):
        assert not may(cluster, kubeconfig, verb, target, "-n", namespace), f"{verb} {target}"


def wait_until_may(cluster: Cluster, kubeconfig: Path, verb: str, resource: str, *args: str) -> None:
    """The controller that aggregates roles takes a moment."""
    deadline = time.monotonic() + 20
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


# ---------------------------------------------------------------------------------------------------- Pod Security --
def test_a_restricted_namespace_admits_the_operator(cluster: Cluster, helm_binary: Path, namespace: str) -> None:
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
    chart.install(cluster, namespace, helm=helm_binary)
    template = one(chart.render(helm_binary, namespace), "Deployment")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "operator"}}
    cluster.kubectl("create", "--dry-run=server", "-n", namespace, "-f", "-", stdin=json.dumps(pod))

    # The namespace really is strict: without one line the same pod is refused.
    del pod["spec"]["containers"][0]["securityContext"]["capabilities"]
    done = cluster.kubectl("create", "--dry-run=server", "-n", namespace, "-f", "-", stdin=json.dumps(pod), check=False)
    assert "violates PodSecurity" in done.stderr


def test_the_pod_has_a_read_only_root_and_no_fixed_user(helm_binary: Path) -> None:
    pod = one(chart.render(helm_binary, "ops"), "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert "runAsUser" not in json.dumps(pod)
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/tmp"}


# ------------------------------------------------------------------------------------------------------- operation --
def test_arguments_follow_from_the_values(helm_binary: Path) -> None:
    objects = chart.render(helm_binary, "ops", VALUES["everything"])
    container = operator_container(objects)
    assert container["image"] == "example.com/team/operator:1.2.3"
    service = one(objects, "Service")
    assert container["args"] == [
        "--trainer-image=example.com/team/trainer:9",
        "--own-namespace=$(POD_NAMESPACE)",
        f"--progress-url=https://{service['metadata']['name']}.ops.svc:8443",
        "--progress-bind=0.0.0.0:8443",
        "--metrics-bind=0.0.0.0:8080",
        f"--tls-secret={one(objects, 'Secret')['metadata']['name']}",
        "--log-level=warning",
        "--log-format=json",
        "--model-mirror=s3://mirror/models",
        "--namespace=default",
    ]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert {p["targetPort"]: p["port"] for p in service["spec"]["ports"]} == ports == {"progress": 8443, "metrics": 8080}
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_the_operator_takes_the_arguments(helm_binary: Path, values: Object) -> None:
    container = operator_container(chart.render(helm_binary, "ops", values))
    assert container["command"] == ["python", "-m", "finetune_operator"]
    given = [a.replace("$(POD_NAMESPACE)", "ops") for a in container["args"]]
    options = build_parser().parse_args(given)
    assert options.own_namespace == "ops"
    assert options.namespaces == values.get("watchNamespaces", [])


def test_install_upgrade_and_uninstall_keep_the_key_and_the_jobs(cluster: Cluster, helm_binary: Path, namespace: str) -> None:
    def helm(verb: str, *args: str) -> None:
        command = [str(helm_binary), verb, "tuner", *args, "-n", namespace, "--kubeconfig", str(cluster.kubeconfig)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr

    def key() -> str | None:
        got = cluster.kubectl("get", "secret", "tuner-finetune-operator-progress-tls", "-n", namespace, "-o", "json")
        value: str | None = (json.loads(got.stdout).get("data") or {}).get("tls.key")
        return value

    # Other tests of this session have applied the CRD already.
    helm("install", str(chart.CHART), "--take-ownership")
    assert key() is None
    ours = base64.b64encode(b"made by the operator").decode()
    patch = json.dumps({"data": {"tls.key": ours}})
    cluster.kubectl("patch", "secret", "tuner-finetune-operator-progress-tls", "-n", namespace, "--type=merge", "-p", patch)
    helm("upgrade", str(chart.CHART), "--set", "podLabels.team=ml")
    assert key() == ours
    helm("uninstall")
    assert key() == ours
    crd = json.loads(cluster.kubectl("get", "crd", "finetunejobs.finetune.dev", "-o", "json").stdout)
    assert crd["metadata"].get("deletionTimestamp") is None
    assert cluster.kubectl("get", "deployments", "-n", namespace, "-o", "name").stdout == ""
