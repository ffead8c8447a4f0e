"""A tiny model and data that it can learn, made in the test: no download, a second to train."""

import csv
import json
import random
from pathlib import Path

WORDS = {
    "negative": ["bad", "awful", "late", "broken", "rude"],
    "neutral": ["order", "address", "when", "change", "invoice"],
    "positive": ["good", "fine", "quick", "great", "kind"],
}
TAGS = {"negative": "COMPLAINT", "neutral": "TOPIC", "positive": "PRAISE"}
FILLER = ["the", "a", "it", "was", "is", "my", "your", "and", "so", "very"]


def tiny_classifier(folder: Path) -> Path:
    """A randomly initialised BERT (about 30,000 parameters) with a word-level tokenizer, as a from_pretrained folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(w for group in WORDS.values() for w in group)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def tiny_decoder(folder: Path) -> Path:
    """A randomly initialised Llama with the same words."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_classifier(folder))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, eos_token_id=3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_tasks(path: Path, count: int, seed: int) -> Path:
    """A jsonl file with what each task asks for: label, score (from -1 to 1), words and tags, prompt and completion."""
    score = {"negative": -1, "neutral": 0, "positive": 1}
    kind_of = {word: kind for kind, words in WORDS.items() for word in words}
    with path.open("w") as file:
        for text, label in rows(count, seed):
            words = text.split()
            tags = [f"B-{TAGS[kind_of[word]]}" if word in kind_of else "O" for word in words]
            line = {"text": text, "label": label, "score": score.get(label, 0), "words": words, "tags": tags}
            file.write(json.dumps({**line, "prompt": text, "completion": WORDS[label][0]}) + "\n")
    return path


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) pairs; the label is what most of the telling words say."""
    chance = random.Random(seed)
    out = []
    for i in range(count):
        label = list(WORDS)[i % 3]
        words = chance.choices(WORDS[label], k=2) + chance.choices(FILLER, k=chance.randint(1, 8))
        chance.shuffle(words)
        out.append((" ".join(words), label))
    return out


def write_split(path: Path, count: int, seed: int) -> Path:
    """A csv file with the columns text and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows(count, seed))
    return path
