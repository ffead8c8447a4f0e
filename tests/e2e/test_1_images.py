"""What is in the two images, and that they run as whoever the platform says: any uid, group 0, a root file system that is read-only."""

import json
import random
from typing import Any

import pytest

from e2e.test_1_smoke import job
from e2e.world import DATA, RELEASE, SYSTEM, World
from finetune_api import names
from integration.jobs import Jobs, Object, wait
from testcluster import images, node

ENDED = ("Succeeded", "Failed")
MEGABYTES = {"operator": 500, "trainer": 8_000}
"""At most, unpacked: sizes of files, as image tools count them, and not what a disk's blocks make of them.

Nearly all of the trainer's is PyTorch with CUDA."""
UID = random.randrange(1_000_600_000, 1_000_700_000)
"""As OpenShift assigns them; no image has a user of that number."""
PROBE = r"""
import glob, json, os, shutil, subprocess, sys
module = sys.argv[1]
help_ = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
tools = ("cc", "c89", "c99", "gcc", "g++", "c++", "cpp", "clang", "make", "cmake", "ld", "as", "nvcc", "rustc", "go")
places = os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
du = ["du", "-sx", "--apparent-size", "--block-size=MB", "/"]
size = subprocess.run(du, capture_output=True, text=True).stdout.split()  # what it may not read is 0
print(json.dumps({
    "ids": [os.getuid(), os.getgid()], "help": [help_.returncode, help_.stderr, module in help_.stdout],
    "compilers": [t for t in tools if shutil.which(t, path=places)] + glob.glob("/usr/bin/*-gcc*") + glob.glob("/usr/lib/gcc*/*/*/cc1*"),
    "writable": [p for p in ("/", "/opt/finetune", "/usr", "/etc", "/var/tmp", "/tmp") if os.access(p, os.W_OK)],
    "megabytes": int(size[0].removesuffix("MB")),
}))
"""
SEARCH = r"""
import datetime, json, sys
from finetune_operator.domain import trials
from finetune_operator.domain.sweep import decide_sweep
from finetune_operator.domain.sweep_types import CreateTrial, SweepObserved
from finetune_operator.domain.types import Settings
settings, found = Settings("t", "https://127.0.0.1:1", ""), {}
for algorithm in ("auto", "grid", "random", "sobol", "tpe", "gp"):
    of, jobs = json.loads(sys.argv[1]), {}
    of["spec"]["searchAlgorithm"] = {algorithm: {"startupTrials": 2} if algorithm in ("tpe", "gp") else {}}
    for _ in range(12):
        decision = decide_sweep(SweepObserved(of, jobs), datetime.datetime.now(datetime.UTC), settings)
        for job in (action.manifest for action in decision.actions if isinstance(action, CreateTrial)):
            said = trials.chosen(job)
            metric = {"name": "validation/macro_f1", "value": str(100 * said.parameters["rate"])}
            ended = {"conditions": [{"type": "Complete", "status": "True", "reason": "Trained"}], "result": {"metrics": [metric]}}
            jobs[said.index] = {**job, "metadata": {**job["metadata"], "uid": str(said.index)}, "status": ended}
    found[algorithm] = [len(jobs), trials.chosen(jobs[max(jobs)]).algorithm]
print(json.dumps(found))
"""
"""At most twelve trials by each algorithm: what each imports is in no image by chance."""


def restricted() -> Object:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def somebody() -> Object:
    return {"runAsUser": UID, "runAsGroup": 0, "runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def run(jobs: Jobs, pod: Object) -> tuple[str, str]:
    """Phase and log of a pod that ends by itself."""
    name = pod["metadata"]["name"]
    jobs.cluster.kubectl("-n", jobs.namespace, "create", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Pod", **pod}))
    phase = wait(lambda: p if (p := jobs.get(name, "pod")["status"]["phase"]) in ENDED else None, f"the end of {name}", 180)
    return phase, jobs.cluster.kubectl("-n", jobs.namespace, "logs", name).stdout


def inside(jobs: Jobs, image: str, name: str, script: str, argument: str) -> Object:
    """What a script prints as JSON, in a pod with nothing but the image."""
    container = {"name": "probe", "image": image, "command": ["python", "-c", script, argument]}
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": somebody(),
        "containers": [{**container, "securityContext": restricted()}],
    }
    phase, said = run(jobs, {"metadata": {"name": name}, "spec": spec})
    assert phase == "Succeeded", said
    found: Object = json.loads(said)
    return found


def test_the_operators_image_can_search(installed: World, jobs: Jobs) -> None:
    # Every sweep of the real image stood still once, for want of a package that every machine of ours has.
    recipe = {
        "task": "SequenceClassification",
        "model": {"uri": "s3://models/base"},
        "dataset": {"uri": "s3://data/feedback", "labels": ["bad", "good"]},
        "output": {"storageUri": "s3://models/out"},
    }
    rates = {"logUniform": {"min": 1e-6, "max": 1e-2}}
    space = {"name": "rate", "path": "hyperparameters.learningRate", "searchSpace": rates}
    spec = {
        "objective": {"metric": "validation/macro_f1", "direction": "Maximize"},
        "parameters": [space],
        "numTrials": 12,
        "parallelTrials": 1,
        "trialTemplate": {"spec": recipe},
    }
    sweep = {
        "apiVersion": names.API_VERSION, "kind": names.KIND_SWEEP, "metadata": {"name": "s", "namespace": "n", "uid": "u"}, "spec": spec
    }  # fmt: skip
    found = inside(jobs, installed.operator_image, "search", SEARCH, json.dumps(sweep))
    drawn = {algorithm: [12, algorithm] for algorithm in ("random", "sobol", "tpe", "gp")}
    assert found == {"auto": [12, "gp"], "grid": [5, "grid"], **drawn}


@pytest.mark.parametrize("part", images.PARTS)
def test_an_image_starts_as_anybody_and_brings_no_compiler(installed: World, jobs: Jobs, part: str) -> None:
    image = {"operator": installed.operator_image, "trainer": installed.trainer_image}[part]
    found = inside(jobs, image, f"probe-{part}", PROBE, f"finetune_{part}")
    print(f"{part}: {found['megabytes']} MB unpacked")
    assert found.pop("megabytes") < MEGABYTES[part]
    assert found == {"ids": [UID, 0], "help": [0, "", True], "compilers": [], "writable": []}


@pytest.mark.parametrize("part", images.PARTS)
def test_an_image_says_what_it_is(installed: World, part: str) -> None:
    if not installed.ours:
        pytest.skip("how to read an image's configuration depends on the cluster")
    wanted = images.name_of(part)
    listed = (line.split() for line in node.ctr("images", "list", f"name=={wanted}").stdout.splitlines())
    [digest] = [words[2] for words in listed if words[0] == wanted]

    def content(of: str) -> Any:
        return json.loads(node.ctr("content", "get", of).stdout)

    config = content(content(digest)["config"]["digest"])["config"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == f"finetune-{part}"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == images.version()
    assert labels["revision"]
    assert labels["description"]
    assert config["User"] == "65532:65532", "a number, so that runAsNonRoot can be checked"
    assert config["Entrypoint"] == ["python", "-m", f"finetune_{part}"]


def test_training_runs_as_anybody(installed: World, jobs: Jobs) -> None:
    """The operator sets no uid, so that the platform can: here the pod that it made is made again, as the platform would."""
    jobs.apply(job(jobs, "named", epochs=1))
    made = jobs.get(jobs.wait_pod("named-1"), "pod")
    assert "runAsUser" not in json.dumps(made["spec"])
    spec = {key: value for key, value in made["spec"].items() if key not in ("nodeName", "hostname", "subdomain")}
    spec["securityContext"] = {**spec["securityContext"], "runAsUser": UID, "runAsGroup": 0}
    [container] = spec["containers"]
    [recipe] = [variable for variable in container["env"] if variable["name"] == "FINETUNE_JOB"]
    output = f"s3://{DATA}/{jobs.namespace}/anybody"
    recipe["value"] = json.dumps({**json.loads(recipe["value"]), "output": {"storageUri": output}})
    metadata = {"name": "anybody", "annotations": made["metadata"]["annotations"]}
    phase, said = run(jobs, {"metadata": metadata, "spec": spec})
    assert phase == "Succeeded", said
    ended = jobs.get("anybody", "pod")["status"]["containerStatuses"][0]["state"]["terminated"]
    assert json.loads(ended["message"])["outcome"] == "Complete"
    stored = installed.s3().list_objects_v2(Bucket=DATA, Prefix=f"{jobs.namespace}/anybody/model/")["Contents"]
    assert any(item["Key"].endswith("model.safetensors") for item in stored)


def test_the_operator_runs_as_anybody(installed: World) -> None:
    """One more operator, which stands by: the pod of the Deployment with the uid that the platform assigns."""
    deployment = json.loads(installed.kubectl("-n", SYSTEM, "get", "deployment", RELEASE, "-o", "json").stdout)
    spec = deployment["spec"]["template"]["spec"]
    assert "runAsUser" not in json.dumps(spec)
    spec["securityContext"] = {**spec["securityContext"], "runAsUser": UID, "runAsGroup": 0}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "anybody"}, "spec": spec}
    installed.kubectl("-n", SYSTEM, "create", "-f", "-", stdin=json.dumps(pod))
    try:
        installed.kubectl("-n", SYSTEM, "wait", "--for=condition=Ready", "pod/anybody", "--timeout=100s")
        assert installed.kubectl("-n", SYSTEM, "exec", "anybody", "--", "id", "-u").stdout.strip() == str(UID)
    finally:
        installed.kubectl("-n", SYSTEM, "delete", "pod", "anybody")
