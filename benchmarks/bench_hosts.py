"""What measuring costs in the training loop of each host: python -m benchmarks.bench_hosts
[--quick]

Case host/<host>/<model>/b<batch> is a training of `updates` updates of SGD with momentum on random
images, by that host: plain (a loop of its own), lightning, accelerate, transformers, or timm (a
loop shaped as that of timm's train.py, with its optimizer, schedule and meters). A network has
GroupNorm, so that per-sample gradients are measured. One call of a variant is a whole training by a
model that goes on from call to call; what the host does to begin and end one is in all of them.
Variants:

    off        the host alone
    every50    measured before the first of every 50 updates
    every10    of every 10
    every1     before each update

A host whose package is not installed is left out with a line that says so.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import timing
from benchmarks.timing import Variant
from fastsmooth import models
from fastsmooth.noise.online import NoiseTracker

CLASSES, SIZE = 100, 32
LR = 1e-3  # small, since all trainings are on the same images
EVERY = {"off": None, "every50": 50, "every10": 10, "every1": 1}
TESTS = ("test_hosts_matrix.py", "test_track.py")


@dataclass(frozen=True)
class Case:
    """Trainings by one host; a window has `steps` of them."""

    host: str
    model: str = "resnet20"
    batch_size: int = 32
    updates: int = 50
    steps: int = 1
    rounds: int = 6
    budget: float = 600.0  # seconds for all rounds
    lead: int = 0  # a training is long enough to be in the middle of a run
    ratio_to: str = "off"

    @property
    def name(self) -> str:
        return f"host/{self.host}/{self.model}/b{self.batch_size}"

    @property
    def units(self) -> int:
        return self.updates * self.batch_size

    def variants(self, names: Iterable[str]) -> list[Variant]:
        kept = [name for name in EVERY if name in names]
        return [Variant(name, Training, (self, EVERY[name])) for name in kept]


class Training:
    """A variant: one call is a training of so many updates."""

    def __init__(self, case: Case, every: int | None):
        # of the hosts, about devices, workers and outputs that nobody asked for
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.manual_seed(0)
        self.case, self.every = case, every
        self.model = models.build(case.model, CLASSES, "group")
        x = torch.randn(case.units, 3, SIZE, SIZE)
        self.images = TensorDataset(x, torch.randint(CLASSES, (case.units,)))
        self.train = HOSTS[case.host](self)

    def __call__(self) -> None:
        self.train()

    @property
    def loader(self) -> DataLoader:
        return DataLoader(self.images, self.case.batch_size)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9)

    @property
    def watching(self) -> dict[str, Any]:
        """Of a tracker."""
        return {"samples": len(self.images), "every": self.every, "loss": F.cross_entropy}


Call = Callable[[], None]


def plain(t: Training) -> Call:
    optimizer = t.optimizer()

    def train() -> None:
        noise = NoiseTracker(t.model, optimizer, **t.watching) if t.every else None
        for x, y in t.loader:
            if noise is not None:
                noise(x, y)
            F.cross_entropy(t.model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def timm(t: Training) -> Call:
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter

    optimizer = create_optimizer_v2(t.model, "momentum", lr=LR, weight_decay=1e-4)
    schedule = CosineLRScheduler(optimizer, t_initial=t.case.updates, t_in_epochs=False)

    def train() -> None:
        noise = NoiseTracker(t.model, optimizer, **t.watching) if t.every else None
        losses = AverageMeter()
        for update, (x, y) in enumerate(t.loader):
            if noise is not None:
                noise(x, y)
            loss = F.cross_entropy(t.model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(y))
            schedule.step_update(update, metric=losses.avg)

    return train


def accelerate(t: Training) -> Call:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(t.model, t.optimizer(), t.loader)

    def train() -> None:
        noise = None
        if t.every:
            from fastsmooth.adapters.accelerate import AcceleratedTracker

            noise = AcceleratedTracker(accelerator, model, optimizer, **t.watching)
        for x, y in loader:
            with accelerator.accumulate(model):
                if noise is not None:
                    noise(x, y)
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    return train


def lightning(t: Training) -> Call:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = t.model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return t.optimizer()

    module = Module()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    how: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1}
    how |= dict.fromkeys(off, False)

    def train() -> None:
        callbacks: list[Any] = []
        if t.every:
            from fastsmooth.adapters.lightning import NoiseCallback

            callbacks.append(NoiseCallback(**t.watching))
        L.Trainer(**how, callbacks=callbacks).fit(module, t.loader)

    return train


class Named(nn.Module):
    """A network as Transformers' Trainer calls one."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return loss | {"logits": logits}


def transformers(t: Training) -> Call:
    from transformers import Trainer, TrainingArguments

    folder, model = tempfile.TemporaryDirectory(), Named(t.model)
    how: dict[str, Any] = {"num_train_epochs": 1, "per_device_train_batch_size": t.case.batch_size}
    how |= {"optim": "sgd", "learning_rate": LR, "use_cpu": True, "max_grad_norm": 0.0}
    how |= {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(folder.name, **how)

    def collated(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        x, y = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(x), "labels": torch.stack(y)}

    def train(folder: Any = folder) -> None:  # which is there as long as this is
        trainer = Trainer(model, arguments, train_dataset=t.images, data_collator=collated)
        if t.every:
            from fastsmooth.adapters.transformers import NoiseCallback

            trainer.add_callback(NoiseCallback(trainer, **t.watching))
        trainer.train()

    return train


HOSTS: dict[str, Callable[[Training], Call]] = {
    "plain": plain,
    "lightning": lightning,
    "accelerate": accelerate,
    "transformers": transformers,
    "timm": timm,
}
CASES = tuple(Case(host) for host in HOSTS)
QUICK = tuple(
    Case(host, "resnet8", batch_size=4, updates=2, rounds=2, budget=0.0) for host in HOSTS
)


def needed(host: str) -> Iterator[str]:
    """The modules that a host needs and that are not there."""
    theirs = () if host == "plain" else (host,)
    ours = () if host in ("plain", "timm") else (f"fastsmooth.adapters.{host}",)
    return (name for name in (*theirs, *ours) if find_spec(name) is None)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    p = timing.arguments("What measuring gradient noise costs in the training loop of each host.")
    timing.add_selection(p, (case.name for case in CASES), EVERY)
    args = p.parse_args(argv)
    report = timing.Report("bench_hosts", argv, args.json, args.out)
    cases = timing.selected(p, args, CASES, QUICK)
    return timing.run_cases(
        report, args.quick, TESTS, cases, lambda case: bench(case, set(args.variants), report)
    )


def bench(case: Case, names: set[str], report: timing.Report) -> None:
    report.say(case.name)
    missing = list(needed(case.host))
    if missing:
        verb = "are" if missing[1:] else "is"
        report.say(f"  not measured: {' and '.join(missing)} {verb} not installed")
        return
    variants = case.variants(names | {case.ratio_to})
    found = timing.measure(variants, case.steps, case.rounds, case.lead, case.budget, report.say)
    timing.require_measured(case.name, found, [v.name for v in variants])
    about = {
        name: {
            "first_call_s": timing.rounded(m.first_step),
            "quartiles_s": [timing.rounded(m.percentile(q)) for q in (25, 75)],
        }
        for name, m in found.items()
    }
    result = timing.rows("bench_hosts", case.name, found, case.ratio_to, case.units)
    result = [row | {"quartiles_s": about[row["variant"]]["quartiles_s"]} for row in result]
    for line in timing.table(result, "images", found):
        report.say(line)
    for row in result:
        low, high = row["quartiles_s"]
        report.say(f"  {row['variant']}: half of the trainings took {low:g} to {high:g} s")
    report.add(case.name, result, {"variants": about})


if __name__ == "__main__":
    sys.exit(main())
