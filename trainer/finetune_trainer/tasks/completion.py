"""CausalLM: supervised fine-tuning of a decoder on prompts with completions, or on chats. The loss is on what the model shall write."""

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from finetune_trainer.errors import TrainingFailure
from finetune_trainer.tables import BadRow
from finetune_trainer.tasks.base import (
    IGNORED,
    BadRowError,
    Evaluated,
    Examples,
    Floats,
    Row,
    TaskKind,
    normalised,
    text_of,
)
from finetune_trainer.tasks.encoded import Encoded, Ragged

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")


class Completion(TaskKind):
    """Cross entropy of the next token, on completions only."""

    auto_class = "AutoModelForCausalLM"
    options: ClassVar[dict[str, Any]] = {"use_cache": False}

    @property
    def columns(self) -> tuple[str, ...]:
        if self.dataset.messages_column is not None:
            return (self.dataset.messages_column,)
        assert self.dataset.prompt_column is not None
        assert self.dataset.completion_column is not None
        return (self.dataset.prompt_column, self.dataset.completion_column)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.columns[:1]

    def input(self, row: Row) -> Any:
        column = self.columns[0]
        if self.dataset.messages_column is None:
            return text_of(row, column)
        messages = row[column]
        if not isinstance(messages, list) or not messages:
            raise BadRowError(f"{column} is no list of messages")
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                raise BadRowError(f"{column} has a message whose role is none of {', '.join(ROLES)}")
            text_of(message, "content") if "content" in message else text_of({"content": None}, "content")
        return messages

    def target(self, row: Row) -> str:
        if self.dataset.messages_column is None:
            return text_of(row, self.columns[1])
        if not any(message["role"] == "assistant" for message in self.input(row)):
            raise BadRowError(f"{self.columns[0]} has no message of the assistant")
        return ""

    def key(self, text: Any, target: Any) -> str:
        return normalised([text, target])  # one prompt may stand before many completions

    def encode(self, examples: Examples, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Encoded:
        ids, labels, bad, cut = [], [], [], 0
        for i, (text, completion) in enumerate(zip(examples.texts, examples.labels, strict=True)):
            try:
                tokens, learned = chat(text, tokenizer) if isinstance(text, list) else pair(text, completion, tokenizer)
            except BadRowError as error:
                bad.append(BadRow(f"{examples.place(i)}: {error}"))
                continue
            if len(tokens) > max_length:
                cut += 1
                # What is to be learned stays: the beginning of the prompt goes, and then the end.
                first = next((k for k, t in enumerate(learned) if t != IGNORED), 0)
                start = min(len(tokens) - max_length, max(0, first - 1))
                tokens, learned = tokens[start : start + max_length], learned[start : start + max_length]
            ids.append(tokens)
            labels.append(learned)
        return Encoded(Ragged.of(ids), Ragged.of(labels), cut, bad=tuple(bad))

    def weights(self, data: Encoded) -> Floats:
        # The first token is nobody's next one.
        return np.array([np.count_nonzero(row[1:] != IGNORED) for row in data.labels], dtype=np.float64)

    def configure(self, config: "PretrainedConfig") -> None:
        """Everything stays as it was pretrained."""

    def keeps_head(self, config: "PretrainedConfig") -> bool:  # noqa: ARG002
        return True

    def loss(self, logits: "torch.Tensor", labels: "torch.Tensor", smoothing: float) -> "torch.Tensor":
        from torch.nn.functional import cross_entropy

        # Only what is learned in 32 bits: the vocabulary is wide.
        learned = labels[:, 1:] != IGNORED
        return cross_entropy(logits[:, :-1][learned].float(), labels[:, 1:][learned], reduction="sum", label_smoothing=smoothing)

    def width(self, data: Encoded) -> int:  # noqa: ARG002
        """The row's loss, and how many tokens were guessed right."""
        return 2

    def outputs(self, logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
        import torch
        from torch.nn.functional import cross_entropy

        ahead, following = logits[:, :-1].float().transpose(1, 2), labels[:, 1:]
        losses = cross_entropy(ahead, following, reduction="none", ignore_index=IGNORED).sum(dim=1)
        right = ((ahead.argmax(dim=1) == following) & (following != IGNORED)).sum(dim=1)
        return torch.stack([losses, right.float()], dim=1)

    def score(self, outputs: Floats, data: Encoded) -> Evaluated:
        count = max(1.0, float(self.weights(data).sum()))
        loss = float(outputs[:, 0].sum() / count)
        perplexity = float(np.exp(min(loss, 700.0)))
        return Evaluated({"loss": loss, "perplexity": perplexity, "token_accuracy": float(outputs[:, 1].sum() / count)})


def prompt_tokens(text: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Of a prompt, or of a chat that the assistant is to go on with. Raises BadRowError."""
    if isinstance(text, list):
        return _tokens(_rendered(text, tokenizer, prompt=True), tokenizer)[0]
    ids: list[int] = tokenizer(text)["input_ids"]
    # Some tokenizers close every text; here it goes on.
    return ids[:-1] if len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids


def pair(prompt: str, completion: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens and labels: prompt, completion, end of text."""
    before = prompt_tokens(prompt, tokenizer)
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        after = [*after, tokenizer.eos_token_id]
    return before + after, [IGNORED] * len(before) + after


def chat(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Tokens and labels of a chat: the labels are what the assistant says, up to the template's end of the message. Raises BadRowError."""
    text = _rendered(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            after = _rendered(messages[: i + 1], tokenizer)
            before = _rendered(messages[:i], tokenizer, prompt=True) if i else _opening(message, after, tokenizer)
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise BadRowError(_REWRITTEN)
            spans.append((len(before), len(after)))
    ids, starts = _tokens(text, tokenizer)
    return ids, [t if any(a <= at < b for a, b in spans) else IGNORED for t, at in zip(ids, starts, strict=True)]


def _opening(message: dict[str, str], rendered: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What the template writes before the text of a chat's first message where that is the assistant's: its own system prompt, and the
    header with which it would ask for an answer. No template renders the chat before that, which is empty."""
    header = _rendered([message], tokenizer, prompt=True).removeprefix(rendered)
    if header not in rendered:
        raise BadRowError(_REWRITTEN)
    return rendered[: rendered.index(header) + len(header)]


_REWRITTEN = "the model's chat template writes a message in another way when others follow"


def _rendered(messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase", *, prompt: bool = False) -> str:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise TrainingFailure(
            "RecipeInvalid",
            "dataset.messagesColumn: the model's tokenizer has no chat template; use promptColumn and completionColumn",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, TypeError) as error:  # its words may hold the data's
        raise BadRowError(
            "the model's chat template refuses the messages: some want roles to alternate, or know no system"
        ) from error


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Ids, and where in the text each begins. The template has written all special tokens itself."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return made["input_ids"], [start for start, _ in made["offset_mapping"]]
