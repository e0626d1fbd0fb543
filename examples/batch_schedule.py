"""A schedule of the papers in a plain loop: the batches of a DataLoader, the lr of an optimizer."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastsmooth as fs

torch.manual_seed(0)
data = fs.open_data("digits", device="cpu")
n = len(data.train)
train = TensorDataset(*next(data.train.batches([torch.arange(n)])))
model = fs.build_model("resnet8", data.classes, norm="group")
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
schedule = fs.Schedule("hybrid", epochs=5, lr=0.05, batch_size=32, optimizer="shb", momentum=0.9)

batches = fs.BatchSchedule(schedule, n, seed=0)
loader = DataLoader(train, batch_sampler=batches, num_workers=2, multiprocessing_context="fork")
scheduler = fs.torch_lr_scheduler(optimizer, schedule, samples=n)
noise = fs.NoiseTracker(model, optimizer, samples=n, every="1ep")
for epoch in range(batches.epoch, schedule.epochs):
    for x, y in loader:
        row = noise(x, y, batches.point)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if row:
            print(
                f"epoch {epoch}: {len(loader)} batches of {len(x)}, lr {batches.point.lr:.4f}, "
                f"C2 {row['c2_sampled']:.3g}, delta {row['delta_measured']:.3g}"
            )
        scheduler.step()
        batches.step()  # after each batch that was trained on
    noise.end_epoch()
