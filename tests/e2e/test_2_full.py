"""What else must work on a real node: several pods that train as one, scripts of users, queues."""

import contextlib
import json
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from e2e.test_1_smoke import ONE_THREAD, job, trainer, wait_saved
from e2e.world import DATA, MODELS, RELEASE, ROOT, SYSTEM, World
from integration.jobs import Jobs, Object, manifest, wait
from testcluster import S3Server
from testcluster.node import ADDRESS
from testcluster.pki import Authority

CHART = str(ROOT / "charts/finetune-operator")
NO_DROPOUT = {"hidden": 0, "attention": 0, "classifier": 0}
USERS_SCRIPT = (Path(__file__).parent / "users_script.py").read_text()


def losses(world: World, jobs: Jobs, name: str, folder: Path) -> list[float]:
    """The training's losses, of the TensorBoard files in the object store."""
    client, prefix = world.s3(), f"{jobs.namespace}/{name}/logs/"
    folder.mkdir()
    for item in client.list_objects_v2(Bucket=DATA, Prefix=prefix)["Contents"]:
        client.download_file(DATA, item["Key"], str(folder / item["Key"].rpartition("/")[2]))
    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def test_two_pods_train_what_one_does(installed: World, jobs: Jobs, tmp_path: Path) -> None:
    def same(name: str, **placement: Any) -> Object:
        made = job(jobs, name, trainer=trainer(**placement))
        made["spec"]["hyperparameters"] |= {"epochs": 2, "dropout": NO_DROPOUT, "batchSize": 32, "precision": "FP32"}
        return made

    jobs.apply(same("alone"), same("pair", numNodes=2))
    jobs.wait_state("alone", "Complete")
    jobs.wait_state("pair", "Complete")
    pods = [p for p in jobs.list("pods") if p["metadata"]["labels"]["finetune.dev/job"] == "pair"]
    assert sorted(p["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] for p in pods) == ["0", "1"]
    one, two = losses(installed, jobs, "alone", tmp_path / "alone"), losses(installed, jobs, "pair", tmp_path / "pair")
    assert len(one) >= 20
    assert two[:20] == pytest.approx(one[:20], rel=1e-4)
    jobs.cluster.kubectl("-n", jobs.namespace, "delete", "ftj", "pair")
    wait(
        lambda: not [s for s in jobs.list("services") if s["metadata"]["name"] == "pair-nodes"], "the Service to go with its job"
    )


def processes_of(pod: str) -> list[int]:
    """Its Python processes, as this machine numbers them: pods of the node in the sandbox are its own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is gone
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"HOSTNAME={pod}".encode() in environment and b"finetune_trainer" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_lost_work_is_told(installed: World, jobs: Jobs) -> None:
    """kill -9 in the pod: what was done since the newest checkpoint is lost, and no more is told."""
    if not installed.ours:
        pytest.skip("the processes of a cluster of yours are not on this machine")
    jobs.apply(job(jobs, "killed", epochs=2000))
    wait_saved(installed, jobs, "killed")
    [process] = wait(lambda: processes_of(jobs.wait_pod("killed-1")), "its process")
    os.kill(process, signal.SIGKILL)
    died = datetime.now(UTC)
    status = wait(lambda: (s := jobs.status("killed")).get("restarts") == 1 and s, "a restart", 120)
    saved = datetime.fromisoformat(status["checkpoint"]["time"])
    lost = (died - saved).total_seconds()
    assert lost >= 0
    assert abs(status["lostWorkSeconds"] - lost) <= 5, "one interval of the trainer's reports"
    went_on = wait(lambda: (s := jobs.status("killed")).get("resumedFrom") and s, "it goes on", 240)
    assert went_on["resumedFrom"]["step"] == status["checkpoint"]["step"]
    asked = time.monotonic()
    jobs.patch("killed", {"suspend": True})
    paused = jobs.wait_state("killed", "Suspended", 120)
    took = time.monotonic() - asked
    assert paused["checkpoint"]["step"] > went_on["resumedFrom"]["step"]
    assert paused["lostWorkSeconds"] - status["lostWorkSeconds"] <= took + 1, "a suspension saves, and then it ends"


def test_a_suspension_that_discards_does_not_wait_for_a_pod_that_goes_on(jobs: Jobs) -> None:
    own = dict.fromkeys(("task", "model", "dataset", "output"))
    stubborn = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    policy = {"onSuspend": "Discard", "saveDeadlineSeconds": 600}
    jobs.apply(manifest("stubborn", **own, trainer={"command": stubborn}, checkpoint=policy))
    jobs.wait_state("stubborn", "Running")
    jobs.patch("stubborn", {"suspend": True})
    jobs.wait_state("stubborn", "Suspended", 90)
    wait(lambda: not jobs.list("pods"), "no pods while it is suspended", 60)  # the kubelet reports their end before they are gone


TASKS: dict[str, tuple[str, str, Object]] = {
    # File of examples/tasks -> model, the metric that says whether it has learned, hyperparameters for a model that knows nothing.
    "lora": ("tiny", "macro_f1", {"epochs": 8, "batchSize": 32, "learningRate": 6e-3}),
    "regression": ("tiny", "pearson", {"epochs": 4, "batchSize": 32, "learningRate": 3e-3}),
    "tokens": ("tiny", "f1", {"epochs": 3, "batchSize": 32, "learningRate": 4e-3}),
    "completion": ("decoder", "token_accuracy", {"epochs": 4, "batchSize": 32, "learningRate": 3e-3}),
}


def test_every_task_ends_in_a_model(installed: World, jobs: Jobs) -> None:
    for file, (source, _, hyperparameters) in TASKS.items():
        made: Object = yaml.safe_load((ROOT / f"examples/tasks/{file}.yaml").read_text())
        made["metadata"]["name"] = file
        spec = made["spec"]
        spec["model"] |= {"uri": f"s3://{MODELS}/{source}"}
        spec["dataset"] |= {"uri": f"s3://{DATA}/tiny", "maxLength": 16, "train": "train.jsonl", "validation": "validation.jsonl"}
        if file == "tokens":
            spec["dataset"]["labels"] = [label for label in spec["dataset"]["labels"] if not label.startswith("I-")]
        spec["hyperparameters"] = hyperparameters
        spec["output"]["storageUri"] = f"s3://{DATA}/{jobs.namespace}/{file}"
        spec["trainer"] = trainer()
        jobs.apply(made)
    for file, (_, metric, _) in TASKS.items():
        found = {m["name"]: float(m["value"]) for m in jobs.wait_state(file, "Complete")["result"]["metrics"]}
        assert found[f"validation/{metric}"] > 0.9, file
        stored = installed.s3().list_objects_v2(Bucket=DATA, Prefix=f"{jobs.namespace}/{file}/model/")["Contents"]
        assert f"{jobs.namespace}/{file}/model/model.safetensors" in [item["Key"] for item in stored]


def test_one_of_two_pods_lost_both_start_anew(installed: World, jobs: Jobs) -> None:
    jobs.apply(job(jobs, "pair", trainer=trainer(numNodes=2)))
    saved = wait_saved(installed, jobs, "pair")
    second = next(p["metadata"]["name"] for p in jobs.list("pods") if p["metadata"]["name"].startswith("pair-1-1-"))
    installed.kubectl("-n", jobs.namespace, "delete", "pod", second, "--wait=false")
    status = wait(lambda: (s := jobs.status("pair")).get("resumedFrom") and s, "it goes on")
    assert (status["attempt"], status["restarts"]) == (2, 1)
    assert status["resumedFrom"]["step"] >= saved
    jobs.patch("pair", {"stop": True})
    jobs.wait_state("pair", "Complete")


def test_an_unmodified_hugging_face_trainer_reports_progress(installed: World, jobs: Jobs) -> None:
    installed.kubectl("-n", jobs.namespace, "create", "configmap", "script", f"--from-literal=train.py={USERS_SCRIPT}")
    template = {
        "spec": {
            "volumes": [{"name": "script", "configMap": {"name": "script"}}],
            "volumeMounts": [{"name": "script", "mountPath": "/script"}],
        }
    }
    made: Object = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "own"},
        "spec": {"trainer": {"command": ["python", "/script/train.py"], "podTemplate": template, "env": ONE_THREAD}},
    }
    jobs.apply(made)
    seen = wait(lambda: (jobs.status("own").get("trainerStatus") or {}).get("progressPercentage"), "progress", 150)
    assert 0 < seen <= 100
    status = jobs.wait_state("own", "Complete")
    assert any(m["name"].startswith(("loss", "train")) for m in status["trainerStatus"]["metrics"])


def test_a_queue_admits_the_job_as_kueue_does(installed: World, jobs: Jobs) -> None:
    made = job(jobs, "queued", epochs=3)
    made["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
    jobs.apply(made)
    child = wait(lambda: next((j for j in jobs.list("jobs") if j["metadata"]["name"] == "queued-1"), None), "the child Job")
    assert child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    flip(jobs, "queued-1", suspend=True)
    jobs.wait_state("queued", "Queued")
    flip(jobs, "queued-1", suspend=False)
    jobs.wait_state("queued", "Running")
    flip(jobs, "queued-1", suspend=True)  # a preemption
    jobs.wait_state("queued", "Queued")
    flip(jobs, "queued-1", suspend=False)
    status = jobs.wait_state("queued", "Complete")
    assert (status["attempt"], status["restarts"]) == (1, 0)


def flip(jobs: Jobs, name: str, *, suspend: bool) -> None:
    patch = json.dumps({"spec": {"suspend": suspend}})
    jobs.cluster.kubectl("-n", jobs.namespace, "patch", "job", name, "--type=merge", "-p", patch)


@pytest.mark.alone
def test_an_object_store_with_a_ca_of_its_own(installed: World, jobs: Jobs, tmp_path: Path) -> None:
    """Endpoint and CA by the chart's jobDefaults, credentials by a Secret that they name."""
    if not installed.ours:
        pytest.skip("a second object store, over TLS, is started beside our own node only")
    authority = Authority(tmp_path / "ca")
    with S3Server(host=ADDRESS, authority=authority) as s3:
        here, there = installed.s3(), s3.client()
        for bucket in (MODELS, DATA):
            s3.create_bucket(bucket)
            for item in here.list_objects_v2(Bucket=bucket, Prefix="tiny/")["Contents"]:
                body = here.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
                there.put_object(Bucket=bucket, Key=item["Key"], Body=body)
        installed.kubectl("-n", jobs.namespace, "create", "configmap", "ca-bundle", f"--from-file={authority.ca_file}")
        keys = [f"--from-literal={name}={value}" for name, value in s3.environment().items() if name != "AWS_ENDPOINT_URL"]
        installed.kubectl("-n", jobs.namespace, "create", "secret", "generic", "other-store", *keys)
        defaults = {
            "image": installed.trainer_image,
            "env": [{"name": "AWS_ENDPOINT_URL", "value": s3.endpoint}, {"name": "AWS_CA_BUNDLE", "value": "/etc/ca/ca.crt"}],
            "envFrom": [{"secretRef": {"name": "other-store"}}],
            "podTemplate": {
                "spec": {
                    "volumes": [{"name": "ca", "configMap": {"name": "ca-bundle"}}],
                    "volumeMounts": [{"name": "ca", "mountPath": "/etc/ca", "readOnly": True}],
                }
            },
        }
        values = tmp_path / "values.json"
        values.write_text(json.dumps({"jobDefaults": defaults}))
        upgrade(installed, *installed.values(), f"--values={values}")
        try:
            jobs.apply(job(jobs, "elsewhere", epochs=2, trainer={}))
            jobs.wait_state("elsewhere", "Complete")
            found = there.list_objects_v2(Bucket=DATA, Prefix=f"{jobs.namespace}/elsewhere/")["Contents"]
            assert any(item["Key"].endswith("model.safetensors") for item in found)
        finally:
            upgrade(installed, *installed.values())


def test_an_object_store_that_is_not_there_is_told(jobs: Jobs) -> None:
    nowhere = trainer(env=[{"name": "AWS_ENDPOINT_URL", "value": "http://10.79.0.1:1"}])
    jobs.apply(job(jobs, "nowhere", failurePolicy={"maxRestarts": 0}, trainer=nowhere))
    jobs.wait_state("nowhere", "Failed")
    failed = jobs.condition("nowhere", "Failed")
    assert failed["reason"] == "StorageUnavailable", failed
    assert "the storage does not answer" in failed["message"]
    assert "Check AWS_ENDPOINT_URL" in failed["message"]


@pytest.mark.alone
def test_uninstalled_and_installed_again_while_a_job_trains(installed: World, jobs: Jobs) -> None:
    jobs.apply(job(jobs, "orphan", epochs=40))
    wait_saved(installed, jobs, "orphan")
    before = jobs.get(jobs.wait_pod("orphan-1"), "pod")["metadata"]["uid"]
    installed.rights_change()
    installed.helm("uninstall", RELEASE, "--wait")
    assert not installed.kubectl("-n", SYSTEM, "get", "deployments", "-o", "name").stdout
    assert jobs.get(jobs.wait_pod("orphan-1"), "pod")["metadata"]["uid"] == before
    installed.helm("install", RELEASE, CHART, *installed.values(), "--wait", "--timeout=150s")
    status = jobs.wait_state("orphan", "Complete")
    assert (status["attempt"], status["restarts"]) == (1, 0)
    assert status["result"]["modelUri"]


def upgrade(world: World, *values: str) -> None:
    world.helm("upgrade", RELEASE, CHART, *values, "--wait", "--timeout=150s")
