"""What is in the two images, and that they run as whoever the platform says: any uid, group 0, a root file system that is read-only."""

import json
import random
from typing import Any

import pytest

from e2e.test_1_smoke import job
from e2e.world import DATA, RELEASE, SYSTEM, World
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


def probe(jobs: Jobs, part: str, image: str) -> Object:
    """What the probe found, in a pod with nothing but the image."""
    container = {"name": "probe", "image": image, "command": ["python", "-c", PROBE, f"finetune_{part}"]}
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": somebody(),
        "containers": [{**container, "securityContext": restricted()}],
    }
    phase, said = run(jobs, {"metadata": {"name": f"probe-{part}"}, "spec": spec})
    assert phase == "Succeeded", said
    found: Object = json.loads(said)
    return found


@pytest.mark.parametrize("part", images.PARTS)
def test_an_image_starts_as_anybody_and_brings_no_compiler(installed: World, jobs: Jobs, part: str) -> None:
    found = probe(jobs, part, {"operator": installed.operator_image, "trainer": installed.trainer_image}[part])
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
