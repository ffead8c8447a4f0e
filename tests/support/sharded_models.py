"""`python -m support.sharded_models`, under torchrun: tiny models of all architectures, cut up among the processes, beside the same ones whole.

Prints a line of JSON for each: how far gradients and answers are from those of the whole model, and whether its weights, put together
again, are the same.
"""

import copy
import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from finetune_api.hyperparameters import Hyperparameters, Strategy
from finetune_trainer import layers, optim, sharding, snapshot
from finetune_trainer.dist import Group

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1}
DISTILBERT = {"vocab_size": 40, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
ARCHITECTURES = {
    "bert": SIZES,
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "distilbert": DISTILBERT,
    "deberta-v2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "electra": {**SIZES, "embedding_size": 8},
    "albert": {**SIZES, "embedding_size": 8, "num_hidden_groups": 1, "num_hidden_layers": 3},  # one layer, three times
    "modernbert": {**SIZES, "pad_token_id": 0, "global_attn_every_n_layers": 2},
    "mpnet": SIZES,
    "gpt2": {**GPT2, "eos_token_id": 2},
    "llama": {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
    "qwen2": {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
}
TIED = ("gpt2", "qwen2")


def build(name: str, *, decoder: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    more = {"tie_word_embeddings": True} if decoder else {"num_labels": 3}
    config = AutoConfig.for_model(name, **(ARCHITECTURES[name] | more))
    return (AutoModelForCausalLM if decoder else AutoModelForSequenceClassification).from_config(config).eval()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm((a - b).double()) / (torch.linalg.norm(b.double()) + 1e-12))


def compare(name: str, group: Group, *, decoder: bool) -> dict[str, object]:
    model = build(name, decoder=decoder)
    other = copy.deepcopy(model)
    hyper = Hyperparameters.model_validate({"freeze": {"layers": 1}})
    sharding.place(model, group, None)
    optimizers = [optim.build(m, hyper, 1e-3) for m in (model, other)]
    numbers = torch.Generator().manual_seed(1)
    answers, gradients = 0.0, 0.0
    for step in range(3):
        for m in (model, other):
            layers.set_trainable(m, hyper, 0)
            m.zero_grad()
        ids = torch.randint(4, 40, (2 * group.size, 7), generator=numbers)
        mask = torch.ones_like(ids)
        mask[::2, 5:] = 0
        if step:  # an evaluation comes in between, as in a training
            with torch.inference_mode():
                answers = max(answers, distance(model(ids, attention_mask=mask).logits, other(ids, attention_mask=mask).logits))
            sharding.close(model, group)
        share = model(group.share(ids), attention_mask=group.share(mask)).logits
        (share.square().sum() * group.size).backward()
        other(ids, attention_mask=mask).logits.square().sum().backward()
        norms = [optim.clip(m, 1.0) for m in (model, other)]
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        grads = [(sharding.full(p.grad), q.grad) for p, q in pairs if p.grad is not None and q.grad is not None]
        flat = [torch.cat([pair[i].flatten() for pair in grads]) for i in (0, 1)]
        gradients = max(gradients, distance(flat[0], flat[1]), abs(float(norms[0] / norms[1]) - 1))
        for optimizer in optimizers:
            optimizer.step()
    put = snapshot.weights(model, group)
    expected = other.state_dict()
    same = not group.leads or (
        put.keys() == expected.keys() and all(torch.allclose(put[n], expected[n], rtol=1e-3, atol=1e-5) for n in put)
    )
    tied = len({t.data_ptr() for t in put.values() if t.numel()}) < len([t for t in put.values() if t.numel()])
    cut = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    trained = {n: p.requires_grad for n, p in other.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    return {
        "name": name,
        "decoder": decoder,
        "answers": answers,
        "gradients": gradients,
        "weights": same,
        "tied": tied,
        "share": cut,
        "trained": trained,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = Group.join(Strategy.FSDP)
    for name in ARCHITECTURES:
        for decoder in (False, True) if name in TIED else (False,):
            line = json.dumps(compare(name, group, decoder=decoder))
            if group.leads:
                sys.stdout.write(line + "\n")
    torch.distributed.destroy_process_group()
