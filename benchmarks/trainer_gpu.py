"""The GPU part of `make bench-trainer`: ours beside Hugging Face's Trainer, with and without torch.compile. trainer.py calls it where there
is a CUDA GPU; `python benchmarks/trainer_gpu.py` runs it alone, with `--device cpu --tiny` as a check of everything but CUDA.

Two models: MiniLM classifies, and a decoder of Qwen2-0.5B's shape with random weights (494M parameters) learns to write texts. All cases
have the same model, tokens, batch size and number of epochs, one GPU and a process of their own; they take turns. The first epoch warms up
and is outside the clock, with all compilation (its caches are empty each time); so are tokenising, evaluation and saving.

- hf default: TrainingArguments as they are (fp32);
- hf tuned: 16 bits, batches of like length, fused AdamW, workers that stay, pinned memory; our learning rate;
- hf tuned, compile: the same with torch_compile;
- ours: no hyperparameter said but epochs;
- ours, compile: the same with `compile: true`.

Memory is the peak of torch's allocator in the clock. The share of time that the GPU idles is of a run of its own, since a profiler costs
time: 1 - (what the intervals of all kernels cover together, without copies) / (seconds of the clock), over WINDOW steps, by torch.profiler.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common
import torch
from clocks import ON_GPU, Clock, DeviceClock, ProfileClock

BATCH_SIZE, EPOCHS, MAX_LENGTH = 32, 4, 128
WARMUP, WINDOW = 100, 20
"""Steps of a run with a profiler."""
VALIDATION_ROWS = 200
MODELS = {"minilm": 2e-4, "decoder": 2e-5}
"""And their learning rate (ours by default)."""
CASES = ("hf default", "hf tuned", "hf tuned, compile", "ours", "ours, compile")
PAIRS = (
    ("ours_vs_hf_default", "ours", "hf default"),
    ("ours_vs_hf_tuned", "ours", "hf tuned"),
    ("ours_compile_vs_hf_tuned_compile", "ours, compile", "hf tuned, compile"),
)
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
QWEN2, TINY = (151936, 896, 4864, 24, 14, 2), (8192, 96, 256, 2, 4, 2)
END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Work:
    """What a process of its own has to do."""

    model: str
    case: str
    seed: int
    source: str
    """Folder of the model."""
    folder: str
    """With the data, and for all that is written."""
    profiled: tuple[int, int] | None = None
    """Steps before and with the profiler, in place of whole epochs with a clock."""


# ----------------------------------------------------------------------------------------------------------- one case ----
def run(work: Work) -> dict[str, Any]:
    """One run of one case, in this process."""
    clock = ProfileClock(work.profiled[1], work.folder) if work.profiled else DeviceClock(EPOCHS)
    rows, loss, passes = (ours if work.case.startswith("ours") else hugging_face)(work, clock)
    device = torch.cuda.get_device_name() if ON_GPU else common.machine()
    return {**clock.found(), "rows": rows, "validation_loss": loss, "passes": passes, "device": device}


def recipe_of(work: Work) -> dict[str, Any]:
    """Ours: nothing said but what all cases share. Evaluation is at the end alone."""
    hyper: dict[str, Any] = {"epochs": EPOCHS, "batchSize": BATCH_SIZE, "seed": work.seed}
    if work.case.endswith("compile"):
        hyper["compile"] = True
    if work.profiled:
        hyper["maxSteps"] = sum(work.profiled)
    dataset: dict[str, Any] = {"uri": f"file://{work.folder}/data", "maxLength": MAX_LENGTH}
    if work.model == "decoder":  # a text to a label, so that most tokens are learned
        dataset |= {"promptColumn": "label", "completionColumn": "text"}
    else:
        dataset |= {"labels": common.LABELS}
    return {
        "task": "CausalLM" if work.model == "decoder" else "SequenceClassification",
        "model": {"uri": f"file://{work.source}"},
        "dataset": dataset,
        "hyperparameters": hyper,
        "evaluation": {"everyEpochs": EPOCHS},
    }


def ours(work: Work, clock: Clock) -> tuple[int, float, int]:
    """Training rows, validation loss, and in how many passes a batch was computed."""
    loop, result = common.run_ours(Path(work.folder), recipe_of(work), clock)
    loss = next(float(m.value) for m in result.metrics if m.name == "validation/loss")
    return len(loop.train_data), loss, -(-BATCH_SIZE // loop.fit.at_once)


def hugging_face(work: Work, clock: Clock) -> tuple[int, float, int]:
    """The same of Trainer, on the very tokens that ours would train on."""
    import transformers
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding

    from finetune_api import Recipe
    from finetune_api.hyperparameters import Precision
    from finetune_trainer.config import Runtime
    from finetune_trainer.gradient import resolve
    from finetune_trainer.splits import read_splits
    from finetune_trainer.tasks import kind_of

    recipe = Recipe.model_validate({**recipe_of(work), "output": {"storageUri": f"file://{work.folder}/none"}})
    kind, tokenizer = kind_of(recipe.task, recipe.dataset), AutoTokenizer.from_pretrained(work.source)
    splits, _ = read_splits(recipe, Runtime("bench", Path(work.folder) / "hf"), print)

    def rows_of(split: str) -> list[dict[str, Any]]:
        made = kind.encode(splits[split], tokenizer, MAX_LENGTH)
        return [
            {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()}
            for ids, labels in zip(made.ids, made.labels, strict=True)
        ]

    transformers.set_seed(work.seed)
    head = {} if work.model == "decoder" else {"num_labels": len(common.LABELS)}
    model = getattr(transformers, kind.auto_class).from_pretrained(work.source, dtype=torch.float32, **head)
    collate = DataCollatorForSeq2Seq(tokenizer) if work.model == "decoder" else DataCollatorWithPadding(tokenizer)
    arguments: dict[str, Any] = {"per_device_train_batch_size": BATCH_SIZE, "num_train_epochs": EPOCHS, "seed": work.seed}
    if work.profiled:
        arguments["max_steps"] = sum(work.profiled)
    if work.case.startswith("hf tuned"):
        precision = resolve(Precision.AUTO, torch.device("cuda" if ON_GPU else "cpu"))
        arguments |= {
            "bf16": precision is Precision.BF16,
            "fp16": precision is Precision.FP16,
            "train_sampling_strategy": "group_by_length",
            "optim": "adamw_torch_fused",
            "dataloader_pin_memory": True,
            "dataloader_num_workers": min(4, os.cpu_count() or 1),
            "dataloader_persistent_workers": True,
            "logging_nan_inf_filter": False,  # it waits for the GPU in every step
            "learning_rate": MODELS[work.model],
            "torch_compile": work.case.endswith("compile"),
        }
    train = rows_of("train")
    trainer = common.run_hugging_face(Path(work.folder), model, collate, train, arguments, clock)
    return len(train), float(trainer.evaluate(rows_of("validation"))["eval_loss"]), 1


def make_decoder(folder: Path, texts: list[str], shape: tuple[int, ...]) -> Path:
    """A decoder with random weights, and a tokenizer made of the texts. Its vocabulary stays as wide as the shape says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(vocab_size=8192, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, learner)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(zip(SHAPE, shape, strict=True))
    config = AutoConfig.for_model("qwen2", **sizes, tie_word_embeddings=True, eos_token_id=0, bos_token_id=None, pad_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- compare ----
def measure(work: Work, device: str) -> dict[str, Any]:
    """One run in a process of its own, on the first GPU that is visible here; nothing is compiled yet."""
    with tempfile.TemporaryDirectory(dir=work.folder) as cache:
        environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        if device == "cpu":
            environment |= {**common.ONE_THREAD, "CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        else:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return dict(common.in_own_process(__file__, ["--work", json.dumps(asdict(work))], environment))


def measure_all(
    corpus: common.Corpus, mirror: Path, repeats: int, device: str = "cuda", models: Iterable[str] = MODELS, *, tiny: bool = False
) -> dict[str, Any]:
    """Prints a table for each model; rows, gpu_ratios and the GPU's name for build/bench/trainer.json."""
    corpus = replace(corpus, validation=corpus.validation[:VALIDATION_ROWS], held_out=corpus.held_out[:VALIDATION_ROWS])
    profiled = (6, 2) if tiny else (WARMUP, WINDOW)
    result: dict[str, Any] = {"torch": torch.__version__, "rows": [], "gpu_ratios": {}}
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        corpus.write(Path(scratch) / "data")
        for model in models:
            source = mirror / "sentence-transformers/all-MiniLM-L6-v2"
            if model == "decoder":
                source = make_decoder(Path(scratch) / "decoder", [r["text"] for r in corpus.train], TINY if tiny else QWEN2)
            runs: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
            for repeat, case in common.turns(CASES, repeats):
                found = measure(Work(model, case, repeat, str(source), scratch), device)
                found["rate"] = found["rows"] / found["seconds"]
                runs[case].append(found)
                print(f"{model} {case:18} seed {repeat}: {found['rate']:8.1f} samples/s", flush=True)
            idle = {case: measure(Work(model, case, 0, str(source), scratch, profiled), device)["idle_share"] for case in CASES}
            where = "gpu" if device == "cuda" else device
            rows = [row(f"{where} {model} {case}", runs[case], idle[case]) for case in CASES]
            result["gpu"] = runs[CASES[0]][0]["device"]
            show(f"{model} on {result['gpu']}, {len(corpus.train)} {corpus.name}, {repeats} repeats", rows)
            rates = {f"{model} {case}": [m["rate"] for m in measured] for case, measured in runs.items()}
            pairs = [(f"{model}_{name}", f"{model} {of}", f"{model} {to}") for name, of, to in PAIRS]
            result["rows"] += rows
            result["gpu_ratios"] |= common.ratios(rates, pairs)
    return result


def row(name: str, measured: list[dict[str, Any]], idle: float) -> dict[str, Any]:
    """Means over the repeats. The first epoch takes longer than a later one by what it takes to get going, and to compile."""
    rates = [m["rate"] for m in measured]
    return {
        "name": name,
        "samples_per_second": statistics.fmean(rates),
        "samples_per_second_all": rates,
        "peak_gpu_mib": max(m["peak_mib"] for m in measured),
        "gpu_idle_share": idle,
        "first_epoch_extra_seconds": statistics.fmean(m["first_epoch"] - m["seconds"] for m in measured),
        "graphs_compiled_in_clock": max(m["graphs"] for m in measured),
        "passes_per_batch": max(m["passes"] for m in measured),
        "validation_loss": statistics.fmean(m["validation_loss"] for m in measured),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The table."""
    columns = {
        "samples/s": ("samples_per_second", ".1f"),
        "peak MiB": ("peak_gpu_mib", ".0f"),
        "idle": ("gpu_idle_share", ".3f"),
        "first epoch +s": ("first_epoch_extra_seconds", ".1f"),
        "validation loss": ("validation_loss", ".4f"),
    }
    cells = [(str(r["name"]), *(format(r[key], shape) for key, shape in columns.values())) for r in rows]
    common.print_table(title, ("", *columns), cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="training rows (default: 3000; tiny: 96)")
    parser.add_argument("--repeats", type=int, help="runs of each case, each with a seed of its own (default: 5; tiny: 1)")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="models to train")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a decoder of 1M parameters and a few steps: tells whether all works")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.work:
        print(json.dumps(run(Work(**json.loads(said.work)))))
        return 0
    if said.device == "cuda" and not ON_GPU:
        print("there is no CUDA GPU here (--device cpu --tiny checks everything else)", file=sys.stderr)
        return 1
    sys.path.append(str(common.ROOT / "hack"))
    import minilm

    corpus = common.load_airline_or_feedback()
    corpus = replace(corpus, train=corpus.train[: said.rows or (96 if said.tiny else 3000)], validation=corpus.held_out)
    repeats = said.repeats or (1 if said.tiny else 5)
    result = measure_all(corpus, minilm.ensure(), repeats, said.device, said.models, tiny=said.tiny)
    print(common.write_json("trainer_gpu_check" if said.device == "cpu" or said.tiny else "trainer_gpu", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
