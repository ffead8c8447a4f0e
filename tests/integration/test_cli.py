"""`finetune` as a user types it: the real process, the real trainer, a tiny model, a folder or a real S3 server as storage."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import warm
from support.models import rows, tiny_classifier, write_split
from testcluster import S3Server

FINETUNE = Path(sys.executable).parent / "finetune"
LABELS = ["negative", "neutral", "positive"]
QUIET = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "FINETUNE_"))} | {"OMP_NUM_THREADS": "1"}

Finetune = Callable[..., "subprocess.CompletedProcess[str]"]


def execute(*arguments: object, env: Mapping[str, str] | None = None, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [warm.python(), "-m", "finetune_cli", *map(str, arguments)],
        env={**QUIET, **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=400,
    )


class Place:
    """A folder with a bucket, a model mirror and a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.buckets = folder / "s3"
        self.bucket = self.buckets / "bucket"
        self.mirror = folder / "mirror"

    def fill(self) -> "Place":
        tiny_classifier(self.mirror / "org/tiny")
        for split, count in (("train", 120), ("validation", 30), ("test", 30)):
            write_split(self.bucket / f"data/{split}.csv", count, seed=count)
        return self

    def manifest(self, name: str = "tiny", **spec: Any) -> Path:
        """A manifest of a training that ends in a few seconds; `spec` replaces fields."""
        recipe: dict[str, Any] = {
            "task": "SequenceClassification",
            "model": {"uri": "hf://org/tiny"},
            "dataset": {"uri": "s3://bucket/data", "test": "test.csv", "labels": LABELS, "maxLength": 32},
            "hyperparameters": {"epochs": 20, "batchSize": 8, "learningRate": 0.003},
            "evaluation": {"everyEpochs": 5},
            "output": {"storageUri": f"s3://bucket/out/{name}"},
            **spec,
        }
        file = self.folder / f"{name}.yaml"
        document = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": recipe}
        file.write_text(yaml.safe_dump(document))
        return file

    def arguments(self, file: Path) -> list[str]:
        places = {
            "-f": file,
            "--s3-root": self.buckets,
            "--workdir": self.folder / f"work-{file.stem}",
            "--model-mirror": self.mirror,
        }
        return ["run", *(str(part) for pair in places.items() for part in pair)]

    def result(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.bucket / f"out/{name}/result.json").read_text())
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("cli")).fill()


@pytest.fixture(scope="module")
def trained(place: Place) -> "subprocess.CompletedProcess[str]":
    return execute(*place.arguments(place.manifest("trained")))


def model_of(place: Place) -> Path:
    return place.bucket / "out/trained/model"


# ---------------------------------------------------------------------------------------------- from manifest to use ----
def test_run_ends_with_metrics_and_the_place_of_the_model(place: Place, trained: "subprocess.CompletedProcess[str]") -> None:
    assert trained.returncode == 0, trained.stdout + trained.stderr
    stored = {m["name"]: float(m["value"]) for m in place.result("trained")["result"]["metrics"]}
    for name in ("validation/macro_f1", "test/macro_f1", "test/accuracy"):
        assert f"{stored[name]:.4f}" in trained.stdout
    assert stored["test/accuracy"] > 0.8, "the words tell the label"
    for label in LABELS:
        assert label in trained.stdout
    assert str(model_of(place)) in trained.stdout
    assert "s3://bucket/out/trained/model" in trained.stdout
    assert "step " in trained.stdout, "progress of the trainer"


def test_a_second_run_shows_the_stored_result_without_training(place: Place, trained: "subprocess.CompletedProcess[str]") -> None:
    assert trained.returncode == 0
    before = place.result("trained")
    again = execute(*place.arguments(place.folder / "trained.yaml"))
    assert again.returncode == 0, again.stderr
    assert "trained already" in again.stdout
    assert f"{float(before['result']['metrics'][0]['value']):.4f}" in again.stdout
    assert place.result("trained") == before
    attempts = json.loads((place.folder / "work-trained/attempts.json").read_text())
    assert attempts == {"attempt": 2}, "the attempt number grows with every run"


def test_another_recipe_for_the_same_output_is_refused(place: Place, trained: "subprocess.CompletedProcess[str]") -> None:
    assert trained.returncode == 0
    done = execute(*place.arguments(place.folder / "trained.yaml"), "--set", "hyperparameters.seed=7")
    assert done.returncode == 13
    assert "output.overwrite: true" in done.stderr


def test_predict_from_arguments_stdin_and_files_agree(
    place: Place, trained: "subprocess.CompletedProcess[str]", tmp_path: Path
) -> None:
    assert trained.returncode == 0
    texts = [text for text, _ in rows(5, seed=5)]
    model = ["predict", "--model", model_of(place), "-o", "json"]
    csv_file, jsonl_file = tmp_path / "texts.csv", tmp_path / "texts.jsonl"
    with csv_file.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    jsonl_file.write_text("".join(json.dumps({"words": t}) + "\n" for t in texts))
    column = ["--text-column", "words"]
    given = execute(*model, *texts)
    assert given.returncode == 0, given.stderr
    assert given.stderr == "", "nothing but the answer"
    answers = json.loads(given.stdout)
    assert [a["text"] for a in answers] == texts
    for answer in answers:
        assert set(answer["probabilities"]) == set(LABELS)
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].__getitem__)
    assert json.loads(execute(*model, stdin="\n".join(texts) + "\n\n").stdout) == answers
    assert json.loads(execute(*model, "--file", csv_file).stdout) == answers
    table = execute(
        "predict", "--model", "s3://bucket/out/trained/model", "--s3-root", place.buckets, "--file", jsonl_file, *column
    )
    assert answers[0]["label"] in table.stdout
    assert f"{answers[0]['probabilities']['neutral']:.3f}" in table.stdout


def test_evaluate_says_what_the_training_said(place: Place, trained: "subprocess.CompletedProcess[str]") -> None:
    assert trained.returncode == 0
    done = execute("evaluate", "--model", model_of(place), "--data", place.bucket / "data/test.csv", "-o", "json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    stored = {m["name"]: float(m["value"]) for m in place.result("trained")["result"]["metrics"]}
    assert answer["examples"] == 30
    for name, value in answer["metrics"].items():
        assert value == pytest.approx(stored[f"test/{name}"], rel=1e-4)
    assert [c["label"] for c in answer["perClass"]] == LABELS
    table = execute("evaluate", "--model", model_of(place), "--data", place.bucket / "data/test.csv")
    assert f"{answer['metrics']['macro_f1']:.4f}" in table.stdout


def test_validate_counts_what_is_trained_on(place: Place, tmp_path: Path) -> None:
    bucket = tmp_path / "s3/bucket/data"
    bucket.mkdir(parents=True)
    (bucket / "train.csv").write_text("text,label\nbad,negative\nbad,negative\nwhen,neutral\ngood,positive\nfine,positive\n")
    (bucket / "validation.csv").write_text("text,label\ngood,positive\n")
    file = place.manifest("counted", dataset={"uri": "s3://bucket/data", "labels": LABELS})
    done = execute("validate", "-f", file, "--s3-root", tmp_path / "s3")
    assert done.returncode == 0, done.stderr
    train = next(line for line in done.stdout.splitlines() if line.startswith("│ train"))
    assert [int(cell) for cell in train.replace("│", " ").split()[1:]] == [4, 2, 1, 1, 1, 4]
    assert "data: 1 of 5 rows of train are left out: their text is also in validation" in done.stdout
    assert "data: train by label: negative 2, neutral 1, positive 1" in done.stdout
    assert not (tmp_path / "s3/bucket/out").exists(), "nothing is written"


# --------------------------------------------------------------------------------------------------- cut off, go on ----
LONG: dict[str, Any] = {
    "hyperparameters": {"epochs": 20, "batchSize": 8, "learningRate": 0.001},
    "checkpoint": {"everySteps": 20},
}


def start(place: Place, name: str, epochs: int = 20) -> "subprocess.Popen[str]":
    """A training of some seconds, in a process group of its own, returned when its first checkpoint is committed."""
    spec = {**LONG, "hyperparameters": {**LONG["hyperparameters"], "epochs": epochs}}
    file = place.manifest(name, evaluation={"everyEpochs": 10}, **spec)
    process = subprocess.Popen(
        [FINETUNE, *place.arguments(file)], env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    deadline = time.monotonic() + 200
    while not list(place.bucket.glob(f"out/{name}/checkpoints/*/MANIFEST.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def trainer_of(process: "subprocess.Popen[str]") -> int:
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def assert_goes_on(place: Place, name: str) -> None:
    again = execute(*place.arguments(place.folder / f"{name}.yaml"))
    assert again.returncode == 0, again.stderr
    (line,) = [line for line in again.stdout.splitlines() if line.startswith("going on from step")]
    assert int(line.split()[4]) >= 20
    assert place.result(name)["steps"] == 300
    assert place.result(name)["result"]["bestStep"] <= 300


def test_killed_with_everything_it_goes_on_from_its_checkpoint(place: Place) -> None:
    with start(place, "crashed") as process:
        os.killpg(process.pid, signal.SIGKILL)
    assert not (place.bucket / "out/crashed/result.json").exists()
    assert_goes_on(place, "crashed")


def test_a_killed_trainer_is_told_as_such(place: Place) -> None:
    with start(place, "killed") as process:
        os.kill(trainer_of(process), signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 137
    assert "SIGKILL" in errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(place: Place, number: signal.Signals) -> None:
    name = number.name.lower()
    with start(place, name) as process:
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 20, errors
    saved = max(int(m.parent.name.split("-")[1]) for m in place.bucket.glob(f"out/{name}/checkpoints/*/MANIFEST.json"))
    assert f"it goes on from step {saved}" in errors
    assert "Traceback" not in errors
    if number is signal.SIGTERM:
        assert_goes_on(place, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_handles_no_signal_is_ended_by_it(place: Place, number: signal.Signals) -> None:
    # It was started with both ignored, and that outlasts exec.
    name = f"script-{number.name.lower()}"
    ready = place.folder / f"{name}.ready"
    file = place.manifest(name, trainer={"command": ["sh", "-c", f"touch '{ready}'; exec sleep 30"]})
    with subprocess.Popen(
        [FINETUNE, *place.arguments(file)], env=QUIET, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        while not ready.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert f"the trainer was ended by {number.name}" in errors


def test_a_script_ends_with_its_own_exit_code(place: Place) -> None:
    # 255 is 128 + 127, which is no signal: telling of it ended in a traceback.
    file = place.manifest("minus-one", trainer={"command": [sys.executable, "-c", "raise SystemExit(-1)"]})
    done = execute(*place.arguments(file))
    assert_sentence(done, 255, "the trainer ended without a report", "Exit code 255")


def test_two_runs_of_one_job_do_not_meet(place: Place) -> None:
    with start(place, "twice", epochs=2000) as process:  # it outlasts the time that a run waits for one that is ending
        try:
            second = execute(*place.arguments(place.folder / "twice.yaml"))
            assert second.returncode == 1
            assert "is being trained" in second.stderr
            # Also when only the trainer is left: it holds the lock too.
            trainer = trainer_of(process)
            process.kill()
            process.wait()
            third = execute(*place.arguments(place.folder / "twice.yaml"))
            assert third.returncode == 1
            os.kill(trainer, signal.SIGKILL)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------ user errors ----
def assert_sentence(done: "subprocess.CompletedProcess[str]", code: int, *parts: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("hyperparameters.learningRte=0.1", ["hyperparameters.learningRte", "unknown field"]),
        ("hyperparameters.learningRate=-1", ["hyperparameters.learningRate", "-1", "greater than 0"]),
        ("task=Poetry", ["spec.task", "Poetry", "SequenceClassification"]),
        ("output.storageUri=bucket/out", ["output.storageUri", "s3://bucket/prefix"]),
        ("hyperparameters", ["--set", "path=value"]),
    ],
)
@pytest.mark.parametrize("command", ["run", "validate"])
def test_manifest_errors_name_the_field(place: Place, command: str, override: str, parts: list[str]) -> None:
    done = execute(command, "-f", place.manifest("wrong"), "--s3-root", place.buckets, "--set", override)
    assert_sentence(done, 2, *parts)


def test_all_problems_of_a_manifest_are_listed_at_once(place: Place) -> None:
    file = place.manifest("wrong", hyperparameters={"epochs": 0, "batchsize": 3}, task="Poetry")
    done = execute("run", "-f", file)
    assert_sentence(done, 2, "3 problems", "hyperparameters.epochs", "hyperparameters.batchsize", "spec.task")


def test_labels_that_are_not_in_the_data(place: Place) -> None:
    file = place.manifest("labels", dataset={"uri": "s3://bucket/data", "labels": ["good", "bad"]})
    done = execute(*place.arguments(file))
    assert_sentence(done, 11, "train.csv", "line 2", "dataset.labels", "good, bad", "DataInvalid", "correct that")
    assert "awful" not in done.stderr, "no text of the data"
    assert_sentence(execute("validate", "-f", file, "--s3-root", place.buckets), 2, "dataset.labels")


def test_an_empty_and_a_missing_data_file(place: Place) -> None:
    (place.bucket / "data/empty.csv").write_text("")
    empty = {"uri": "s3://bucket/data", "labels": LABELS, "train": "empty.csv"}
    assert_sentence(execute(*place.arguments(place.manifest("empty", dataset=empty))), 11, "empty.csv", "is empty")
    missing = {**empty, "train": "tarin.csv"}
    done = execute(*place.arguments(place.manifest("missing", dataset=missing)))
    assert_sentence(done, 11, "dataset.train", "tarin.csv", "train.csv")


def test_folders_on_the_command_line_that_are_not_there(place: Place) -> None:
    file = place.manifest("folders")
    assert_sentence(execute("run", "-f", file, "--s3-root", place.folder / "nope"), 2, "--s3-root", "nope")
    done = execute("run", "-f", file, "--s3-root", place.buckets, "--model-mirror", place.folder / "nope")
    assert_sentence(done, 2, "--model-mirror", "nope")
    assert_sentence(execute("run", "-f", place.folder / "nope.yaml"), 2, "nope.yaml", "cannot be read")
    bucketless = place.manifest("bucketless", output={"storageUri": "s3://nobucket/out"})
    assert_sentence(execute(*place.arguments(bucketless)), 15, "nobucket", "create it")


def test_predict_and_evaluate_errors(place: Place, trained: "subprocess.CompletedProcess[str]", tmp_path: Path) -> None:
    assert trained.returncode == 0
    model = model_of(place)
    data = tmp_path / "data.csv"
    data.write_text("text,label\ngood,positive\nfine,splendid\n")
    assert_sentence(execute("predict", "--model", tmp_path / "nope", "x"), 2, "--model", "nope")
    assert_sentence(execute("predict", "--model", tmp_path, "x"), 12, "finetune.json")
    assert_sentence(execute("predict", "--model", model), 2, "standard input is empty")
    assert_sentence(execute("predict", "--model", model, "good", ""), 2, "text 2 is empty")
    assert_sentence(execute("predict", "--model", model, "x", "--file", data), 2, "not both")
    assert_sentence(execute("evaluate", "--model", model, "--data", data), 11, "row 2", *LABELS)
    assert_sentence(
        execute("evaluate", "--model", model, "--data", data, "--label-column", "lable"), 11, "lable", "--label-column"
    )
    assert_sentence(execute("evaluate", "--model", model, "--data", tmp_path / "gone.csv"), 1, "gone.csv")


# ---------------------------------------------------------------------------------------------------------- real S3 ----
def test_the_same_manifest_on_a_real_s3_server(place: Place, s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.create_bucket("cli-real")
    for path in (place.bucket / "data").glob("t*.csv"):
        s3.client().upload_file(str(path), bucket, f"data/{path.name}")
    s3.client().upload_file(str(place.bucket / "data/validation.csv"), bucket, "data/validation.csv")
    dataset = {"uri": f"s3://{bucket}/data", "test": "test.csv", "labels": LABELS, "maxLength": 32}
    file = place.manifest("real", dataset=dataset, output={"storageUri": f"s3://{bucket}/out"}, hyperparameters={"epochs": 1})
    places = ["--workdir", tmp_path, "--model-mirror", place.mirror]
    done = execute("run", "-f", file, *places, env=s3.environment())
    assert done.returncode == 0, done.stderr
    assert f"model: s3://{bucket}/out/model" in done.stdout
    predicted = execute("predict", "--model", f"s3://{bucket}/out/model", "-o", "json", "good", env=s3.environment())
    assert json.loads(predicted.stdout)[0]["label"] in LABELS


def test_checkpoints_on_a_real_s3_server(place: Place, s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.create_bucket("cli-checkpoints")
    for path in (place.bucket / "data").glob("*.csv"):
        s3.client().upload_file(str(path), bucket, f"data/{path.name}")
    dataset = {"uri": f"s3://{bucket}/data", "labels": LABELS, "maxLength": 32}
    policy = {"hyperparameters": {"epochs": 2, "batchSize": 8}, "checkpoint": {"everySteps": 10}}
    file = place.manifest("saves", dataset=dataset, output={"storageUri": f"s3://{bucket}/out"}, **policy)
    done = execute("run", "-f", file, "--workdir", tmp_path / "w", "--model-mirror", place.mirror, env=s3.environment())
    assert done.returncode == 0, done.stderr
    uri = f"s3://{bucket}/out/checkpoints"
    by_file, by_uri = (
        execute("checkpoints", *named, "--verify", "-o", "json", env=s3.environment()) for named in (["-f", file], [uri])
    )
    assert by_file.returncode == 0, by_file.stderr
    assert by_file.stdout == by_uri.stdout
    rows = json.loads(by_file.stdout)
    assert rows[0]["step"] == 30
    assert {(r["standing"], r["whole"]) for r in rows} == {("counts", True)}
    to = tmp_path / "best"
    exported = execute("checkpoints", uri, "--export", "best", "--to", to, env=s3.environment())
    assert exported.returncode == 0, exported.stderr
    predicted = execute("predict", "--model", to, "-o", "json", "good")
    assert json.loads(predicted.stdout)[0]["label"] in LABELS
    key = f"out/checkpoints/{rows[0]['name']}/model/model.safetensors"
    s3.client().put_object(Bucket=bucket, Key=key, Body=b"cut off")
    corrupt = execute("checkpoints", uri, "--verify", env=s3.environment())
    assert corrupt.returncode == 17
    assert f"{rows[0]['name']} is not used: model/model.safetensors has 7 bytes" in corrupt.stderr
    assert_sentence(execute("checkpoints", "s3://cli-missing/x", env=s3.environment()), 15, "cli-missing", "does not exist")


def test_a_missing_bucket_and_wrong_credentials(place: Place, s3: S3Server, tmp_path: Path) -> None:
    missing = place.manifest("nobucket", output={"storageUri": "s3://cli-missing/out"})
    done = execute("run", "-f", missing, "--workdir", tmp_path, env=s3.environment())
    assert_sentence(done, 15, "cli-missing", "does not exist", "create it", "StorageNotFound")
    for wrong in ({"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ACCESS_KEY_ID": "nobody"}):
        done = execute("run", "-f", missing, "--workdir", tmp_path, env={**s3.environment(), **wrong})
        assert_sentence(done, 14, "AWS_ACCESS_KEY_ID", "refused the credentials", "StorageDenied")
    assert_sentence(execute("validate", "-f", missing, env=s3.environment()), 2, "bucket", "does not exist")


# -------------------------------------------------------------------------------------------------------- the rest ----
def test_crds_are_the_ones_in_the_repository() -> None:
    done = execute("crds")
    assert done.returncode == 0
    files = sorted((Path(__file__).parents[2] / "crds").glob("*.yaml"))
    assert len(files) == 2
    assert done.stdout == "---\n".join(file.read_text() for file in files)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['finetune', '--help']\nfrom finetune_cli.__main__ import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=QUIET, check=False)
    loaded = done.stdout.splitlines()[-1].split()
    assert not {"torch", "transformers", "pydantic", "rich", "boto3", "numpy"} & set(loaded)
