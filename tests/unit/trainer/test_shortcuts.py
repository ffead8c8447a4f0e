"""What is left out inside stock models changes nothing; random numbers for dropout are what they should be."""

from typing import Any

import pytest
import torch
from trainer_kit import Job
from transformers import AutoConfig, AutoModelForSequenceClassification

from finetune_api.hyperparameters import Dropout
from finetune_trainer import model, shortcuts

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "pad_token_id": 1,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"]


def pair(family: str, **options: Any) -> tuple[Any, Any]:
    """The stock model, and the same one with our shortcuts."""
    config = AutoConfig.for_model(family, **TINY, **options)
    stock = AutoModelForSequenceClassification.from_config(config)
    ours = AutoModelForSequenceClassification.from_config(config)
    ours.load_state_dict(stock.state_dict())
    shortcuts.take(ours, attention_dropout=True)
    return stock, ours


def batch(*, padded: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 50, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        ids[2:, 6:], mask[2:, 6:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([0, 1, 2, 0, 1])).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_stock_model(family: str, padded: bool) -> None:
    stock, ours = pair(family, **NO_DROPOUT)
    inputs = batch(padded=padded)
    for each in (stock, ours):
        each.eval()
    torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, rtol=1e-5, atol=1e-6)
    for each in (stock, ours):
        each.train()
    expected, found = gradients(stock, inputs), gradients(ours, inputs)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_is_for_the_first_token_alone(family: str) -> None:
    _, ours = pair(family)
    shapes = []
    ours.base_model.encoder.layer[-1].register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
    ours(**batch())
    assert shapes == [(5, 1, 16)]


@pytest.mark.parametrize("family", ["distilbert", "albert", "mpnet", "deberta-v2", "modernbert"])
def test_other_families_keep_their_last_layer(family: str) -> None:
    config = AutoConfig.for_model(family, **TINY)
    model.set_dropout(config, Dropout(hidden=0.0))
    model.set_dropout(config, Dropout(attention=0.0))
    if family not in ("mpnet",):
        model.set_dropout(config, Dropout(classifier=0.0))
    stock = AutoModelForSequenceClassification.from_config(config)
    ours = AutoModelForSequenceClassification.from_config(config)
    ours.load_state_dict(stock.state_dict())
    shortcuts.take(ours, attention_dropout=True)
    expected, found = gradients(stock, batch()), gradients(ours, batch())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_keeps_the_mean(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(401, 501, requires_grad=True)
    y = shortcuts.dropped(x, rate)
    # Four standard deviations of so many draws.
    assert float((y == 0).float().mean()) == pytest.approx(rate, abs=4 * (rate * (1 - rate) / x.numel()) ** 0.5)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.detach())


def test_neighbours_in_one_draw_are_independent() -> None:
    torch.manual_seed(0)
    kept = (shortcuts.dropped(torch.ones(400_000), 0.3) > 0).float().view(-1, 4)
    assert torch.corrcoef(kept.T).fill_diagonal_(0).abs().max() < 0.01
    torch.testing.assert_close(kept.mean(0), torch.full((4,), 0.7), atol=0.01, rtol=0)


def test_dropout_draws_from_the_state_that_checkpoints_hold() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (shortcuts.dropped(torch.ones(100), 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(shortcuts.dropped(torch.ones(100), 0.5), first)


def test_attention_drops_weights_at_its_rate() -> None:
    torch.manual_seed(0)
    stock, ours = pair("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3, classifier_dropout=0.0)
    inputs = batch()
    assert ours.config._attn_implementation == shortcuts.ATTENTION
    means = []
    for each in (stock, ours):
        each.train()
        with torch.no_grad():
            logits = torch.stack([each(**inputs).logits for _ in range(1500)])
        means.append((logits.mean(0), logits.std(0)))
    (expected, spread), (found, other) = means
    torch.testing.assert_close(found, expected, rtol=0, atol=6 * float(spread.max()) / 1500**0.5)
    torch.testing.assert_close(other, spread, rtol=0.15, atol=1e-4)


def test_nothing_of_it_is_saved(job: Job) -> None:
    job.run()
    saved = (job.output / "model/config.json").read_text()
    assert "finetune" not in saved
    stock = AutoModelForSequenceClassification.from_pretrained(job.output / "model")
    assert stock.config._attn_implementation == "sdpa"
