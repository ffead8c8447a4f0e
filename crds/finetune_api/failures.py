"""The failure classes: one table of why a training can end badly, and what that means for a restart.

The trainer ends with the class's exit code and writes class and sentence to the termination message; the operator reads
them back, decides on a restart, and sets the class as the reason of the Failed condition. The child Job's
podFailurePolicy is generated from the same table.
"""

from dataclasses import dataclass

DISRUPTIONS_IN_A_ROW = 3
"""From so many on, a disruption counts like a failure of the training: a job that the cluster ends each time before it has saved
anything new does not go on for ever."""


@dataclass(frozen=True)
class FailureClass:
    """One row.

    reason: CamelCase, the reason of the condition. exit_code: what the trainer exits with, None where the kubelet or the
    operator sees it first. retriable: whether a new attempt can help. counted: whether the restart uses up maxRestarts; a retriable
    class that is not counted is a disruption.
    """

    reason: str
    exit_code: int | None
    retriable: bool
    counted: bool
    meaning: str


FAILURES: tuple[FailureClass, ...] = (
    # Exit codes stay clear of 1 and 2 (Python), 64-78 (sysexits, which user scripts use) and 126+ (shell and signals).
    FailureClass("RecipeInvalid", 10, False, True, "the recipe cannot be trained as written"),
    FailureClass("DataInvalid", 11, False, True, "the data cannot be used: missing file or column, unknown label, no rows"),
    FailureClass("ModelNotFound", 12, False, True, "the model's files are not there or are not a model"),
    FailureClass("OutputExists", 13, False, True, "the output already holds the result of another recipe"),
    FailureClass("StorageDenied", 14, False, True, "the storage refused the credentials, or none were given"),
    FailureClass("StorageNotFound", 15, False, True, "the bucket or folder does not exist"),
    FailureClass("NonFiniteLoss", 16, False, True, "the loss became NaN or infinite"),
    FailureClass("CheckpointCorrupt", 17, False, True, "checkpoints exist and none of them can be read"),
    FailureClass(
        "CudaOutOfMemory", 18, True, True, "the accelerator's memory is too small; a new attempt computes fewer examples at once"
    ),
    FailureClass("StorageUnavailable", 19, True, True, "the storage did not answer, or answered with server errors"),
    FailureClass("Interrupted", 20, True, False, "the pod was asked to end (SIGTERM) and saved what it had"),
    # Counted: two jobs that share an output take it from each other, attempt by attempt, and that must end.
    FailureClass(
        "Superseded", 21, True, True, "another execution, of this job or of one with the same recipe, took over this output"
    ),
    FailureClass("OOMKilled", None, True, True, "the kernel ended the container: its memory limit is too small"),
    FailureClass("Evicted", None, True, True, "the kubelet evicted the pod for want of memory or disk on the node"),
    FailureClass("Disrupted", None, True, False, "preemption, drain or taint: the cluster ended the pod, not the training"),
    FailureClass("NodeLost", None, True, False, "the node stopped answering"),
    FailureClass("ChildDeleted", None, True, False, "somebody deleted the child Job or its pod"),
    FailureClass("UserCodeError", None, True, True, "the process ended with an exit code or signal not listed here"),
)

BY_REASON = {f.reason: f for f in FAILURES}
BY_EXIT_CODE = {f.exit_code: f for f in FAILURES if f.exit_code is not None}

PARAMETERS_AT_FAULT = frozenset({"RecipeInvalid", "NonFiniteLoss", "CudaOutOfMemory", "OOMKilled", "UserCodeError"})
"""What hyperparameters can cause: a sweep learns from such a trial that its parameters are bad, and from the others nothing."""
