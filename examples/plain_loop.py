"""Gradient noise in a training loop of your own, whose updates have two micro-batches each."""

import torch
from torch.nn import functional as F

import fastsmooth as fs

torch.manual_seed(0)
data = fs.open_data("digits", device="cpu")
train = data.train
model = fs.build_model("resnet8", data.classes, norm="group")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
noise = fs.NoiseTracker(model, optimizer, samples=len(train), every=20)

for epoch in range(3):
    parts = train.batches(torch.randperm(len(train)).split(32), epoch)
    for first, second in zip(parts, parts, strict=False):
        xs, ys = zip(first, second, strict=True)
        row = noise(xs, ys)  # before the update; None where none is due
        for x, y in (first, second):
            (F.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        if row:
            c2, error, delta = row["c2_sampled"], row["c2_sampled_se"], row["delta_measured"]
            print(f"epoch {epoch}: C2 {c2:.3g} +- {error:.2g}, delta {delta:.3g}")
