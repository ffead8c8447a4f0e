"""A sweep on a real node: trials side by side, bad ones stopped, the budget kept, the best model promoted and used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.test_1_smoke import LABELS, trainer
from e2e.world import DATA, MODELS, World
from finetune_operator.domain.trials import judgements
from integration.jobs import Jobs, Object, wait


def sweep(jobs: Jobs, name: str, **spec: object) -> Object:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "HyperparameterSweep",
        "metadata": {"name": name},
        "spec": {
            "objective": {"metric": "validation/macro_f1", "direction": "Maximize"},
            "parameters": [
                {
                    "name": "learningRate",
                    "path": "hyperparameters.learningRate",
                    "searchSpace": {"logUniform": {"min": 1e-6, "max": 1e-2}},
                },
                {"name": "batchSize", "path": "hyperparameters.batchSize", "searchSpace": {"categorical": {"values": [8, 32]}}},
            ],
            "searchAlgorithm": {"tpe": {"startupTrials": 3}},
            "pruneAlgorithm": {"asha": {"minExamples": 600, "reductionFactor": 2, "maxRungs": 2}},
            "numTrials": 6,
            "parallelTrials": 2,
            "trialTemplate": {
                "spec": {
                    "task": "SequenceClassification",
                    "model": {"uri": f"s3://{MODELS}/tiny"},
                    "dataset": {"uri": f"s3://{DATA}/tiny", "test": "test.csv", "labels": LABELS, "maxLength": 16},
                    "hyperparameters": {"epochs": 6},
                    "checkpoint": {"everySteps": 100_000},
                    "output": {"storageUri": f"s3://{DATA}/{jobs.namespace}/{name}"},
                    "trainer": trainer(),
                }
            },
            **spec,
        },
    }


def state(jobs: Jobs, name: str) -> Object:
    found: Object = jobs.get(name, "hps").get("status") or {}
    return found


@pytest.mark.timeout(1200)
def test_the_best_of_a_sweep_is_promoted_and_predicts(installed: World, jobs: Jobs, tmp_path: Path) -> None:
    uri = f"s3://{DATA}/{jobs.namespace}/winner"
    made = sweep(jobs, "mood", budget={"activeSeconds": 60}, onComplete="LetFinish", promote={"storageUri": uri, "seeds": 1})
    jobs.apply(made)
    wait(lambda: state(jobs, "mood").get("state") in ("Complete", "Failed"), "the end of the sweep", 900)
    status = state(jobs, "mood")
    assert status["state"] == "Complete", status
    assert status["finished"] == "BudgetSpent"
    trials = jobs.list("ftj", "-l", "finetune.dev/sweep=mood,finetune.dev/role=trial")
    assert len(trials) == status["trials"]["created"] <= 6
    assert status["activeSeconds"] >= 60
    for trial in trials:
        stopped = any(j.stop for j in judgements(trial))
        assert bool(trial["spec"].get("stop")) == stopped
        reason = next(c["reason"] for c in trial["status"]["conditions"] if c["type"] == "Complete")
        assert reason == ("Stopped" if stopped else "Trained")
    assert any(judgements(trial) for trial in trials), "nobody was judged while it ran"
    assert status["rungs"][0]["reached"] >= 2
    assert status["repetitions"][0]["trial"] == status["best"]["trial"]
    assert len(status["repetitions"][0]["values"]) == 2
    assert status["result"]["modelUri"] == f"{uri}/model"
    assert {m["name"].partition("/")[0] for m in status["result"]["metrics"]} == {"validation", "test"}
    client = installed.s3()
    history = json.loads(client.get_object(Bucket=DATA, Key=f"{jobs.namespace}/mood/sweep.json")["Body"].read())
    assert [row["name"] for row in history["trials"]] == [f"mood-t{n:04d}" for n in range(len(trials))]
    for key in (o["Key"] for o in client.list_objects_v2(Bucket=DATA, Prefix=f"{jobs.namespace}/winner/model/")["Contents"]):
        client.download_file(DATA, key, str(tmp_path / key.rpartition("/")[2]))
    asked = [sys.executable, "-m", "finetune_cli", "predict", "--model", str(tmp_path), "good", "-o", "json"]
    assert json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)[0]["label"] in LABELS
    shown = installed.kubectl("-n", jobs.namespace, "get", "hps", "mood").stdout
    assert status["best"]["trial"] in shown
    # The rest of its rights: what has outlived its time is deleted, with all that belongs to it.
    installed.kubectl(
        "-n", jobs.namespace, "patch", "hps", "mood", "--type=merge", "-p", '{"spec":{"ttlSecondsAfterFinished":0}}'
    )
    wait(lambda: not jobs.list("hps") and not jobs.list("ftj"), "the deletion", 120)
