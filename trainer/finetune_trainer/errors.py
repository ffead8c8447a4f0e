"""The one way in which a training ends badly on purpose: a failure class and a sentence that says what to change."""

from finetune_api.failures import BY_REASON


class TrainingFailure(Exception):  # noqa: N818  (a failure, as in the table of failure classes)
    """Ends the process with the exit code of `reason` (finetune_api.failures); `message` goes to the user as it is."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.failure = BY_REASON[reason]
        self.message = message
