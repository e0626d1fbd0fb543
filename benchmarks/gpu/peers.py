"""Training loops as others write them, of the same network, for the claim beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.gpu import product
from benchmarks.gpu.images import random_images
from benchmarks.originals import CIFAR100_MEAN, CIFAR100_STD, Images
from fastsmooth import models

LR, BETA = 0.01, 0.9
PAD = 4  # pixels of border that a crop may take in


class Ours(product.Trainer):
    """fastsmooth.train with these flags on random images."""

    def __init__(self, flags: list[str], images: int):
        super().__init__(flags, random_images(images, tests=250))


class Peer:
    """What the two loops share: the network, channels last, under bfloat16 autocast on a GPU."""

    differs = ""
    lead = 3  # as ours

    def __init__(self, model: str, batch_size: int, images: int, device: str):
        self.batch_size, self.device = batch_size, torch.device(device)
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True  # as both recipes have it
        self.model = models.build(model, 100).to(self.device).to(memory_format=torch.channels_last)
        self.split = random_images(images, tests=1).train
        self.batches = self.forever()
        self.total = torch.zeros((), device=self.device)  # of the losses

    def loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(x)
        return F.cross_entropy(logits.float(), y)

    def advance(self, updates: int) -> int:
        for _ in range(updates):
            self.update(*next(self.batches))
        return updates

    def call(self, function: Callable[[], Any]) -> None:
        function()

    def facts(self) -> dict[str, Any]:
        if not self.total.isfinite():
            raise FloatingPointError("the loss is not finite")
        return {"differs": self.differs}

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def update(self, x: Tensor, y: Tensor) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class LoaderLoop(Peer):
    """The ordinary recipe: DataLoader, per-sample transforms, eager, autocast, SGD."""

    differs = "crop, flip and rotation in PIL by the workers; the loss is never fetched"

    def __init__(self, model: str, batch_size: int, images: int, device: str, workers: int):
        super().__init__(model, batch_size, images, device)
        self.workers = workers
        self.lead += 3 * workers  # batches that they have ready from before
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR, BETA)

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        gpu = self.device.type == "cuda"
        loader = DataLoader(
            Images(self.split.pixels, self.split.labels),
            self.batch_size,
            shuffle=True,
            num_workers=self.workers,
            pin_memory=gpu,
            persistent_workers=self.workers > 0,
        )
        while True:
            for x, y in loader:
                x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                yield x, y.to(self.device, non_blocking=True)

    def update(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(x, y)
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()

    def close(self) -> None:
        self.batches.close()


class ResidentLoop(Peer):
    """After KellerJordan/cifar10-airbench: the data as one tensor on the device, augmented an epoch
    at a time; batches of one size, the last partial one dropped; reduce-overhead; fused SGD."""

    differs = (
        "crop and flip without rotation, drawn for an epoch at a time; partial batches dropped"
    )

    def __init__(self, model: str, batch_size: int, images: int, device: str):
        super().__init__(model, batch_size, images, device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), LR, BETA, fused=True)
        self.forward = self.loss_of
        if self.device.type == "cuda":
            self.forward = torch.compile(self.loss_of, mode="reduce-overhead", dynamic=False)
        mean, std = (
            torch.tensor(v, device=self.device)[:, None, None]
            for v in (CIFAR100_MEAN, CIFAR100_STD)
        )
        pixels = torch.from_numpy(self.split.pixels).to(self.device).permute(0, 3, 1, 2)
        normal = (pixels / 255 - mean) / std
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        padded = F.pad(normal, (PAD,) * 4, "reflect").to(dtype)
        self.padded = padded.permute(0, 2, 3, 1).contiguous()  # [N, 40, 40, 3]
        self.labels = torch.from_numpy(self.split.labels).to(self.device)

    def epoch(self) -> Tensor:
        """All images, each cropped and flipped: [N, 32, 32, 3]."""
        count = len(self.labels)
        shift = torch.randint(0, 2 * PAD + 1, (2, count, 1), device=self.device)
        places = torch.arange(32, device=self.device)
        rows, columns = places + shift[0], places + shift[1]
        flipped = torch.rand(count, 1, device=self.device) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        samples = torch.arange(count, device=self.device)[:, None, None]
        return self.padded[samples, rows[:, :, None], columns[:, None, :]]

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            images = self.epoch()
            order = torch.randperm(len(self.labels), device=self.device)
            for index in order.split(self.batch_size):
                if len(index) == self.batch_size:
                    yield images[index].permute(0, 3, 1, 2), self.labels[index]

    def update(self, x: Tensor, y: Tensor) -> None:
        loss = self.forward(x, y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.total += loss.detach()
