"""Manifests that must be refused, with the field that the message must name: by the API server and by the loader alike.

One table for both (tests/integration/test_crd.py, tests/unit/api/test_bad_manifests.py): what one of them lets through
would train on the laptop and fail in the cluster, or the other way round.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

GOOD: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "good"},
    "spec": {
        "task": "SequenceClassification",
        "model": {"uri": "hf://sentence-transformers/all-MiniLM-L6-v2"},
        "dataset": {"uri": "s3://data/feedback", "labels": ["negative", "neutral", "positive"]},
        "output": {"storageUri": "s3://models/feedback"},
    },
}

DELETE = object()
"""In place of a value: remove the field."""


@dataclass(frozen=True)
class Bad:
    """One bad manifest: GOOD with `edits` (dotted path -> value), and the word that both messages must hold."""

    name: str
    edits: dict[str, Any]
    named: str
    loader: bool = True
    """False where only the API server can refuse it; `why` says the reason."""
    why: str = field(default="")

    def manifest(self) -> dict[str, Any]:
        return edited(GOOD, self.edits)


def edited(manifest: dict[str, Any], edits: dict[str, Any]) -> dict[str, Any]:
    """A copy with each dotted path set (or deleted)."""
    out = copy.deepcopy(manifest)
    for path, value in edits.items():
        *parents, last = path.split(".")
        node = out
        for key in parents:
            node = node.setdefault(key, {})
        if value is DELETE:
            del node[last]
        else:
            node[last] = value
    return out


def _spec(name: str, path: str, value: Any, named: str | None = None) -> Bad:
    return Bad(name, {f"spec.{path}": value}, named or path.rsplit(".", maxsplit=1)[-1])


_MEAN = {"spec.model.pooling": "Mean"}
_SHOT = {"examplesPerClass": 8}
_WORDS = {"negative": "bad", "neutral": "so", "positive": "good"}
_CLOZE = {"template": "{text} It was {mask}.", "verbalizers": _WORDS}
LONG_URI = "s3://bucket/" + "x" * 1100

BAD: tuple[Bad, ...] = (
    # --- typos, at every level (the API server's strict field validation, the models' extra="forbid") ---
    _spec("typo-top", "datasets", {"uri": "s3://b/c"}),
    _spec("typo-hyperparameter", "hyperparameters.learningrate", 1e-4),
    _spec("typo-schedule", "hyperparameters.schedule.warmUp", 0.1),
    _spec("typo-dropout", "hyperparameters.dropout.atention", 0.1),
    _spec("typo-dataset", "dataset.textcolumn", "body"),
    _spec("typo-evaluation", "evaluation.everyEpoch", 1),
    _spec("typo-checkpoint", "checkpoint.keep", 3),
    _spec("typo-trainer", "trainer.images", "x:1"),
    _spec("typo-env", "trainer.env", [{"name": "A", "vaule": "x"}], "vaule"),
    _spec("typo-pod-template", "trainer.podTemplate.spec.nodeselector", {"a": "b"}),
    _spec("typo-failure-policy", "failurePolicy.maxRestart", 1),
    # --- required fields ---
    _spec("no-task", "task", DELETE),
    _spec("no-model", "model", DELETE),
    _spec("no-model-uri", "model", {}, "model.uri"),
    _spec("no-dataset", "dataset", DELETE),
    _spec("no-labels", "dataset.labels", DELETE),
    _spec("no-output", "output", DELETE),
    _spec("no-storage-uri", "output", {}, "output.storageUri"),
    _spec("no-env-name", "trainer.env", [{"value": "x"}], "name"),
    Bad("no-spec", {"spec": DELETE}, "spec"),
    Bad("half-a-recipe-beside-a-command", {"spec.trainer": {"command": ["train"]}, "spec.dataset": DELETE}, "dataset"),
    _spec("args-without-command", "trainer.args", ["--fast"], "args"),
    # --- numbers out of bounds ---
    _spec("negative-learning-rate", "hyperparameters.learningRate", -1e-4),
    _spec("zero-learning-rate", "hyperparameters.learningRate", 0),
    _spec("huge-learning-rate", "hyperparameters.learningRate", 11),
    _spec("zero-batch", "hyperparameters.batchSize", 0),
    _spec("zero-epochs", "hyperparameters.epochs", 0),
    _spec("negative-weight-decay", "hyperparameters.weightDecay", -0.1),
    _spec("zero-grad-norm", "hyperparameters.maxGradNorm", 0),
    _spec("dropout-one", "hyperparameters.dropout.hidden", 1),
    _spec("dropout-negative", "hyperparameters.dropout.classifier", -0.1),
    _spec("warmup-three-and-a-half-steps", "hyperparameters.schedule.warmup", 3.5),
    _spec("warmup-negative", "hyperparameters.schedule.warmup", -1),
    _spec("patience-zero", "hyperparameters.earlyStopping", {"patience": 0}, "patience"),
    _spec("seed-negative", "hyperparameters.seed", -1),
    _spec("seed-too-big", "hyperparameters.seed", 2**31),
    _spec("max-length-4", "dataset.maxLength", 4),
    _spec("keep-last-zero", "checkpoint.keepLast", 0),
    _spec("save-deadline-too-short", "checkpoint.saveDeadlineSeconds", 1),
    _spec("every-seconds-too-short", "checkpoint.everySeconds", 9),
    _spec("on-suspend-unknown", "checkpoint.onSuspend", "Keep"),
    _spec("when-busy-unknown", "checkpoint.whenBusy", "Drop"),
    Bad(
        "saves-by-steps-and-by-the-clock",
        {"spec.checkpoint.everySteps": 100, "spec.checkpoint.everySeconds": 600},
        "everySeconds",
    ),
    _spec("negative-max-restarts", "failurePolicy.maxRestarts", -1),
    # --- wrong types ---
    _spec("epochs-as-text", "hyperparameters.epochs", "3"),
    _spec("epochs-as-fraction", "hyperparameters.epochs", 2.5),
    _spec("learning-rate-as-text", "hyperparameters.learningRate", "5e-5"),
    _spec("suspend-as-text", "suspend", "yes"),
    _spec("overwrite-as-number", "output.overwrite", 1),
    _spec("labels-as-text", "dataset.labels", "a,b"),
    _spec("label-as-number", "dataset.labels", ["a", 2], "labels"),
    _spec("label-as-boolean", "dataset.labels", ["a", False], "labels"),
    _spec("hyperparameters-as-list", "hyperparameters", [{"epochs": 3}]),
    _spec("env-as-map", "trainer.env", {"A": "x"}),
    _spec("env-value-as-number", "trainer.env", [{"name": "A", "value": 1}], "value"),
    # --- words ---
    _spec("unknown-task", "task", "TextGeneration"),
    _spec("unknown-schedule", "hyperparameters.schedule.type", "Sawtooth"),
    _spec("unknown-precision", "hyperparameters.precision", "INT8"),
    _spec("option-of-another-schedule", "hyperparameters.schedule", {"type": "Cosine", "cycles": 2}, "cycles"),
    _spec("unfreeze-of-nothing", "hyperparameters.unfreeze", {"everyEpochs": 1}, "unfreeze"),
    _spec("adversarial-frozen", "hyperparameters", {"adversarial": {}, "freeze": {"embeddings": True}}, "adversarial"),
    _spec("smoothing-of-one", "hyperparameters.labelSmoothing", 1),
    _spec("layerwise-decay-zero", "hyperparameters.layerwiseDecay", 0),
    _spec("freeze-negative", "hyperparameters.freeze.layers", -1),
    _spec("micro-batch-zero", "hyperparameters.microBatchSize", 0),
    _spec("micro-batch-above-batch", "hyperparameters", {"batchSize": 8, "microBatchSize": 9}, "microBatchSize"),
    _spec("unknown-strategy", "hyperparameters.strategy", "ZeRO"),
    _spec("sharded-fp16", "hyperparameters", {"strategy": "FSDP", "precision": "FP16"}, "strategy"),
    _spec("compiled-to-the-bit", "hyperparameters", {"compile": True, "deterministic": True}, "compile"),
    _spec("compile-as-text", "hyperparameters.compile", "yes"),
    _spec("deterministic-as-number", "hyperparameters.deterministic", 1),
    _spec("max-steps-zero", "hyperparameters.maxSteps", 0),
    _spec("unknown-metric", "evaluation.bestMetric", "macro_g1"),
    _spec("metric-of-another-task", "evaluation.bestMetric", "f1", "evaluation.bestMetric"),
    Bad("labels-absent", {"spec.dataset.labels": DELETE}, "dataset.labels"),
    Bad("labels-for-numbers", {"spec.task": "Regression"}, "dataset.labels"),
    _spec("prompt-without-completion", "dataset.promptColumn", "prompt", "completionColumn"),
    Bad(
        "prompt-and-messages",
        {f"spec.dataset.{name}Column": name for name in ("prompt", "completion", "messages")},
        "messagesColumn",
    ),
    Bad("decoder-without-columns", {"spec.task": "CausalLM", "spec.dataset.labels": DELETE}, "promptColumn"),
    _spec("chat-for-a-classifier", "dataset.messagesColumn", "messages", "promptColumn"),
    Bad("several-labels-for-tags", {"spec.task": "TokenClassification", "spec.dataset.multiLabel": {}}, "multiLabel"),
    Bad("pair-for-tags", {"spec.task": "TokenClassification", "spec.dataset.textPairColumn": "other"}, "textPairColumn"),
    Bad(
        "smoothing-of-numbers",
        {"spec.task": "Regression", "spec.dataset.labels": DELETE, "spec.hyperparameters.labelSmoothing": 0.1},
        "labelSmoothing",
    ),
    Bad("mcc-of-several", {"spec.dataset.multiLabel": {}, "spec.evaluation.bestMetric": "mcc"}, "evaluation.bestMetric"),
    Bad("fgm-with-adapters", {"spec.model.lora": {}, "spec.hyperparameters.adversarial": {}}, "hyperparameters.adversarial"),
    _spec("adapters-of-rank-0", "model.lora.rank", 0),
    _spec("threshold-of-1", "dataset.multiLabel", {"threshold": 1}, "threshold"),
    # --- few examples ---
    _spec("unknown-pooling", "model.pooling", "Max"),
    Bad("mean-for-tags", {"spec.model.pooling": "Mean", "spec.task": "TokenClassification"}, "model.pooling"),
    *(
        Bad(f"mean-with-{path}", {"spec.model.pooling": "Mean", f"spec.{path}": value}, path)
        for path, value in {
            "model.lora": {},
            "hyperparameters.freeze": {"layers": 1},
            "hyperparameters.layerwiseDecay": 0.9,
            "hyperparameters.adversarial": {},
            "hyperparameters.gradientCheckpointing": True,
            "hyperparameters.precision": "BF16",
            "hyperparameters.strategy": "FSDP",
            "hyperparameters.compile": True,
            "hyperparameters.dropout.hidden": 0.1,
            "hyperparameters.dropout.attention": 0.1,
        }.items()
    ),
    Bad("mean-with-frozen-embeddings", {**_MEAN, "spec.hyperparameters.freeze.embeddings": True}, "hyperparameters.freeze"),
    Bad("mean-with-frozen-names", {**_MEAN, "spec.hyperparameters.freeze.patterns": ["*"]}, "hyperparameters.freeze"),
    _spec("no-shot", "dataset.fewShot", {"examplesPerClass": 0}, "examplesPerClass"),
    _spec("shots-of-nothing", "dataset.fewShot", {}, "examplesPerClass"),
    Bad("shots-of-several-labels", {"spec.dataset.fewShot": _SHOT, "spec.dataset.multiLabel": {}}, "dataset.fewShot"),
    Bad("shots-of-tags", {"spec.dataset.fewShot": _SHOT, "spec.task": "TokenClassification"}, "dataset.fewShot"),
    _spec("prompt-without-template", "dataset.prompt", {}, "template"),
    _spec("template-without-column", "dataset.prompt", {"template": "{{text}} it was"}, "template"),
    _spec("template-with-a-lone-brace", "dataset.prompt", {"template": "{text} }"}, "written twice"),
    _spec("template-with-an-empty-name", "dataset.prompt", {"template": "{text} {}"}, "written twice"),
    _spec("template-with-the-label", "dataset.prompt", {"template": "{text} {label}"}, "prompt.template"),
    _spec("mask-without-words", "dataset.prompt", {"template": "{text} {mask}"}, "template"),
    _spec("words-without-mask", "dataset.prompt", {**_CLOZE, "template": "{text} {{mask}}"}, "template"),
    _spec("two-masks", "dataset.prompt", {**_CLOZE, "template": "{text} {mask} {mask}"}, "template"),
    _spec("mask-alone", "dataset.prompt", {**_CLOZE, "template": "{mask}"}, "template"),
    _spec("a-word-too-few", "dataset.prompt", {**_CLOZE, "verbalizers": {"negative": "bad", "neutral": "so"}}, "prompt.verbalizers"),
    _spec("a-word-for-no-label", "dataset.prompt", {**_CLOZE, "verbalizers": {**_WORDS, "other": "x"}}, "prompt.verbalizers"),
    _spec("a-word-twice", "dataset.prompt", {**_CLOZE, "verbalizers": {**_WORDS, "neutral": "bad"}}, "verbalizers"),
    _spec("an-empty-word", "dataset.prompt", {**_CLOZE, "verbalizers": {**_WORDS, "neutral": ""}}, "verbalizers"),
    Bad("prompt-and-pair", {"spec.dataset.prompt": {"template": "{text}"}, "spec.dataset.textPairColumn": "b"}, "textPairColumn"),
    Bad("prompt-for-tags", {"spec.dataset.prompt": {"template": "{text}"}, "spec.task": "TokenClassification"}, "dataset.prompt"),
    Bad("words-for-several-labels", {"spec.dataset.prompt": _CLOZE, "spec.dataset.multiLabel": {}}, "dataset.prompt.verbalizers"),
    Bad("words-and-mean", {**_MEAN, "spec.dataset.prompt": _CLOZE}, "dataset.prompt.verbalizers"),
    Bad("words-and-a-head", {"spec.dataset.prompt": _CLOZE, "spec.hyperparameters.dropout.classifier": 0.1},
        "hyperparameters.dropout.classifier"),
    # --- addresses and files ---
    _spec("model-without-scheme", "model.uri", "bert-base-uncased"),
    _spec("model-without-organisation", "model.uri", "hf://bert-base-uncased"),
    _spec("model-over-https", "model.uri", "https://example.com/model"),
    _spec("model-file-relative", "model.uri", "file://models/x"),
    _spec("dataset-on-gcs", "dataset.uri", "gs://bucket/data"),
    _spec("dataset-bucket-upper-case", "dataset.uri", "s3://Bucket/data"),
    _spec("output-without-prefix", "output.storageUri", "s3://bucket"),
    _spec("output-too-long", "output.storageUri", LONG_URI),
    _spec("checkpoint-uri", "checkpoint.storageUri", "/checkpoints"),
    _spec("excel", "dataset.train", "train.xlsx"),
    _spec("dataset-of-nobody", "dataset.uri", "hf://feedback"),
    _spec("dataset-with-a-path", "dataset.uri", "hf://org/feedback/data"),
    _spec("file-absolute", "dataset.validation", "/data/validation.csv"),
    # --- the data set ---
    _spec("duplicate-labels", "dataset.labels", ["a", "b", "a"]),
    _spec("one-label", "dataset.labels", ["a"]),
    _spec("no-label", "dataset.labels", []),
    _spec("empty-label", "dataset.labels", ["a", ""], "labels"),
    _spec("label-too-long", "dataset.labels", ["a", "b" * 129], "labels"),
    _spec("too-many-labels", "dataset.labels", [str(i) for i in range(1001)]),
    _spec("empty-column", "dataset.textColumn", ""),
    _spec("column-too-long", "dataset.labelColumn", "c" * 129),
    _spec("text-is-label", "dataset.textColumn", "label", "labelColumn"),
    _spec("test-is-train", "dataset.test", "train.csv"),
    _spec("test-is-validation", "dataset.test", "validation.csv"),
    _spec("train-is-validation", "dataset.train", "validation.csv", "validation"),
    Bad("validation-twice", {"spec.dataset.validation": "validation.csv", "spec.dataset.validationFraction": 0.1}, "validationFraction"),
    _spec("validation-of-nothing", "dataset.validationFraction", 0),
    _spec("validation-of-all", "dataset.validationFraction", 1),
    _spec("validation-in-percent", "dataset.validationFraction", 10),
    _spec("split-group-without-a-split", "dataset.splitGroupColumn", "customer"),
    _spec("group-of-texts", "dataset.groupColumn", "text"),
    Bad("group-of-pairs", {f"spec.dataset.{name}": "other" for name in ("textPairColumn", "groupColumn")}, "groupColumn"),
    Bad("test-is-train-held-out", {"spec.dataset.validationFraction": 0.1, "spec.dataset.test": "train.csv"}, "test"),
    _spec("negative-bad-rows", "dataset.maxBadRows", -1),
    _spec("bad-rows-as-share", "dataset.maxBadRows", 0.1),
    # --- two of a kind ---
    _spec("both-intervals", "evaluation", {"everyEpochs": 1, "everySteps": 100}, "everySteps"),
    _spec("value-and-value-from", "trainer.env",
          [{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}], "valueFrom"),
    _spec("value-from-nothing", "trainer.env", [{"name": "A", "valueFrom": {}}], "secretKeyRef"),
    _spec("value-from-two", "trainer.env", [{"name": "A", "valueFrom": {
        "secretKeyRef": {"name": "s", "key": "k"}, "configMapKeyRef": {"name": "s", "key": "k"}}}], "configMapKeyRef"),
    _spec("env-from-two", "trainer.envFrom", [{"secretRef": {"name": "s"}, "configMapRef": {"name": "c"}}], "configMapRef"),
    _spec("env-from-nothing", "trainer.envFrom", [{}], "secretRef"),
    _spec("duplicate-env", "trainer.env", [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}], "env"),
    _spec("duplicate-volume", "trainer.podTemplate.spec.volumes",
          [{"name": "v", "emptyDir": {}}, {"name": "v", "emptyDir": {}}], "volumes"),
    # --- names and quantities ---
    _spec("reserved-env", "trainer.env", [{"name": "FINETUNE_JOB", "value": "x"}], "name"),
    _spec("reserved-env-kubeflow", "trainer.env", [{"name": "KUBEFLOW_TRAINER_SERVER_URL", "value": "x"}], "name"),
    _spec("reserved-env-torchrun", "trainer.env", [{"name": "PET_NNODES", "value": "2"}], "name"),
    _spec("env-name-with-space", "trainer.env", [{"name": "MY VAR", "value": "x"}], "name"),
    _spec("secret-name-upper-case", "trainer.envFrom", [{"secretRef": {"name": "S3-Keys"}}], "name"),
    _spec("service-account-name", "trainer.serviceAccountName", "My_Account"),
    _spec("quantity-rubbish", "trainer.resourcesPerNode.limits", {"memory": "lots"}, "memory"),
    _spec("quantity-space", "trainer.resourcesPerNode.limits", {"memory": "16 Gi"}, "memory"),
    _spec("quantity-negative", "trainer.resourcesPerNode.requests", {"cpu": -1}, "cpu"),
    _spec("quantity-fraction-without-quotes", "trainer.resourcesPerNode.requests", {"cpu": 0.5}, "cpu"),
    _spec("empty-image", "trainer.image", ""),
    _spec("label-value", "trainer.podTemplate.metadata.labels", {"team": "a b"}, "labels"),
    _spec("volume-without-name", "trainer.podTemplate.spec.volumes", [{"emptyDir": {}}], "name"),
    _spec("volume-of-the-operator", "trainer.podTemplate.spec.volumes", [{"name": "finetune-cache", "emptyDir": {}}], "name"),
    _spec("mount-of-no-volume", "trainer.podTemplate.spec.volumeMounts", [{"name": "v", "mountPath": "/v"}], "volumeMounts"),
    _spec("mount-path-relative", "trainer.podTemplate.spec",
          {"volumes": [{"name": "v", "emptyDir": {}}], "volumeMounts": [{"name": "v", "mountPath": "data"}]}, "mountPath"),
    Bad("name-too-long", {"metadata.name": "a" * 53}, "name"),
    Bad("name-upper-case", {"metadata.name": "Good"}, "name"),
    Bad("name-with-dot", {"metadata.name": "my.job"}, "name"),
    Bad("name-begins-with-digit", {"metadata.name": "1st-job"}, "name"),
    Bad("name-ends-with-dash", {"metadata.name": "job-"}, "name"),
    Bad("old-version", {"apiVersion": "finetune.dev/v1"}, "finetune.dev/v1"),
)  # fmt: skip


@dataclass(frozen=True)
class BadEdit:
    """An edit of a stored job (GOOD with `before`) that must be refused. Only the API server sees edits."""

    name: str
    after: dict[str, Any]
    named: str
    before: dict[str, Any] = field(default_factory=dict)


_SUSPENDED = {"spec.suspend": True}

BAD_EDITS: tuple[BadEdit, ...] = (
    BadEdit("model", {"spec.model.uri": "hf://a/b"}, "spec.model is immutable"),
    BadEdit("dataset-file", {"spec.dataset.train": "other.csv"}, "spec.dataset is immutable"),
    BadEdit("dataset-test-added", {"spec.dataset.test": "test.csv"}, "spec.dataset is immutable"),
    BadEdit("labels-order", {"spec.dataset.labels": ["neutral", "negative", "positive"]}, "spec.dataset is immutable"),
    BadEdit("label-added", {"spec.dataset.labels": ["negative", "neutral", "positive", "x"]}, "spec.dataset is immutable"),
    BadEdit("learning-rate-added", {"spec.hyperparameters.learningRate": 1e-4}, "spec.hyperparameters is immutable"),
    BadEdit("epochs", {"spec.hyperparameters.epochs": 4}, "spec.hyperparameters is immutable"),
    BadEdit(
        "early-stopping-removed",
        {"spec.hyperparameters.earlyStopping": DELETE},
        "spec.hyperparameters is immutable",
        before={"spec.hyperparameters.earlyStopping": {"patience": 2}},
    ),
    BadEdit("epochs-while-suspended", {"spec.hyperparameters.epochs": 4}, "spec.hyperparameters is immutable", before=_SUSPENDED),
    BadEdit("evaluation", {"spec.evaluation.everySteps": 5}, "spec.evaluation is immutable"),
    BadEdit("output", {"spec.output.storageUri": "s3://models/other"}, "spec.output is immutable"),
    BadEdit("overwrite", {"spec.output.overwrite": True}, "spec.output is immutable"),
    BadEdit("image-while-running", {"spec.trainer.image": "new:2"}, "spec.trainer may change only while spec.suspend"),
    BadEdit(
        "image-removed-while-running",
        {"spec.trainer": DELETE},
        "spec.trainer may change only while spec.suspend",
        before={"spec.trainer.image": "old:1"},
    ),
    BadEdit("image-with-suspend", {"spec.trainer.image": "new:2", "spec.suspend": True}, "spec.trainer may change only"),
    BadEdit(
        "image-with-resume",
        {"spec.trainer.image": "new:2", "spec.suspend": False},
        "spec.trainer may change only",
        before=_SUSPENDED,
    ),
    BadEdit(
        # Free-form parts have no schema, yet they are compared.
        "toleration-while-running",
        {"spec.trainer.podTemplate.spec.tolerations": [{"key": "b"}]},
        "spec.trainer may change only",
        before={"spec.trainer.podTemplate.spec.tolerations": [{"key": "a"}]},
    ),
    BadEdit("checkpoint-while-running", {"spec.checkpoint.keepLast": 5}, "spec.checkpoint may change only while spec.suspend"),
    BadEdit(
        "on-suspend-with-suspend",
        {"spec.checkpoint.onSuspend": "Discard", "spec.suspend": True},
        "spec.checkpoint may change only",
    ),
    BadEdit("stop-taken-back", {"spec.stop": False}, "stop cannot be taken back", before={"spec.stop": True}),
    BadEdit("max-restarts-negative", {"spec.failurePolicy.maxRestarts": -1}, "maxRestarts"),
)


@dataclass(frozen=True)
class GoodEdit:
    """An edit that must be possible."""

    name: str
    after: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)


GOOD_EDITS: tuple[GoodEdit, ...] = (
    GoodEdit("suspend", {"spec.suspend": True}),
    GoodEdit("resume", {"spec.suspend": False}, before=_SUSPENDED),
    GoodEdit("stop", {"spec.stop": True}),
    GoodEdit("max-restarts", {"spec.failurePolicy.maxRestarts": 10}),
    GoodEdit("max-restarts-while-suspended", {"spec.failurePolicy.maxRestarts": 0}, before=_SUSPENDED),
    GoodEdit("image-while-suspended", {"spec.trainer.image": "new:2"}, before=_SUSPENDED),
    GoodEdit("image-removed-while-suspended", {"spec.trainer": DELETE}, before={**_SUSPENDED, "spec.trainer.image": "old:1"}),
    GoodEdit(
        "resources-while-suspended",
        {"spec.trainer.resourcesPerNode": {"limits": {"memory": "64Gi", "nvidia.com/gpu": 2}}},
        before={**_SUSPENDED, "spec.trainer.resourcesPerNode": {"limits": {"memory": "32Gi", "nvidia.com/gpu": 1}}},
    ),
    GoodEdit("checkpoint-while-suspended", {"spec.checkpoint.keepLast": 5}, before=_SUSPENDED),
    GoodEdit("on-suspend-while-suspended", {"spec.checkpoint.onSuspend": "Discard"}, before=_SUSPENDED),
    GoodEdit("labels-of-the-object", {"metadata.labels": {"team": "a"}}),
)
