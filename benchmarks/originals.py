"""The training loop and the full gradient of the published code of arXiv 2311.08745 and 2402.02325,
for comparison.

Written from a description of what that code does, not from the code. In a training step: PIL images
through random crop with padding 4, horizontal flip, rotation up to 15 degrees, ToTensor and
Normalize, one image at a time in the two worker processes of a DataLoader; a float32 network in the
default memory layout, eager; torch.optim.SGD; the loss and the number of correct answers fetched as
Python numbers at every step. The network itself is ours, so that both loops compute the same thing.
Their progress bar and their tracker's call a step are left out, which favours them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

CIFAR100_MEAN = (0.5070751592371323, 0.48654887331495095, 0.4409178433670343)
CIFAR100_STD = (0.2673342858792401, 0.2564384629170883, 0.27615047132568404)


class Images(Dataset):
    """uint8 [n, 32, 32, 3] as PIL images, transformed one by one."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels, self.labels = pixels, labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(15),
                transforms.ToTensor(),
                transforms.Normalize(CIFAR100_MEAN, CIFAR100_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Originals:
    """One call is one step. `laps` sums the seconds spent in data and bookkeeping, forward and
    backward, update."""

    def __init__(
        self, net: nn.Module, pixels: np.ndarray, labels: np.ndarray, batch_size: int, lr: float
    ):
        self.net = net
        self.loader = DataLoader(
            Images(pixels, labels), batch_size=batch_size, shuffle=True, num_workers=2
        )
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        self.laps = {"data": 0.0, "gradient": 0.0, "update": 0.0}
        self.train_loss = 0.0
        self._steps = self._train()

    def __call__(self) -> None:
        next(self._steps)

    def _train(self) -> Iterator[None]:
        clock, laps = time.perf_counter, self.laps
        while True:  # one pass is one epoch
            self.net.train()
            self.train_loss, correct = 0.0, 0
            began = clock()
            for inputs, targets in self.loader:
                loaded = clock()
                self.optimizer.zero_grad()
                outputs = self.net(inputs)
                loss = self.criterion(outputs, targets)
                loss.backward()
                computed = clock()
                self.optimizer.step()
                updated = clock()
                self.train_loss += loss.item()
                _, predicted = outputs.max(1)
                correct += predicted.eq(targets).sum().item()
                laps["data"] += loaded - began + clock() - updated
                laps["gradient"] += computed - loaded
                laps["update"] += updated - computed
                yield
                began = clock()

    def check(self) -> None:
        if not math.isfinite(self.train_loss):
            raise FloatingPointError("the loss of the originals' loop is not finite")

    def close(self) -> None:
        self._steps.close()


class OriginalsFullGradient:
    """One call is one full gradient: a pass over shuffled chunks of augmented images, as `sampling`
    has it published.

    Args: net (a float32 network, run in the mode it is in), pixels uint8 [n, 32, 32, 3], labels int
    [n], chunk. Returns one tensor a trainable parameter. The sum of the chunks' mean gradients is
    divided by the number of chunks, which is wrong where `chunk` does not divide n: a short last
    chunk weighs as much as the others. Under BatchNorm in train mode every pass also moves the
    running statistics.
    """

    def __init__(self, net: nn.Module, pixels: np.ndarray, labels: np.ndarray, chunk: int = 1000):
        self.net, self.params = net, [p for p in net.parameters() if p.requires_grad]
        self.loader = DataLoader(
            Images(pixels, labels), batch_size=chunk, shuffle=True, num_workers=2
        )
        self.criterion = nn.CrossEntropyLoss()
        self._batches: Iterator | None = None

    def __call__(self) -> list[torch.Tensor]:
        full_grad = [torch.zeros_like(p) for p in self.params]
        self._batches = iter(self.loader)  # new workers at every pass
        for inputs, targets in self._batches:
            self.net.zero_grad()
            self.criterion(self.net(inputs), targets).backward()
            for i, p in enumerate(self.params):
                full_grad[i] += p.grad.clone()
        self._batches = None
        return [g / len(self.loader) for g in full_grad]

    def close(self) -> None:
        """Stop the workers of a pass that was interrupted."""
        self._batches = None
