"""Gradient noise in Lightning: a callback that measures in Trainer.fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth.adapters.common import Numbers, Watch, pair_of
from fastsmooth.noise.losses import Loss, NotCovered
from fastsmooth.noise.online import Every, NoiseTracker, unwrapped

try:
    from lightning.pytorch import Callback
except ImportError:  # the same under its other name; its Trainer takes callbacks of either
    from pytorch_lightning import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

PRECISIONS = ("64-true", "32-true", "bf16-true", "16-mixed", "bf16-mixed")


class NoiseCallback(Callback):
    """Measures the gradient noise of a fit, and writes it to the trainer's loggers as noise/...,
    at the number of updates before the measured one.

        Trainer(callbacks=[NoiseCallback(every=50)])

    What is measured is the gradient of loss(network(x), y), whatever else training_step does.

    Args:
        every, options: as NoiseTracker has them.
        loss: as NoiseTracker has it: the one of training_step.
        samples: in the training set; None: those of the training DataLoader's dataset.
        model: the name of the submodule that is the network, as get_submodule takes it; "": the
            LightningModule itself, by its forward().
        batch: batch(batch) gives x [B, ...] and y [B, ...] of what training_step gets, on its
            device; None: batches are such pairs.

    In a row the batch is that of an update: all its micro-batches, of all processes. The gradient
    is that before it is clipped; delta_measured is None where it is clipped. `watch.noise` is the
    NoiseTracker, from the start of the training on; its state is part of every checkpoint.

    Raises ValueError for an `every` that there is not, and TypeError for an unknown option. When
    the training begins the callback raises ValueError as NoiseTracker does, and NotCovered, a
    ValueError, for what it cannot measure: manual optimization, a step that takes dataloader_iter,
    sharded parameters, a precision that is not of PRECISIONS, no optimizer, no forward(), a dataset
    without a length and no `samples`.
    """

    def __init__(
        self,
        *,
        every: int | str = 50,
        loss: Loss = F.cross_entropy,
        samples: int | None = None,
        model: str = "",
        batch: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        **options: Any,
    ):
        # refused here, where it was written
        Every.parse(every)
        inspect.signature(NoiseTracker).bind_partial(**options)
        self.options = {"every": every, "loss": loss, **options}
        self.samples, self.model, self.batch = samples, model, batch
        self.watch: Watch | None = None
        self.state: dict[str, Any] = {}  # of a checkpoint, until the training begins
        self.current: Any = None  # the batch of the step that is under way

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check(trainer, pl_module)
        network, ranks = unwrapped(trainer.strategy.model)
        if ranks.world != trainer.world_size:
            raise NotCovered(
                f"{type(trainer.strategy).__name__}: {trainer.world_size} processes share every "
                "batch, but not by DistributedDataParallel: use strategy='ddp'"
            )
        clips = bool(
            trainer.gradient_clip_val or overrides(pl_module, "configure_gradient_clipping")
        )
        noise = NoiseTracker(
            network_of(network, self.model),
            trainer.optimizers[0],
            samples=self.samples or samples_of(trainer),
            ranks=ranks,
            **{"clips": clips, **self.options},
        )
        noise.resume_at(trainer.global_step, trainer.current_epoch)
        state, self.state = self.state or self.state_dict(), {}
        if trainer.global_step and state:  # this fit goes on with one before
            noise.load_state_dict(state | {"update": trainer.global_step})
        context = trainer.precision_plugin.train_step_context
        self.watch = Watch(noise, partial(write, trainer), context)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert self.watch  # since on_train_start
        self.current = batch
        while self.watch.noise.epoch < trainer.current_epoch:
            self.watch.noise.end_epoch()

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self.watch  # since on_train_start
        self.watch.forget()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        # a training_step that returns None has no backward pass, and is no part of the gradient
        assert self.watch  # since on_train_start
        if self.current is not None:
            pair = self.batch(self.current) if self.batch else self.current
            self.watch.batch(*pair_of(pair, "give NoiseCallback batch=, a function that makes it"))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # some optimizers, as LBFGS, have the gradient made several times in a step: the first is
        # that of the parameters before it
        assert self.watch  # since on_train_start
        if self.current is not None:
            self.current = None
            self.watch.before_update(trainer.accumulate_grad_batches)

    def state_dict(self) -> dict[str, Any]:
        return self.watch.noise.state_dict() if self.watch else self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict


def write(trainer: Trainer, numbers: Numbers) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)


def check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raises NotCovered for a fit in which no batch and its update can be told."""
    if not pl_module.automatic_optimization:
        raise NotCovered(
            "manual optimization: when an update is made, and of which gradient, is known to "
            "training_step alone: call a fastsmooth.NoiseTracker in it"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise NotCovered(
            "training_step takes dataloader_iter, so that its batches are seen by nobody else: "
            "have it take batch"
        )
    if trainer.precision not in PRECISIONS:
        raise NotCovered(
            f"precision {trainer.precision!r}: gradients vanish in float16 where the loss is not "
            "scaled, and layers that are not PyTorch's have none of single samples: use one of "
            f"{', '.join(PRECISIONS)}"
        )
    if not trainer.optimizers or not trainer.optimizers[0].param_groups:
        raise NotCovered("configure_optimizers gives no optimizer, so that nothing is updated")


def network_of(module: nn.Module, name: str) -> nn.Module:
    """The submodule of a LightningModule by its name, or all of it. Raises NotCovered."""
    try:
        network = module.get_submodule(name)
    except AttributeError as error:
        raise NotCovered(f"model {name!r}: {error}") from None
    if not name and not overrides(module, "forward"):
        raise NotCovered(
            f"{type(module).__name__} has no forward(): give one, or name the submodule that is "
            "the network, as in model='net'"
        )
    return network


def overrides(module: nn.Module, method: str) -> bool:
    """Whether a LightningModule has a method of its own in the place of Lightning's."""
    owner = getattr(type(module), method).__module__
    return owner not in ("lightning.pytorch.core.module", "pytorch_lightning.core.module")


def samples_of(trainer: Trainer) -> int:
    """Those of the dataset that batches are drawn from. Raises NotCovered."""
    try:
        return len(trainer.train_dataloader.dataset)
    except (AttributeError, TypeError):
        raise NotCovered(
            "the training data does not say how many samples it has: give samples="
        ) from None
