"""What a few labelled examples are worth: macro-F1 on held-out texts from 8, 32 and 128 examples of each class.

Ours are real runs of the trainer with its defaults: a linear head on a frozen encoder (model.pooling: Mean), and all weights. Beside them
stand scikit-learn's logistic regression on the same features and on TF-IDF. All four see the same training rows, and the same number of
other rows to choose by: ours the best evaluation, logistic regression its C. Seconds are of the CPU, for everything but scoring.
`make bench-few-shot`; about 15 CPU-minutes.
"""

import io
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import LABELS, ROOT, Corpus, Rows, load_airline_or_feedback, print_table, write_json
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from threadpoolctl import threadpool_limits

from finetune_api import Recipe
from finetune_trainer import inference, model, pooling
from finetune_trainer.config import Runtime
from finetune_trainer.few_shot import few_shot
from finetune_trainer.report import Console
from finetune_trainer.run import Run
from finetune_trainer.tasks import Examples, kind_of

sys.path.append(str(ROOT / "hack"))
import minilm

EXAMPLES_PER_CLASS = (8, 32, 128)
SEEDS = range(5)
MODEL = f"hf://{minilm.REPOSITORY}"
MAX_LENGTH = 128
HELD_OUT = 720
"""Rows to score on: what the sample of training rows does to a score is several times what more of these would tell."""
METHODS = {
    "frozen": "ours: frozen encoder, pooling Mean",
    "full": "ours: all weights, defaults",
    "features": "logistic regression, same features",
    "tfidf": "TF-IDF + logistic regression",
}
Floats = np.ndarray[Any, np.dtype[np.float64]]


def main() -> int:
    torch.set_num_threads(1)
    corpus, mirror = load_airline_or_feedback(), str(minilm.ensure())
    corpus = replace(corpus, held_out=corpus.held_out[:HELD_OUT])
    began, found = time.process_time(), []
    with threadpool_limits(1):
        encoder = Encoder(mirror)
        held_out = encoder.features(corpus.held_out)
        for k in EXAMPLES_PER_CLASS:
            for seed in SEEDS:
                train, validation = (sample(rows, k, seed) for rows in (corpus.train, corpus.validation))
                small = replace(corpus, train=train, validation=validation)
                done = {
                    "frozen": ours(small, seed, mirror, {"pooling": "Mean"}),
                    "full": ours(small, seed, mirror, {}),
                    "features": regression(small, encoder.features, held_out),
                    "tfidf": tfidf(small),
                }
                for method, (score, seconds) in done.items():
                    one = {"method": method, "examplesPerClass": k, "seed": seed, "macroF1": score, "cpuSeconds": seconds}
                    found.append(one | {"examples": len(train)})
                said = "  ".join(f"{method} {score:.3f}" for method, (score, _) in done.items())
                print(f"{k} per class, seed {seed}: {said}", file=sys.stderr, flush=True)
    show(corpus, found)
    total = time.process_time() - began
    print(
        f"\n{total / 60:.1f} CPU-minutes: {write_json('few_shot', {'corpus': corpus.name, 'cpuSeconds': total, 'runs': found})}"
    )
    return 0


def sample(rows: Rows, k: int, seed: int) -> Rows:
    """As dataset.fewShot draws them."""
    labels = np.array([LABELS.index(row["label"]) for row in rows])
    return few_shot(Examples("rows", rows, labels), k, seed).texts


def macro_f1(rows: Rows, guessed: Any) -> float:
    return float(f1_score([row["label"] for row in rows], guessed, average="macro"))


# ------------------------------------------------------------------------------------------------------------- ours ----
def recipe(folder: Path, seed: int, source: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "task": "SequenceClassification",
            "model": {"uri": MODEL, **source},
            "dataset": {"uri": f"file://{folder / 'data'}", "labels": LABELS, "maxLength": MAX_LENGTH},
            "hyperparameters": {"seed": seed},
            "output": {"storageUri": f"file://{folder / 'out'}"},
        }
    )


def ours(corpus: Corpus, seed: int, mirror: str, source: dict[str, Any]) -> tuple[float, float]:
    """Macro-F1 on the held-out rows, and CPU-seconds of the run."""
    with tempfile.TemporaryDirectory(prefix="few-shot-") as scratch:
        folder = Path(scratch)
        corpus.write(folder / "data")
        runtime = Runtime("few-shot", folder / "work", model_mirror=mirror)
        began = time.process_time()
        Run(recipe(folder, seed, source), runtime, threading.Event(), console=Console(io.StringIO()))()
        seconds = time.process_time() - began
        return inference.load(folder / "out/model").evaluate(corpus.held_out).values["macro_f1"], seconds


# -------------------------------------------------------------------------------------------------------- baselines ----
class Encoder:
    """The features that pooling Mean trains on, by the trainer's own code."""

    def __init__(self, mirror: str) -> None:
        self.recipe = recipe(Path("/"), 0, {"pooling": "Mean"})
        self.kind = kind_of(self.recipe.task, self.recipe.dataset)
        source = Path(mirror) / minilm.REPOSITORY
        self.tokenizer = model.load_tokenizer(source, self.recipe)
        self.model = model.build(source, self.recipe, self.kind, self.tokenizer)

    def features(self, rows: Rows) -> Any:
        texts = inference.read_inputs(self.kind, rows)
        encoded = self.kind.encode(Examples("rows", texts, np.zeros(len(rows), dtype=np.int64)), self.tokenizer, MAX_LENGTH)
        made = pooling.with_features(self.model, {"rows": encoded}, self.tokenizer.pad_token_id, torch.device("cpu"))
        return made["rows"].features


def regression(corpus: Corpus, features: Callable[[Rows], Any], held_out: Any) -> tuple[float, float]:
    """Logistic regression whose C is chosen on the validation rows: macro-F1 on the held-out ones, and CPU-seconds without theirs."""
    began = time.process_time()
    train, validation = features(corpus.train), features(corpus.validation)
    labels = [row["label"] for row in corpus.train]
    fitted = [LogisticRegression(C=c, max_iter=2000).fit(train, labels) for c in (0.1, 0.3, 1, 3, 10, 30)]
    best = max(fitted, key=lambda one: macro_f1(corpus.validation, one.predict(validation)))
    seconds = time.process_time() - began
    return macro_f1(corpus.held_out, best.predict(held_out)), seconds


def tfidf(corpus: Corpus) -> tuple[float, float]:
    """The same on words and pairs of words."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    texts = [[row["text"] for row in rows] for rows in (corpus.train, corpus.validation, corpus.held_out)]
    labels = [row["label"] for row in corpus.train]
    began = time.process_time()
    fitted = [
        make_pipeline(vectorizer, LogisticRegression(C=c, max_iter=2000)).fit(texts[0], labels) for c in (1, 3, 10, 30, 100)
    ]
    best = max(fitted, key=lambda one: macro_f1(corpus.validation, one.predict(texts[1])))
    seconds = time.process_time() - began
    return macro_f1(corpus.held_out, best.predict(texts[2])), seconds


# ------------------------------------------------------------------------------------------------------------ table ----
def show(corpus: Corpus, found: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over the seeds, and mean CPU-seconds."""
    rows = []
    for method, name in METHODS.items():
        cells = [name]
        for k in EXAMPLES_PER_CLASS:
            runs = [one for one in found if one["method"] == method and one["examplesPerClass"] == k]
            scores = [one["macroF1"] for one in runs]
            seconds = np.mean([one["cpuSeconds"] for one in runs])
            cells.append(f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f} ({seconds:.1f} s)")
        rows.append(cells)
    title = f"{corpus.name}: macro-F1 on {len(corpus.held_out)} held-out texts, mean ± standard deviation of {len(SEEDS)} seeds"
    print_table(f"{title} (CPU-seconds)", ["", *(f"{k} per class" for k in EXAMPLES_PER_CLASS)], rows)


if __name__ == "__main__":
    sys.exit(main())
