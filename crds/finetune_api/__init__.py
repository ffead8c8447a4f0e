"""The contract: what users write and what every part of the project agrees on.

Pydantic models of the custom resources, the names shared by operator and trainer (environment, labels, conditions), the
table of failure classes, and the generator of the CRDs. Everything else imports this package; it imports nothing of ours.
"""

from finetune_api.defaults import JobDefaults
from finetune_api.finetunejob import FineTuneJob, FineTuneJobSpec, FineTuneJobStatus
from finetune_api.recipe import Recipe

__all__ = ["FineTuneJob", "FineTuneJobSpec", "FineTuneJobStatus", "JobDefaults", "Recipe"]
