"""How much each parameter decides: PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023), as Optuna has it."""

import math
from collections.abc import Sequence

from finetune_operator.search import space
from finetune_operator.search.tpe import study_of
from finetune_operator.search.types import Outcome, Study, Trial, View

FEWEST = 10
"""Complete trials; with fewer, shares are noise."""


def importance(study: Study, trials: Sequence[Trial]) -> list[tuple[str, float]]:
    """Name and share of each parameter, the largest first; the shares add up to 1.

    Of complete trials only: what was stopped or has failed has no value of its own. Empty below ten of them, and where all are equal.
    """
    done = [
        View(t.parameters, study.sign * float(t.value))
        for t in trials
        if t.outcome is Outcome.COMPLETE
        and t.value is not None
        and math.isfinite(t.value)
        and space.fits(study.parameters, t.parameters)
    ]
    if len(done) < FEWEST or len({v.value for v in done}) == 1:
        return []
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study_of(study.parameters, done), evaluator=evaluator)
    return sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))
