"""FineTuneJobs and sweeps under GitOps on a real control plane: health by Argo CD's Lua and Flux's CEL, and a re-apply changes nothing.

The jobs and sweeps of every state are made by the operator and scripted pods. The CEL runs in the API server, whose engine is the one of Flux.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from integration import chart, peers
from integration.jobs import Jobs, manifest, wait
from integration.sweeps import METRIC, sweep
from integration.test_operator_progress import Pod
from testcluster import Cluster, PodRunner, PodScript, fail, hang, succeed, unschedulable
from testcluster.operator import Operator
from unit.test_gitops_health import health

GITOPS = Path(__file__).parents[2] / "examples" / "gitops"
JOB = yaml.safe_load((GITOPS / "jobs" / "feedback-1.yaml").read_text(encoding="utf-8"))
ARGOCD, FLUX = "argocd-controller", "kustomize-controller"
MARKS = {  # what the two write onto everything that they apply
    ARGOCD: {"annotations": {"argocd.argoproj.io/tracking-id": "training-jobs:finetune.dev/FineTuneJob:training/feedback-1"}},
    FLUX: {"labels": {"kustomize.toolkit.fluxcd.io/name": "jobs", "kustomize.toolkit.fluxcd.io/namespace": "flux-system"}},
}

Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def script(pod: Object) -> PodScript:
    bad_data = json.dumps({"outcome": "Failed", "reason": "DataInvalid", "message": "train.csv: line 3 has 2 fields"})
    score = {"modelUri": "s3://models/x/model", "metrics": [{"name": METRIC, "value": "0.7"}]}
    scripts = {
        "complete": succeed(),
        "failed": fail(11, bad_data),
        "restarting": fail(1),
        "pending": unschedulable(),
        "complete-sweep-t0000": succeed(message=json.dumps({"outcome": "Complete", "result": score})),
        "failed-sweep-t0000": fail(11, bad_data),
        "": succeed(message=json.dumps({"outcome": "Complete"})),  # what closes a sweep
    }
    return scripts.get(pod["metadata"]["labels"].get("finetune.dev/job", ""), hang(20))


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[PodRunner]:
    with PodRunner(cluster.kubeconfig, script) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster, operator: Operator, runner: PodRunner, namespace: str) -> Jobs:
    return Jobs(cluster, namespace)


# ---------------------------------------------------------------------------------------------------------- health --
@pytest.fixture(scope="module")
def recorded(cluster: Cluster, operator: Operator, runner: PodRunner) -> Iterator[dict[str, Object]]:
    """A job and a sweep of every state, as the API server has them."""
    cluster.kubectl("create", "namespace", "recorded")
    jobs = Jobs(cluster, "recorded")
    wait(lambda: not cluster.kubectl("-n", "recorded", "get", "sa", "default", check=False).returncode, "its ServiceAccount")
    queued = manifest("queued")
    queued["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    restarts = {"failurePolicy": {"maxRestarts": 50}}
    names = ("pending", "running", "stopped", "complete", "failed")
    jobs.apply(*map(manifest, names), queued, manifest("suspended", suspend=True), manifest("restarting", **restarts))
    one = {"numTrials": 1, "parallelTrials": 1, "maxFailedTrials": 0}
    jobs.apply(*(sweep(f"{name}-sweep", **one) for name in ("running", "complete", "failed")))
    jobs.apply(sweep("suspended-sweep", suspend=True, **one))
    unseen = cluster.kubectl(
        "-n", "recorded", "create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(manifest("x"))
    )

    jobs.wait_pod("queued-1")
    suspended = json.dumps({"spec": {"suspend": True}})  # as Kueue does
    cluster.kubectl("-n", "recorded", "patch", "job", "queued-1", "--type=merge", "-p", suspended)
    jobs.wait_state("stopped", "Running")
    jobs.patch("stopped", {"stop": True})
    pod = Pod(jobs, "running-1")
    jobs.wait_state("running", "Running")
    progress = {"trainerStatus": {"progressPercentage": 40, "estimatedRemainingSeconds": 130, "metrics": []}}
    assert pod.post(pod.token(), progress)[0] == 200
    wait(lambda: jobs.status("running").get("trainerStatus"), "progress")
    wait(lambda: jobs.condition("pending", "Running").get("reason") == "Unschedulable", "Unschedulable")

    def of(name: str, state: str) -> Object:
        kind = "hps" if name.endswith("-sweep") else "ftj"
        found: Object = wait(
            lambda: o if (o := jobs.get(name, kind)).get("status", {}).get("state") == state else None, f"{name} {state}"
        )
        return found

    states = {name: name.title() for name in ("pending", "running", "complete", "failed", "queued", "suspended", "restarting")}
    states |= {f"{name}-sweep": name.title() for name in ("running", "complete", "failed", "suspended")}
    found = {name: of(name, state) for name, state in states.items()}
    yield found | {"stopped": of("stopped", "Complete"), "unseen": json.loads(unseen.stdout)}
    cluster.kubectl("delete", "namespace", "recorded", "--wait=false")


HEALTH = {
    "unseen": ("Progressing", "The operator has not seen this version yet.", "inProgress"),
    "pending": ("Progressing", "Pending: 0/1 nodes are available", "inProgress"),
    "queued": ("Progressing", "Queued: The queue has not admitted the Job.", "inProgress"),
    "running": ("Progressing", "Running, 40 %, about 3 min left", "inProgress"),
    "restarting": ("Progressing", "Restarting: UserCodeError: ", "inProgress"),
    "suspended": ("Suspended", "Suspended by spec.suspend; no pods are running.", "current"),
    "complete": ("Healthy", "The model is trained.", "current"),
    "stopped": ("Healthy", "Stopped by spec.stop.", "current"),
    "failed": ("Degraded", "DataInvalid: train.csv: line 3 has 2 fields", "failed"),
    "running-sweep": ("Progressing", "Running, 0/1 trials", "inProgress"),
    "suspended-sweep": ("Suspended", "Suspended by spec.suspend; no trials are running.", "current"),
    "complete-sweep": ("Healthy", "All 1 trials have ended", "current"),
    "failed-sweep": ("Degraded", "TooManyFailed: ", "failed"),
}


@pytest.mark.parametrize("name", HEALTH)
def test_health_in_argo_cd(recorded: dict[str, Object], name: str) -> None:
    status, message = health(recorded[name])
    assert status == HEALTH[name][0]
    assert message.startswith(HEALTH[name][1])


def healthcheck() -> dict[str, str]:
    [kustomization] = [o for o in documents(GITOPS / "flux" / "jobs.yaml") if o["kind"] == "Kustomization"]
    expressions, of_sweeps = kustomization["spec"]["healthCheckExprs"]
    assert (expressions.pop("apiVersion"), expressions.pop("kind")) == (JOB["apiVersion"], JOB["kind"])
    assert of_sweeps == {"apiVersion": JOB["apiVersion"], "kind": "HyperparameterSweep", **expressions}
    found: dict[str, str] = expressions
    return found


def policy_objects() -> list[Object]:
    """A kind that keeps what it is given, status and all, and a policy that warns of each expression that is false or an error."""
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = {"type": "object", "properties": {"spec": free, "status": free}}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "recordings.test.example.com"},
        "spec": {
            "group": "test.example.com",
            "names": {"kind": "Recording", "plural": "recordings"},
            "scope": "Cluster",
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }
    # Flux gives the object's fields as variables; here they are bound to the same names, so that each expression is used word for word.
    validations = [
        {"expression": f"[object.spec].exists(spec, [object.status].exists(status, {text}))", "message": f"{name} is false"}
        for name, text in healthcheck().items()
    ]
    rule = {"apiGroups": ["test.example.com"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["recordings"]}
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": "healthcheck"},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [*validations, {"expression": "false", "message": "the policy is at work"}],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "healthcheck"},
        "spec": {"policyName": "healthcheck", "validationActions": ["Warn"]},
    }
    return [crd, policy, binding]


@pytest.fixture(scope="module")
def warnings(cluster: Cluster) -> Iterator[Callable[[Object], str]]:
    """What the API server warns of when this object is created."""
    objects = json.dumps({"apiVersion": "v1", "kind": "List", "items": policy_objects()})
    cluster.kubectl("apply", "-f", "-", stdin=objects)
    cluster.wait_for_crd("recordings.test.example.com")

    def ask(job: Object) -> str:
        kept = {key: job[key] for key in ("spec", "status") if key in job}
        recording = {"apiVersion": "test.example.com/v1", "kind": "Recording", "metadata": {"name": "x"}, **kept}
        return cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(recording), check=False).stderr

    wait(lambda: "the policy is at work" in ask(JOB), "the policy")
    yield ask
    cluster.kubectl("delete", "-f", "-", "--wait=false", stdin=objects)


@pytest.mark.parametrize("name", [name for name in HEALTH if name != "unseen"])
def test_health_in_flux(recorded: dict[str, Object], warnings: Callable[[Object], str], name: str) -> None:
    job = recorded[name]
    assert job["status"]["observedGeneration"] == job["metadata"]["generation"]  # else Flux does not ask further
    said = warnings(job)
    assert "the policy is at work" in said
    assert "error" not in said
    # The order in which Flux asks; what is none of them is in progress.
    told = next((word for word in ("inProgress", "failed", "current") if f"{word} is false" not in said), "inProgress")
    assert told == HEALTH[name][2]


def test_flux_waits_for_the_first_status(warnings: Callable[[Object], str], recorded: dict[str, Object]) -> None:
    assert "no such key: status" in warnings(recorded["unseen"])  # an error is an unknown health: it asks again
    assert "inProgress is false" not in warnings({**recorded["running"], "status": {"observedGeneration": 1}})


# -------------------------------------------------------------------------------------------------------- re-apply --
def apply(jobs: Jobs, manager: str, *more: str) -> Object:
    """As the GitOps controller does, but without --force-conflicts: a conflict is an error."""
    job = {**JOB, "metadata": {**JOB["metadata"], **MARKS[manager]}}
    words = ("apply", "--server-side", f"--field-manager={manager}", "-o", "json", *more, "-f", "-")
    applied: Object = json.loads(jobs.cluster.kubectl("-n", jobs.namespace, *words, stdin=json.dumps(job)).stdout)
    return applied


def wanted(job: Object) -> Object:
    return {
        "spec": job["spec"],
        **{k: job["metadata"].get(k) for k in ("uid", "generation", "labels", "annotations", "finalizers")},
    }


def children(jobs: Jobs) -> list[tuple[str, str]]:
    return [(j["metadata"]["name"], j["metadata"]["uid"]) for j in jobs.list("jobs")]


@pytest.mark.parametrize("manager", [ARGOCD, FLUX])
def test_applying_again_changes_nothing(jobs: Jobs, runner: PodRunner, manager: str) -> None:
    name = JOB["metadata"]["name"]
    first = apply(jobs, manager)
    jobs.wait_state(name, "Running")
    running = children(jobs)
    assert [child for child, _ in running] == [f"{name}-1"]
    assert wanted(apply(jobs, manager)) == wanted(first)
    assert children(jobs) == running

    runner.finish(jobs.wait_pod(f"{name}-1"))
    jobs.wait_state(name, "Complete")
    done = jobs.get(name)
    assert apply(jobs, manager)["metadata"]["resourceVersion"] == done["metadata"]["resourceVersion"]
    other = FLUX if manager == ARGOCD else ARGOCD
    assert apply(jobs, other)["metadata"]["generation"] == first["metadata"]["generation"]
    after = jobs.get(name)
    assert (after["spec"], after["status"]) == (done["spec"], done["status"])
    assert children(jobs) == running


def test_the_operator_owns_the_status_and_nothing_else(jobs: Jobs) -> None:
    apply(jobs, ARGOCD)
    jobs.wait_state(JOB["metadata"]["name"], "Running")
    fields = json.loads(jobs.cluster.kubectl("-n", jobs.namespace, "get", "ftj", "-o", "json", "--show-managed-fields").stdout)[
        "items"
    ][0]["metadata"]["managedFields"]
    owners = {(f["manager"], f.get("subresource")): set(f["fieldsV1"]) for f in fields}
    assert owners.pop((ARGOCD, None)) == {"f:metadata", "f:spec"}
    [(subresource, owned)] = [(key[1], value) for key, value in owners.items()]
    assert (subresource, owned) == ("status", {"f:status"})


@pytest.mark.parametrize("manager", [ARGOCD, FLUX])
def test_the_marks_of_gitops_stay_on_the_job(jobs: Jobs, manager: str) -> None:
    """On a child they would make it a stranger in the folder, to be pruned."""
    apply(jobs, manager)
    pod = jobs.wait_pod(f"{JOB['metadata']['name']}-1")
    marks = [mark for group in MARKS[manager].values() for mark in group]
    assert all(mark in json.dumps(jobs.get(JOB["metadata"]["name"])["metadata"]) for mark in marks)
    for child in (*jobs.list("jobs"), jobs.get(pod, "pod")):
        assert not [mark for mark in marks if mark in json.dumps(child)]


def test_a_pause_by_hand_is_not_set_back(jobs: Jobs) -> None:
    name = JOB["metadata"]["name"]
    apply(jobs, ARGOCD)
    jobs.wait_state(name, "Running")
    jobs.patch(name, {"suspend": True})
    jobs.wait_state(name, "Suspended")
    assert apply(jobs, ARGOCD)["spec"]["suspend"] is True
    assert apply(jobs, FLUX)["spec"]["suspend"] is True
    assert jobs.status(name)["state"] == "Suspended"


# ------------------------------------------------------------------------------------------------------- manifests --
MANIFESTS = sorted(GITOPS.rglob("*.yaml"))


@pytest.fixture(scope="module")
def create(cluster: Cluster, operator: Operator) -> Callable[[Object, str], str]:
    """What the API server says to an object in a namespace; it has the kinds of Argo CD and of Flux, and takes no unknown field."""
    peers.install(cluster, peers.ARGO_CD, peers.FLUX_SOURCES, peers.FLUX_HELM, peers.FLUX_KUSTOMIZE)

    def ask(document: Object, namespace: str) -> str:
        document = {**document, "metadata": {**document["metadata"], "namespace": namespace}}
        words = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
        return cluster.kubectl(*words, stdin=json.dumps(document), check=False).stderr

    return ask


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: str(p.relative_to(GITOPS)))
def test_every_manifest_is_right(create: Callable[[Object, str], str], namespace: str, path: Path) -> None:
    for document in documents(path):
        assert create(document, namespace) == ""


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("argocd/jobs.yaml", "syncOptions", "syncOption"),
        ("argocd/jobs.yaml", "selfHeal", "selfheal"),
        ("argocd/operator.yaml", "valuesObject", "valueObject"),
        ("argocd/operator.yaml", "managedNamespaceMetadata", "managedNamespace"),
        ("flux/jobs.yaml", "healthCheckExprs", "healthCheckExpr"),
        ("flux/jobs.yaml", "inProgress", "progressing"),
        ("flux/operator.yaml", "remediation", "remediaton"),
        ("flux/operator.yaml", "reconcileStrategy", "strategy"),
    ],
)
def test_a_misspelt_field_would_be_found(
    create: Callable[[Object, str], str], namespace: str, path: str, old: str, new: str
) -> None:
    misspelt = (GITOPS / path).read_text(encoding="utf-8").replace(f"{old}:", f"{new}:")
    said = [create(document, namespace) for document in yaml.safe_load_all(misspelt)]
    assert 'unknown field "spec.' in "".join(said)
    assert new in "".join(said)


def test_what_is_free_text_for_the_api_server_is_what_argo_cd_knows() -> None:
    """Keys of argocd-cm, options and annotations: looked up in Argo CD's own manual and types."""
    argo_cd = peers.folder(peers.ARGO_CD)
    manual = "\n".join(path.read_text(encoding="utf-8") for path in sorted((argo_cd / "docs/user-guide").glob("*.md")))
    known = yaml.safe_load((argo_cd / "docs/operator-manual/argocd-cm.yaml").read_text(encoding="utf-8"))["data"]
    customizations = {key.split(".")[2] for key in known if key.startswith("resource.customizations.")}
    types = (argo_cd / "pkg/apis/application/v1alpha1/types.go").read_text(encoding="utf-8")
    for path in sorted((GITOPS / "argocd").glob("*.yaml")):
        for document in documents(path):
            for key, value in document["metadata"].get("annotations", {}).items():
                assert f"{key}: {value}" in manual
            for option in document.get("spec", {}).get("syncPolicy", {}).get("syncOptions", []):
                assert f"- {option}\n" in manual, option
            for key, text in document.get("data", {}).items():
                first, second, what, *kind = key.split(".")
                assert (first, second) == ("resource", "customizations")
                assert ".".join(kind) in ("finetune.dev_FineTuneJob", "finetune.dev_HyperparameterSweep")
                assert what in customizations
                if what.startswith("ignore"):
                    assert [field for field in yaml.safe_load(text) if f'json:"{field}"' not in types] == []


@pytest.mark.parametrize("path", ["argocd/operator.yaml", "flux/operator.yaml"])
def test_the_chart_takes_the_values(helm_binary: Path, path: str) -> None:
    spec = documents(GITOPS / path)[-1]["spec"]
    values = spec["source"]["helm"]["valuesObject"] if "source" in spec else spec["values"]
    folder = spec["source"]["path"] if "source" in spec else spec["chart"]["spec"]["chart"]
    assert (GITOPS.parents[1] / folder).resolve() == chart.CHART.resolve()
    images = [
        o["spec"]["template"]["spec"]["containers"][0]
        for o in chart.render(helm_binary, "ops", values)
        if o["kind"] == "Deployment"
    ]
    assert images[0]["image"].startswith("registry.example.com/")
    assert "--trainer-image=registry.example.com/finetune-trainer:0.1.0" in images[0]["args"]


def test_the_folder_is_read_by_its_source() -> None:
    for path in ("flux/operator.yaml", "flux/jobs.yaml"):
        source, reader = documents(GITOPS / path)
        named = reader["spec"].get("sourceRef") or reader["spec"]["chart"]["spec"]["sourceRef"]
        assert named == {"kind": source["kind"], "name": source["metadata"]["name"]}
        assert source["metadata"]["namespace"] == reader["metadata"]["namespace"]
