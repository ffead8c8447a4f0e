"""A few examples of each class. Between reading the data (splits.py) and all that looks at it."""

import numpy as np

from finetune_trainer.tasks import Examples


def few_shot(examples: Examples, k: int, seed: int) -> Examples:
    """k examples of each class, all of a class that has fewer, in the order of the file. `examples.labels` are ids, shape (rows,).

    A pure function of its arguments. A larger k keeps the examples of a smaller one, and no class's draw depends on another class.
    """
    chosen = []
    for label in np.unique(examples.labels):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(label)])))
        chosen.append(rng.permutation(np.flatnonzero(examples.labels == label))[:k])
    rows = np.sort(np.concatenate(chosen))
    return examples.take(rows)
