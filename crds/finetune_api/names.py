"""Names that more than one part of the project must spell the same way: API group, labels, environment, files, conditions.

They stand in one place so that a rename is one edit, and so that docs and tests can be checked against code.
"""

from enum import StrEnum

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND_JOB = "FineTuneJob"
PLURAL_JOB = "finetunejobs"
KIND_SWEEP = "HyperparameterSweep"
PLURAL_SWEEP = "hyperparametersweeps"

MANAGER = "finetune-operator"
"""Value of app.kubernetes.io/managed-by on every child, and the field manager of our writes."""

LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_JOB = f"{GROUP}/job"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_SWEEP = f"{GROUP}/sweep"
"""On every FineTuneJob of a sweep: its trials, and the repetitions of the best."""
LABEL_ROLE = f"{GROUP}/role"
"""trial, or repeat: one of the best trained again with another seed."""
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_PRIORITY = "kueue.x-k8s.io/priority-class"
QUEUE_LABELS = (LABEL_QUEUE, LABEL_PRIORITY, "kueue.x-k8s.io/max-exec-time-seconds")
"""Copied from the resource to its child Job. With a queue label the child's `suspend` belongs to Kueue alone."""

ANNOTATION_PROGRESS_CA = f"{GROUP}/progress-ca"
"""PEM of the progress server's CA; the downward API projects it into a file of the pod."""

ANNOTATION_TRIAL = f"{GROUP}/trial"
"""On a trial: its number, its parameters, how they were chosen and what was known then, as JSON (domain/trials.py)."""
ANNOTATION_RUNG = f"{GROUP}/rung-"
"""With the rung's number of examples behind it: the verdict on the trial there, as JSON. Written once."""

CONTAINER = "trainer"
"""Name of the training container in the pod."""

PROGRESS_AUDIENCE = "progress.finetune.dev"
"""Audience of the pod's projected token: it is good for posting progress and for nothing else."""

MAX_NAME_LENGTH = 52
"""`<name>-<attempt>` names a Job and `<name>-<attempt>-<index>-<random>` its pods: 63 characters in all."""

MAX_SWEEP_NAME_LENGTH = 45
"""A trial is <sweep>-t0007, a repetition <sweep>-r0007a."""

# --- environment of the trainer process (the same in the pod and under `finetune run`) -------------------------------
ENV_JOB = "FINETUNE_JOB"
"""The recipe as JSON (`Recipe.model_dump_json(by_alias=True, exclude_none=True)`)."""
ENV_JOB_NAME = "FINETUNE_JOB_NAME"
ENV_NAMESPACE = "FINETUNE_NAMESPACE"
ENV_ATTEMPT = "FINETUNE_ATTEMPT"
ENV_POD_UID = "FINETUNE_POD_UID"
ENV_WORKDIR = "FINETUNE_WORKDIR"
"""Writable folder for downloads and scratch; /workspace in the pod."""
ENV_MODEL_MIRROR = "FINETUNE_MODEL_MIRROR"
"""Where `hf://org/name` is looked up first: a folder or an s3:// prefix laid out as org/name/ and org/name@revision/."""
ENV_DATASET_MIRROR = "FINETUNE_DATASET_MIRROR"
"""The same for `hf://` data sets."""
ENV_S3_ROOT = "FINETUNE_S3_ROOT"
"""A folder that stands in for the buckets: s3://bucket/key is DIR/bucket/key (`finetune run --s3-root`)."""
ENV_S3_ADDRESSING = "AWS_S3_ADDRESSING_STYLE"
"""path (https://host/bucket), virtual (https://bucket.host) or auto. boto3 itself has this in its configuration file only."""
ENV_SWEEP_HISTORY = "FINETUNE_SWEEP_HISTORY_"
"""With a number from 0 behind it: a piece of a sweep's history, base64 of gzip of JSON, for the Job that closes the sweep."""
ENV_SWEEP_HISTORY_URI = "FINETUNE_SWEEP_HISTORY_URI"
"""Folder that receives HISTORY_FILE."""
ENV_SWEEP_WINNER = "FINETUNE_SWEEP_WINNER"
"""The winner's model; ENV_JOB then says how it is scored and where it goes."""
ENV_TERMINATION_LOG = "FINETUNE_TERMINATION_LOG"
"""File that receives the termination message; equals the container's terminationMessagePath."""

# Kubeflow Trainer's wire protocol: an unmodified Hugging Face Trainer reports through these three as well.
ENV_PROGRESS_URL = "KUBEFLOW_TRAINER_SERVER_URL"
ENV_PROGRESS_CA = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
ENV_PROGRESS_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105  (the name of a variable that holds a file path)

RESERVED_ENV_PREFIXES = ("FINETUNE_", "KUBEFLOW_TRAINER_", "PET_")

WORKDIR = "/workspace"
CACHE_DIR = "/cache"
PROGRESS_DIR = "/var/run/finetune"
TERMINATION_LOG = "/dev/termination-log"

# --- what lies under output.storageUri ------------------------------------------------------------------------------
RESULT_FILE = "result.json"
MODEL_DIR = "model"
LOGS_DIR = "logs"
CHECKPOINTS_DIR = "checkpoints"
HISTORY_FILE = "sweep.json"
"""Under a sweep's output: all its trials, for people and for the next sweep."""
MODEL_CARD_FILE = "finetune.json"
"""Beside the model's weights: label map, maxLength, recipe digest; `finetune predict` applies it."""


class State(StrEnum):
    """`status.state`: one word for people. Programs read the conditions."""

    PENDING = "Pending"
    QUEUED = "Queued"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    STOPPING = "Stopping"
    PROMOTING = "Promoting"
    """Of a sweep: the best are repeated, scored and copied."""
    COMPLETE = "Complete"
    FAILED = "Failed"


class Condition(StrEnum):
    """Condition types. Complete and Failed are final and never both True."""

    RUNNING = "Running"
    PROGRESSING = "Progressing"
    CHECKPOINTED = "Checkpointed"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Reason(StrEnum):
    """Condition reasons that are not failure classes (those are in `failures.FAILURES`, and say also why Running waits for a restart)."""

    ATTEMPT_CREATED = "AttemptCreated"
    WAITING_FOR_PODS = "WaitingForPods"
    WAITING_FOR_QUEUE = "WaitingForQueue"
    PODS_RUNNING = "PodsRunning"
    PROGRESS_REPORTED = "ProgressReported"
    NO_PROGRESS_YET = "NoProgressYet"
    NOT_RUNNING = "NotRunning"
    NO_CHECKPOINT_YET = "NoCheckpointYet"
    CHECKPOINT_COMMITTED = "CheckpointCommitted"
    NOT_SUSPENDED = "NotSuspended"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    RESUMED = "Resumed"
    NOT_FINISHED = "NotFinished"
    STOPPING = "Stopping"
    TRAINED = "Trained"
    ALREADY_COMPLETED = "AlreadyCompleted"
    STOPPED = "Stopped"
    NOT_FAILED = "NotFailed"
    NAME_CONFLICT = "NameConflict"
    CREATE_REFUSED = "CreateRefused"
    FINISHED = "Finished"
    # Of a sweep; why it is Complete says Finish (search/types.py).
    WAITING_FOR_TRIALS = "WaitingForTrials"
    WARM_START_WAITING = "WarmStartWaiting"
    TRIALS_RUNNING = "TrialsRunning"
    REPEATING = "Repeating"
    PROMOTING = "Promoting"
    SWEEP_INVALID = "SweepInvalid"
    METRIC_NOT_FOUND = "MetricNotFound"
    TOO_MANY_FAILED = "TooManyFailed"
    NO_RESULT = "NoResult"
    PROMOTION_FAILED = "PromotionFailed"
