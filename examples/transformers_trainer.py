import tempfile

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import fastsmooth as fs
from fastsmooth.adapters.transformers import NoiseCallback

digits = fs.open_data("digits", device="cpu").train
x, y = next(digits.batches(torch.arange(len(digits)).split(len(digits))))
train = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]

torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=2, num_labels=10,
    )
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=1, per_device_train_batch_size=32, learning_rate=1e-3,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=train)
    trainer.add_callback(NoiseCallback(trainer, every=20))
    trainer.remove_callback(PrinterCallback)  # printed below instead
    trainer.train()
for row in trainer.state.log_history:
    if "noise/c2_sampled" in row:
        c2, error = row["noise/c2_sampled"], row["noise/c2_sampled_se"]
        norm = row["noise/grad_norm"]
        print(f"update {row['step']}: C2 {c2:.3g} +- {error:.2g}, gradient norm {norm:.3g}")
