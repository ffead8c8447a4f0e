"""A user's own script, as it would be without us: Hugging Face's Trainer, which reports to Kubeflow's progress server by itself."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class Messages(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 100, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones(16, dtype=torch.long), "labels": (ids[0] > 50).long()}


config = BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, num_labels=2
)
arguments = TrainingArguments(
    output_dir="/workspace/out", num_train_epochs=12, per_device_train_batch_size=8, logging_steps=10, save_strategy="no"
)
Trainer(model=BertForSequenceClassification(config), args=arguments, train_dataset=Messages()).train()
