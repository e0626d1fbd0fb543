"""Gradient noise in a loop of accelerate, which accumulates the gradient over micro-batches."""

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastsmooth as fs
from fastsmooth.adapters.accelerate import AcceleratedTracker

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
images = fs.open_data("digits", device="cpu").train
train = TensorDataset(*next(images.batches([torch.arange(len(images))])))
model = fs.build_model("resnet8", 10, norm="group")
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loader = DataLoader(train, batch_size=16, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

noise = AcceleratedTracker(accelerator, model, optimizer, samples=len(train), every=15)
accelerator.register_for_checkpointing(noise)
for x, y in loader:
    with accelerator.accumulate(model):
        row = noise(x, y)  # for each micro-batch; a row with the last of an update
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    if row:
        c2, error, delta = row["c2_sampled"], row["c2_sampled_se"], row["delta_measured"]
        print(f"C2 {c2:.3g} +- {error:.2g}, delta {delta:.3g}")
