"""The chart, rendered by real Helm and taken by a real API server: values, Pod Security, upgrade and uninstall."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import chart
import pytest
import yaml

from finetune_api.names import LABEL_JOB
from finetune_operator.__main__ import build_parser
from finetune_operator.observe.metrics import Metrics
from integration import peers
from integration.jobs import Jobs, manifest, wait
from testcluster import Cluster

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]

VALUES: dict[str, Object] = {
    "defaults": {},
    "two-namespaces": {"watchNamespaces": ["default", "kube-public"]},
    "names-of-digits": {"watchNamespaces": ["2024"], "imagePullSecrets": ["007"]},
    "own-account": {"serviceAccount": {"create": False, "name": "default"}},
    "no-rbac": {"rbac": {"create": False, "aggregate": False}},
    "no-crds": {"crds": {"install": False}},
    "three-replicas": {"replicas": 3},
    "cert-manager": {"progressTLS": {"certManager": {"enabled": True, "issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}}},
    "network-policy": {"networkPolicy": {"enabled": True}},
    "network-policy-of-two": {
        "watchNamespaces": ["team-a", "team-b"],
        "networkPolicy": {"enabled": True, "metricsFrom": []},
    },
    "service-monitor": {
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "kube-prometheus"}},
            "prometheusRule": {"enabled": True},
            "dashboards": {"enabled": True},
        }
    },
    "everything": {
        "fullnameOverride": "tuner",
        "image": {"repository": "example.com/team/operator", "tag": "1.2.3", "pullPolicy": "Always"},
        "imagePullSecrets": ["pull-a", "pull-b"],
        "replicas": 2,
        "jobDefaults": {
            "image": "example.com/team/trainer:9",
            "modelMirror": "s3://mirror/models",
            "datasetMirror": "s3://mirror/datasets",
            "queueName": "gpus",
            "env": [{"name": "AWS_ENDPOINT_URL", "value": "https://s3.example.com"}, {"name": "ODD", "value": "$(X) \"'"}],
            "envFrom": [{"secretRef": {"name": "s3-credentials"}}],
            "podTemplate": {
                "metadata": {"labels": {"cost": "ml"}},
                "spec": {
                    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                    "imagePullSecrets": [{"name": "pull"}],
                    "volumes": [{"name": "ca", "configMap": {"name": "ca-bundle"}}],
                    "volumeMounts": [{"name": "ca", "mountPath": "/etc/ca"}],
                },
            },
        },
        "extraEnv": [
            {"name": "HTTPS_PROXY", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "url", "optional": True}}},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "networkPolicy": {"enabled": True, "metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}]},
        "metrics": {"podMonitor": {"enabled": True, "interval": "1m"}, "prometheusRule": {"enabled": True, "labels": {"a": "b"}}},
        "log": {"level": "warning", "format": "json"},
        "watchNamespaces": ["default"],
        "serviceAccount": {"annotations": {"example.com/role": "tuner"}},
        "resources": {"requests": {"cpu": 0.5, "memory": "1Gi"}, "limits": {"memory": "2Gi", "example.com/nic": 1}},
        "podLabels": {"team": "ml"},
        "podAnnotations": {"prometheus.io/scrape": "true"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "infra", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}],
        "affinity": {
            "podAntiAffinity": {},
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "DoesNotExist"}]}]
                }
            },
        },
        "priorityClassName": "system-cluster-critical",
    },
}


def operator_container(objects: list[Object]) -> Object:
    container: Object = chart.one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return container


def values_keys(values: Object, path: str = "") -> set[str]:
    return {f"{path}{k}" for k in values} | {
        key for k, v in values.items() if isinstance(v, dict) for key in values_keys(v, f"{path}{k}.")
    }


@pytest.fixture(scope="session")
def monitors_and_certificates(cluster: Cluster) -> None:
    """The kinds that the chart makes for other projects."""
    peers.install(cluster, peers.CERT_MANAGER, peers.PROMETHEUS_OPERATOR)


# ---------------------------------------------------------------------------------------------------------- values --
def test_helm_lint_is_clean(helm_binary: Path) -> None:
    done = subprocess.run([str(helm_binary), "lint", "--strict", str(chart.CHART)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_every_rendering_is_taken_by_the_api_server(
    cluster: Cluster, monitors_and_certificates: None, helm_binary: Path, namespace: str, values: Object
) -> None:
    for watched in values.get("watchNamespaces", []):
        cluster.kubectl("create", "namespace", watched, check=False)
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
        ({"jobDefaults": {"modelmirror": "s3://a/b"}}, "modelmirror"),
        ({"jobDefaults": {"podTemplate": {"spec": {"hostNetwork": True}}}}, "hostNetwork"),
        ({"jobDefaults": {"env": [{"name": "A", "valeu": "x"}]}}, "valeu"),
        ({"jobDefaults": {"queueName": "my queue"}}, "queueName"),
        ({"progressTLS": {"certManager": {"enabled": True}}}, "issuerRef.name"),
        ({"metrics": {"serviceMonitor": {"interval": "30"}}}, "interval"),
        ({"networkPolicy": True}, "networkPolicy"),
        ({"replicas": 0}, "replicas"),
        ({"replicas": "2"}, "replicas"),
        ({"extraEnv": {"A": "b"}}, "extraEnv"),
        ({"rbac": {"enabled": True}}, "enabled"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"watchNamespaces": "default"}, "watchNamespaces"),
        ({"watchNamespaces": ["Team A"]}, "watchNamespaces"),
        ({"jobDefaults": {"modelMirror": "models"}}, "modelMirror"),
        ({"jobDefaults": {"datasetMirror": "data"}}, "datasetMirror"),
        ({"log": {"level": "loud"}}, "level"),
        ({"extraEnv": [{"nam": "X"}]}, "nam"),
        ({"extraEnv": [{"name": "X", "valeu": "y"}]}, "valeu"),
        ({"extraEnv": [{"name": "X", "value": 1}]}, "value"),
        ({"extraEnv": [{"name": "X", "valueFrom": {"secretRef": {"name": "a"}}}]}, "secretRef"),
        ({"extraEnv": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "a"}}}]}, "key"),
        ({"resources": {"limit": {"memory": "1Gi"}}}, "limit"),
        ({"resources": {"limits": {"mem": "1Gi"}}}, "mem"),
        ({"resources": {"limits": {"memory": "1GiB"}}}, "memory"),
        ({"resources": {"requests": {"cpu": -1}}}, "cpu"),
        ({"tolerations": [{"kye": "gpu"}]}, "kye"),
        ({"tolerations": [{"key": "gpu", "operator": "Exist"}]}, "operator"),
        ({"tolerations": [{"key": "gpu", "effect": "NoScedule"}]}, "effect"),
        ({"affinity": {"podAntiAfinity": {}}}, "podAntiAfinity"),
        ({"affinity": {"nodeAffinity": {"required": {}}}}, "required"),
        ({"networkPolicy": {"metricsFrom": [{"nameSpaceSelector": {}}]}}, "nameSpaceSelector"),
        ({"networkPolicy": {"metricsFrom": [{"podSelector": {"app": "prometheus"}}]}}, "app"),
        ({"jobDefaults": {"podTemplate": {"spec": {"tolerations": [{"kye": "gpu"}]}}}}, "kye"),
        ({"jobDefaults": {"podTemplate": {"spec": {"affinity": {"nodeAfinity": {}}}}}}, "nodeAfinity"),
        ({"jobDefaults": {"podTemplate": {"spec": {"volumes": [{"name": "ca", "configmap": {"name": "x"}}]}}}}, "configmap"),
        ({"jobDefaults": {"podTemplate": {"spec": {"volumes": [{"name": "finetune-ca", "emptyDir": {}}]}}}}, "volumes"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_a_mistake_in_values_is_refused_by_name(helm_binary: Path, values: Object, said: str) -> None:
    with pytest.raises(chart.RefusedError) as error:
        chart.render(helm_binary, "default", values)
    assert said in str(error.value)


CORE = {  # what the schema copies of Kubernetes -> where the API server keeps it
    "envVar": "EnvVar",
    "resources": "ResourceRequirements",
    "toleration": "Toleration",
    "affinity": "Affinity",
    "volume": "Volume",
    "networkPolicyPeer": "NetworkPolicyPeer",
}


@pytest.mark.parametrize("name", CORE)
def test_what_is_closed_is_what_the_api_server_knows(cluster: Cluster, name: str) -> None:
    """A key that a newer Kubernetes adds fails here, not at a user's."""
    documents = [
        cluster.kubectl("get", "--raw", f"/openapi/v3/{path}").stdout for path in ("api/v1", "apis/networking.k8s.io/v1")
    ]
    served = {key: schema for text in documents for key, schema in json.loads(text)["components"]["schemas"].items()}
    ours = json.loads((chart.CHART / "values.schema.json").read_text(encoding="utf-8"))["definitions"]

    def compare(mine: Object, theirs: Object, path: str) -> None:
        mine = ours[mine["$ref"].rpartition("/")[2]] if "$ref" in mine else mine
        [theirs] = [served[r["$ref"].rpartition("/")[2]] for r in theirs.get("allOf", [])] or [theirs]
        if "items" in mine:
            compare(mine["items"], theirs["items"], f"{path}[]")
        if mine.get("additionalProperties") is False:
            assert mine["properties"].keys() == theirs["properties"].keys(), path
            assert set(mine.get("required", [])) <= set(theirs["properties"]), path
            for key, child in mine["properties"].items():
                compare(child, theirs["properties"][key], f"{path}.{key}")

    [schema] = [schema for key, schema in served.items() if re.fullmatch(rf"io\.k8s\.api\..+\.v1\.{CORE[name]}", key)]
    compare(ours[name], schema, name)


def test_every_value_has_a_schema_a_default_and_a_comment() -> None:
    text = (chart.CHART / "values.yaml").read_text(encoding="utf-8")
    schema = json.loads((chart.CHART / "values.schema.json").read_text(encoding="utf-8"))

    def known(node: Object, path: str = "") -> set[str]:
        return {f"{path}{k}" for k in node.get("properties", {})} | {
            key for k, v in node.get("properties", {}).items() for key in known(v, f"{path}{k}.")
        }

    def free(key: str) -> bool:
        """Below these, what may be said is Kubernetes' own."""
        return key == "global" or key.startswith(("resources.", "jobDefaults.podTemplate.", "metrics.dashboards.labels."))

    assert {k for k in known(schema) if not free(k)} == {k for k in values_keys(yaml.safe_load(text)) if not free(k)}
    lines = text.splitlines()
    for i, line in enumerate(lines):
        # A value is a key with something behind it; a key that only opens a group explains itself.
        if re.match(r"^ *[a-zA-Z]+: \S", line) and not line.startswith("    cpu") and "memory:" not in line:
            assert lines[i - 1].strip().startswith("#"), f"values.yaml:{i + 1} {line!r} has no comment"


# ---------------------------------------------------------------------------------------------------- Pod Security --
def test_a_restricted_namespace_admits_the_operator(cluster: Cluster, helm_binary: Path, namespace: str) -> None:
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted", "--overwrite")
    chart.install(cluster, namespace, helm=helm_binary)
    template = chart.one(chart.render(helm_binary, namespace), "Deployment")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {**template["metadata"], "name": "operator"}}
    cluster.kubectl("create", "--dry-run=server", "-n", namespace, "-f", "-", stdin=json.dumps(pod))

    # The namespace really is strict: without one line the same pod is refused.
    del pod["spec"]["containers"][0]["securityContext"]["capabilities"]
    done = cluster.kubectl("create", "--dry-run=server", "-n", namespace, "-f", "-", stdin=json.dumps(pod), check=False)
    assert "violates PodSecurity" in done.stderr


def test_the_pod_has_a_read_only_root_and_no_fixed_user(helm_binary: Path) -> None:
    pod = chart.one(chart.render(helm_binary, "ops"), "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert "runAsUser" not in json.dumps(pod)
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/tmp"}


# ------------------------------------------------------------------------------------------------------- operation --
def test_arguments_follow_from_the_values(helm_binary: Path) -> None:
    objects = chart.render(helm_binary, "ops", VALUES["everything"])
    container = operator_container(objects)
    assert container["image"] == "example.com/team/operator:1.2.3"
    service = chart.one(objects, "Service")
    assert container["args"] == [
        "--trainer-image=example.com/team/trainer:9",
        "--own-namespace=$(POD_NAMESPACE)",
        f"--progress-url=https://{service['metadata']['name']}.ops.svc:8443",
        f"--tls-secret={chart.one(objects, 'Secret')['metadata']['name']}",
        "--lease=tuner",
        "--log-level=warning",
        "--log-format=json",
        "--model-mirror=s3://mirror/models",
        "--dataset-mirror=s3://mirror/datasets",
        container["args"][9],
        "--namespace=default",
    ]
    flag, _, defaults = container["args"][9].partition("=")
    assert flag == "--job-defaults"
    # What the kubelet does with "$$(".
    expected = {
        k: v for k, v in VALUES["everything"]["jobDefaults"].items() if k not in ("image", "modelMirror", "datasetMirror")
    }
    assert json.loads(defaults.replace("$$(", "$(")) == expected
    assert container["env"][-2:] == VALUES["everything"]["extraEnv"]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert {p["targetPort"]: p["port"] for p in service["spec"]["ports"]} == ports == {"progress": 8443, "metrics": 8080}
    labels = chart.one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_the_operator_takes_the_arguments(helm_binary: Path, values: Object) -> None:
    container = operator_container(chart.render(helm_binary, "ops", values))
    assert container["command"] == ["python", "-m", "finetune_operator"]
    given = [a.replace("$(POD_NAMESPACE)", "ops").replace("$$(", "$(") for a in container["args"]]
    options = build_parser().parse_args(given)
    assert options.own_namespace == "ops"
    assert options.namespaces == values.get("watchNamespaces", [])


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_disruption_budget_is_there_for_several_only(helm_binary: Path, replicas: int) -> None:
    objects = chart.render(helm_binary, "ops", {"replicas": replicas})
    deployment = chart.one(objects, "Deployment")
    assert deployment["spec"]["replicas"] == replicas
    budgets = [o for o in objects if o["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == (replicas > 1)
    for budget in budgets:
        selected = budget["spec"]["selector"]["matchLabels"].items()
        assert selected <= deployment["spec"]["template"]["metadata"]["labels"].items()
    names = {e["name"]: e["valueFrom"]["fieldRef"]["fieldPath"] for e in operator_container(objects)["env"]}
    assert names == {"POD_NAMESPACE": "metadata.namespace", "POD_NAME": "metadata.name", "POD_IP": "status.podIP"}


def test_with_cert_manager_the_operator_has_no_secret(helm_binary: Path) -> None:
    objects = chart.render(helm_binary, "ops", VALUES["cert-manager"])
    assert not [o for o in objects if o["kind"] == "Secret"]
    rules = [rule for o in objects if o["kind"] in ("Role", "ClusterRole") for rule in o["rules"]]
    assert not [rule for rule in rules if "secrets" in rule["resources"]]
    certificate = chart.one(objects, "Certificate")
    [volume] = [v for v in chart.one(objects, "Deployment")["spec"]["template"]["spec"]["volumes"] if "secret" in v]
    assert volume["secret"]["secretName"] == certificate["spec"]["secretName"]
    container = operator_container(objects)
    mounted = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == volume["name"])
    assert f"--tls-dir={mounted}" in container["args"]
    assert not [a for a in container["args"] if a.startswith("--tls-secret")]
    [url] = [a for a in container["args"] if a.startswith("--progress-url=")]
    assert url.split("//")[1].split(":")[0] in certificate["spec"]["dnsNames"]


def test_the_network_policy_lets_trainers_and_operators_in(helm_binary: Path) -> None:
    objects = chart.render(helm_binary, "ops", VALUES["network-policy-of-two"])
    template, policy = chart.one(objects, "Deployment")["spec"]["template"], chart.one(objects, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    [progress] = policy["ingress"]  # nobody may read the metrics: metricsFrom is empty
    assert progress["ports"] == [{"port": "progress"}]
    trainers, operators = progress["from"]
    assert trainers["podSelector"]["matchExpressions"] == [{"key": LABEL_JOB, "operator": "Exists"}]
    assert trainers["namespaceSelector"]["matchExpressions"][0]["values"] == ["team-a", "team-b"]
    assert operators == {"podSelector": policy["podSelector"]}


def test_monitors_and_dashboards_speak_of_metrics_that_exist(helm_binary: Path) -> None:
    objects = chart.render(helm_binary, "ops", VALUES["service-monitor"])
    service, monitor = chart.one(objects, "Service"), chart.one(objects, "ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {e["port"] for e in monitor["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
    pods = chart.one(chart.render(helm_binary, "ops", VALUES["everything"]), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert all(e["honorLabels"] for e in (*monitor["endpoints"], *pods)), "`namespace` of a job would be the operator's"
    there = {sample for family in Metrics().registry.collect() for sample in (family.name, f"{family.name}_total")}
    said: list[str] = []
    for group in chart.one(objects, "PrometheusRule")["spec"]["groups"]:
        said += [rule["expr"] for rule in group["rules"]]
        for rule in group["rules"]:
            assert (ROOT / f"docs/runbooks/{rule['alert']}.md").is_file(), "an alert without a runbook"
    for text in chart.one(objects, "ConfigMap")["data"].values():
        said += [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    assert len(said) > 5
    assert 'absent(finetune_leader{namespace="ops"} == 1)' in said, "another release's leader would hide that there is none"
    for name in re.findall(r"finetune_[a-z_]+", " ".join(said)):
        assert name.removesuffix("_bucket") in there, f"{name} is no metric of the operator"


def test_install_upgrade_rollback_and_uninstall_keep_the_key_and_the_jobs(
    cluster: Cluster, helm_binary: Path, namespace: str, tmp_path: Path
) -> None:
    def helm(verb: str, *args: str) -> None:
        command = [str(helm_binary), verb, "tuner", *args, "-n", namespace, "--kubeconfig", str(cluster.kubeconfig)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr

    def key() -> str | None:
        got = cluster.kubectl("get", "secret", "tuner-finetune-operator-progress-tls", "-n", namespace, "-o", "json")
        value: str | None = (json.loads(got.stdout).get("data") or {}).get("tls.key")
        return value

    def made(name: str) -> Object:
        found: Object = Jobs(cluster, namespace).get(name)
        return {"spec": found["spec"], **{k: found["metadata"][k] for k in ("uid", "generation")}}

    # Other tests of this session have applied the CRD already.
    helm("install", str(chart.CHART), "--take-ownership")
    assert key() is None
    ours = base64.b64encode(b"made by the operator").decode()
    patch = json.dumps({"data": {"tls.key": ours}})
    cluster.kubectl("patch", "secret", "tuner-finetune-operator-progress-tls", "-n", namespace, "--type=merge", "-p", patch)
    jobs = Jobs(cluster, namespace)
    jobs.apply(manifest("old", suspend=True))
    before = made("old")

    # The next version adds a field.
    newer = Path(shutil.copytree(chart.CHART, tmp_path / "newer"))
    [file] = newer.glob("files/crds/finetunejobs*")
    crd = yaml.safe_load(file.read_text(encoding="utf-8"))
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    schema["spec"]["properties"]["newField"] = {"type": "string"}
    file.write_text(yaml.safe_dump(crd), encoding="utf-8")
    helm("upgrade", str(newer), "--set", "podLabels.team=ml")
    assert (key(), made("old")) == (ours, before)
    wait(lambda: not cluster.kubectl("explain", "ftj.spec.newField", check=False).returncode, "the new field")
    jobs.apply(manifest("new", suspend=True, newField="x"))
    assert made("new")["spec"]["newField"] == "x"

    helm("rollback", "1")
    assert (key(), made("old")) == (ours, before)
    wait(lambda: "newField" not in made("new")["spec"], "the field to go with its version")
    helm("uninstall")
    assert (key(), made("old")) == (ours, before)
    found = json.loads(cluster.kubectl("get", "crd", "finetunejobs.finetune.dev", "-o", "json").stdout)
    assert found["metadata"].get("deletionTimestamp") is None
    assert cluster.kubectl("get", "deployments", "-n", namespace, "-o", "name").stdout == ""
