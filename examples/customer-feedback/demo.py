"""`make demo`: fine-tunes a real pretrained model on the shipped customer feedback, the way a person would with `finetune`.

Everything goes below build/demo. The bucket is a folder (--s3-root), the model hub is a mirror (hack/minilm.py). The test split is scored
once, beside two baselines; nothing here was tuned on it.
"""

# ruff: noqa: T201  (it talks to people)
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline, make_union
from threadpoolctl import threadpool_limits

from finetune_api.manifest import load_yaml
from finetune_trainer import metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/demo"
BUCKET = BUILD / "s3/customer-feedback"
MANIFEST = HERE / "finetunejob.yaml"
SWEEP = HERE.parent / "few-shot/sweep.yaml"
MODEL = BUCKET / "models/sentiment/model"
FINETUNE = Path(sys.executable).parent / "finetune"
LABELS = ["negative", "neutral", "positive"]
NEW_SENTENCES = (
    "The courier left the parcel in the rain and nobody answers my emails.",
    "Could you tell me which documents I need to change my address?",
    "Honestly the best support I have had in years, thank you Maria!",
)
RESAMPLES = 1000


def main() -> int:
    """The whole demo; 0, or the exit code of the step that failed."""
    began = time.monotonic()
    say("1. The pretrained model")
    mirror = subprocess.run(
        [sys.executable, ROOT / "hack/minilm.py"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    print(f"model mirror: {mirror}")

    say("2. The data, as the bucket s3://customer-feedback")
    if BUCKET.parent.exists():
        print(f"removing the last demo's bucket and models: {BUCKET.parent}")
        shutil.rmtree(BUCKET.parent)
    shutil.copytree(HERE / "data", BUCKET / "data")
    places: tuple[str | Path, ...] = ("--s3-root", BUCKET.parent)
    finetune("validate", "-f", MANIFEST, *places)

    say("3. Fine-tuning")
    finetune("run", "-f", MANIFEST, *places, "--workdir", BUILD / "work", "--model-mirror", mirror)

    say("4. The test split, beside two baselines")
    result = compare()

    say("5. New sentences")
    finetune("predict", "--model", MODEL, *NEW_SENTENCES)

    result["seconds"] = round(time.monotonic() - began, 1)
    write(result)

    say(f"6. Fewer examples ({result['seconds']:.0f} s so far): a sweep beside the defaults, with 32 messages of each kind")
    result["sweep"] = search(*places, "--model-mirror", mirror)
    result["sweep"]["seconds"] = round(time.monotonic() - began - result["seconds"], 1)
    write(result)
    say(f"Done in {time.monotonic() - began:.0f} s: {BUILD / 'result.json'}")
    return 0


def write(result: dict[str, Any]) -> None:
    (BUILD / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def say(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def finetune(*arguments: str | Path, capture: bool = False) -> str:
    """Runs the command as a person would; what it printed, if captured. Ends the demo where it fails."""
    command = [str(a) for a in arguments]
    if not capture:
        print(f"$ finetune {' '.join(a if ' ' not in a else repr(a) for a in command)}", flush=True)
    done = subprocess.run([FINETUNE, *command], stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout or ""


# -------------------------------------------------------------------------------------------------------------- sweep ----
def search(*places: str | Path) -> dict[str, Any]:
    """Searches; then the sweep's best and its first trial, which has the defaults, on the test split."""
    shutil.rmtree(BUILD / "work-sweep", ignore_errors=True)
    finetune("run", "-f", SWEEP, *places, "--workdir", BUILD / "work-sweep")
    first = BUCKET / "sweeps/few-shot/few-shot-t0000/model"
    if not first.is_dir():
        first = alone(*places)

    test = read("test")
    truth = ids(row["label"] for row in test)
    defaults, found = predictions(first), predictions(BUCKET / "models/few-shot-best/model")
    before, after = macro_f1(truth, defaults), macro_f1(truth, found)
    samples = resamples(len(truth))
    low, high = interval(np.array([macro_f1(truth[s], found[s]) - macro_f1(truth[s], defaults[s]) for s in samples]))
    verdict = "the sweep found a better model" if after > before else "the sweep did not find a better model"
    print(f"test macro-F1: defaults {before:.3f}, the sweep's best {after:.3f}: {verdict}")
    print(f"({after - before:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, paired, {RESAMPLES} resamples)")
    return {"defaults_macro_f1": before, "macro_f1": after, "difference_interval": [low, high]}


def alone(*places: str | Path) -> Path:
    """Trains the sweep's template as it is, to its end: the first trial was stopped early. The model's folder."""
    (sweep,) = load_yaml(SWEEP.read_text())
    spec = sweep["spec"]["trialTemplate"]["spec"]
    job = {"apiVersion": sweep["apiVersion"], "kind": "FineTuneJob", "metadata": {"name": "few-shot-defaults"}}
    job["spec"] = {**spec, "output": {"storageUri": "s3://customer-feedback/models/few-shot-defaults"}}
    manifest = BUILD / "few-shot-defaults.yaml"
    manifest.write_text(yaml.safe_dump(job))
    finetune("run", "-f", manifest, *places, "--workdir", BUILD / "work-defaults")
    return BUCKET / "models/few-shot-defaults/model"


# ---------------------------------------------------------------------------------------------------------- baselines ----
def compare() -> dict[str, Any]:
    """Scores of model and baselines on the test split, with intervals; prints them as a table."""
    train, test = read("train"), read("test")
    truth = ids(row["label"] for row in test)
    majority = max(LABELS, key=[row["label"] for row in train].count)
    guesses = {
        "fine-tuned MiniLM": predictions(MODEL),
        "TF-IDF + logistic regression": ids(tfidf(train).predict([row["text"] for row in test])),
        f"always {majority!r}": ids([majority] * len(test)),
    }
    samples = resamples(len(truth))
    resampled = {name: np.array([macro_f1(truth[s], guess[s]) for s in samples]) for name, guess in guesses.items()}
    print(f"{'':30} accuracy  macro-F1  95% interval")
    for name, guess in guesses.items():
        low, high = interval(resampled[name])
        print(f"{name:30} {np.mean(truth == guess):8.3f}  {macro_f1(truth, guess):8.3f}  {low:.3f} to {high:.3f}")
    ours, tfidf_name, majority_name = guesses
    gap = resampled[ours] - resampled[tfidf_name]
    low, high = interval(gap)
    difference = macro_f1(truth, guesses[ours]) - macro_f1(truth, guesses[tfidf_name])
    print(f"macro-F1 above TF-IDF: {difference:+.3f} (95% interval {low:+.3f} to {high:+.3f}, paired, {RESAMPLES} resamples)")
    return {
        "accuracy": float(np.mean(truth == guesses[ours])),
        "macro_f1": macro_f1(truth, guesses[ours]),
        "macro_f1_interval": interval(resampled[ours]),
        "baseline_macro_f1": macro_f1(truth, guesses[tfidf_name]),
        "baseline_macro_f1_interval": interval(resampled[tfidf_name]),
        "majority_macro_f1": macro_f1(truth, guesses[majority_name]),
        "difference": difference,
        "difference_interval": interval(gap),
        "test_examples": len(test),
        "model_dir": str(MODEL),
    }


def predictions(model: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    said = finetune("predict", "--model", model, "--file", HERE / "data/test.csv", "-o", "json", capture=True)
    return ids(p["label"] for p in json.loads(said))


def resamples(rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Row numbers of bootstrap samples, the same for all models: (RESAMPLES, rows)."""
    return np.random.Generator(np.random.PCG64(0)).integers(0, rows, (RESAMPLES, rows))


def read(split: str) -> list[dict[str, str]]:
    with (HERE / f"data/{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def ids(labels: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([LABELS.index(label) for label in labels], dtype=np.int64)


def macro_f1(truth: np.ndarray[Any, np.dtype[np.int64]], guess: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    rows = metrics.per_class(metrics.confusion(truth, guess, len(LABELS)), LABELS)
    return float(np.mean([row["f1"] for row in rows]))


def interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """The middle 95 % of bootstrap values."""
    return [float(v) for v in np.quantile(values, (0.025, 0.975))]


def tfidf(train: list[dict[str, str]]) -> GridSearchCV:
    """Words and character n-grams into a logistic regression; its C by cross-validation on the training data."""
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    # The folds' features are kept for all values of C; more threads than work only wait for each other.
    with tempfile.TemporaryDirectory() as memory, threadpool_limits(1):
        search = GridSearchCV(
            make_pipeline(features, LogisticRegression(max_iter=2000), memory=memory),
            {"logisticregression__C": [1, 3, 10, 30, 100, 300]},
            scoring="f1_macro",
            cv=StratifiedKFold(5, shuffle=True, random_state=0),
        )
        return search.fit([row["text"] for row in train], [row["label"] for row in train])


if __name__ == "__main__":
    sys.exit(main())
