"""Gradient noise in the Trainer of transformers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastsmooth.adapters.common import OfEach, Watch
from fastsmooth.noise.aside import instead
from fastsmooth.noise.losses import Loss, NotCovered
from fastsmooth.noise.online import Every, NoiseTracker, unwrapped

KEY = "fastsmooth.noise"  # of the tracker's numbers in a checkpoint's trainer_state.json
IGNORED = -100  # a label that takes no part in a loss of transformers
# relative, of two ways to the same loss from the same outputs
APART, APART_IN_HALF = 1e-3, 2e-2


class Part(NamedTuple):
    """A micro-batch of an update that is to be measured."""

    trained: float  # its share of what the Trainer makes the gradient of
    mean: float  # the mean loss of its samples, from the same outputs
    samples: int


class NoiseCallback(TrainerCallback):
    """Measures the gradient noise of updates of a Trainer, and logs it by trainer.log.

        trainer.add_callback(NoiseCallback(trainer, every=50))

    Args:
        trainer: whose training_step this takes the place of while it trains, and calls. Its model
            gets a dict of tensors [B, ...], labels among them, and gives logits [B, ...].
        every: so many updates, or epochs as in "2ep".
        loss: loss(logits, labels), as NoiseTracker takes it; None: what the Trainer takes, its
            compute_loss_func, its label smoothing, or that of the model's kind.
        samples: in the training set; None: the length of trainer.train_dataset.
        options: NoiseTracker's own.

    Where the Trainer clips gradients (max_grad_norm, by default 1.0) there is no delta_measured.
    `watch.noise` is the NoiseTracker, from the beginning of trainer.train() on. What it counts is
    part of the Trainer's checkpoints, so that a training that is taken up again goes on measuring
    as it would have.

    Raises ValueError for options that NoiseTracker refuses, for a training set without a length and
    a model whose kind of loss is not known, all but `every` when the training begins; NotCovered, a
    ValueError, where what is trained on is not the mean over the samples of an update, or the model
    cannot be measured.
    """

    watch: Watch

    def __init__(
        self,
        trainer: Any,
        every: int | str = 50,
        loss: Loss | None = None,
        samples: int | None = None,
        **options: Any,
    ):
        Every.parse(every)  # refused here, not when the training begins
        self.trainer, self.loss, self.samples = trainer, loss, samples
        self.options = {"every": every, **options}
        self.parts: list[Part] = []
        self.patched = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        own = [c for c in trainer.callback_handler.callbacks if isinstance(c, NoiseCallback)]
        if len(own) > 1:
            raise ValueError("two NoiseCallbacks in a Trainer, whose checkpoints have one state")
        _, ranks = unwrapped(trainer.model_wrapped)
        noise = NoiseTracker(
            OneInput(trainer.model, scaled=args.fp16),
            getattr(trainer.optimizer, "optimizer", trainer.optimizer),  # inside accelerate's
            samples=self.samples or length_of(trainer.train_dataset),
            loss=self.loss or loss_of(trainer),
            ranks=ranks,
            **{"clips": bool(args.max_grad_norm), **self.options},
        )
        if KEY in state.stateful_callbacks:
            noise.load_state_dict(state.stateful_callbacks[KEY])
        else:  # of a checkpoint from before anything was measured
            noise.resume_at(state.global_step, state.epoch or 0)
        self.watch, self.parts = Watch(noise, trainer.log), []
        left = getattr(trainer.training_step, "__self__", None)
        if isinstance(left, NoiseCallback):  # of a training that an exception ended
            left.patched.close()
        self.plain_step = trainer.training_step
        self.patched.enter_context(instead(trainer, "training_step", self.training_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.patched.close()

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, watched where the update to come is to be measured."""
        present = self in self.trainer.callback_handler.callbacks
        if not (present and self.watch.noise.wants_next):
            return self.plain_step(model, inputs, *args, **kwargs)
        seen: list[tuple[float, int]] = []
        watched = functools.partial(self.compute_loss, self.trainer.compute_loss, seen)
        with instead(self.trainer, "compute_loss", watched):
            trained = self.plain_step(model, inputs, *args, **kwargs)
        if len(seen) != 1:
            raise NotCovered(
                f"{type(self.trainer).__name__}.training_step calls compute_loss {len(seen)} times "
                "a batch, not once, so that what it trains on cannot be seen"
            )
        self.parts.append(Part(trained.item(), *seen[0]))
        return trained

    def compute_loss(
        self,
        plain: Callable[..., Any],
        seen: list[tuple[float, int]],
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's, which tells of its inputs, and of the mean loss of what they became."""
        noise = self.watch.noise
        x, y = noise.model.taken(inputs, self.trainer.label_names)  # type: ignore[operator]
        loss, outputs = plain(model, inputs, return_outputs=True, **kwargs)
        with torch.no_grad():
            own = noise.loss(logits_of(outputs), y).mean()
        seen.append((own.item(), len(y)))
        self.watch.batch(x, y)
        return (loss, outputs) if return_outputs else loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts, self.parts = self.parts, []
        if parts:
            self.check_mean(parts)
        self.watch.before_update()

    def check_mean(self, parts: list[Part]) -> None:
        """Raises NotCovered where what was trained on is not the mean over all samples of the
        update, whose micro-batches have one size: others are not measured."""
        ranks, args = self.watch.noise.ranks, self.trainer.args
        everywhere = [part for own in ranks.gather(parts) for part in own]
        if len({part.samples for part in everywhere}) > 1:
            return
        share = ranks.world / len(everywhere)
        near = APART_IN_HALF if args.bf16 or args.fp16 else APART
        for part in everywhere:
            mean = part.mean * share
            # what is not finite is said by the measurement
            if not math.isfinite(part.trained) or math.isclose(part.trained, mean, rel_tol=near):
                continue
            raise NotCovered(
                f"the Trainer trains on a loss of {part.trained:.4g} for a micro-batch whose mean "
                f"over the samples, as its share of the update, is {mean:.4g}: give NoiseCallback "
                "the loss, or, where the first is a multiple of the second because the model does "
                "not divide by num_items_in_batch, use gradient_accumulation_steps=1"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks[KEY] = self.watch.noise.state_dict()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.noise.end_epoch()
        state.stateful_callbacks[KEY] = self.watch.noise.state_dict()


class Layout(NamedTuple):
    """What a model's inputs were that are one tensor now."""

    tensors: tuple[tuple[str, torch.dtype, torch.Size], ...]  # without the samples
    others: dict[str, Any]


class OneInput(nn.Module):
    """A model that takes a dict of tensors and gives logits, as one from a tensor to a tensor: of
    a single input that input itself, of several their bytes, uint8 [B, bytes].

    scaled: whether accelerate has its forward() compute in float16, in which gradients vanish where
    their loss is not scaled; here it computes in the precision of its parameters.
    """

    def __init__(self, model: nn.Module, scaled: bool):
        super().__init__()
        self.model, self.scaled = model, scaled
        self.layouts: dict[tuple[torch.dtype, torch.Size], Layout] = {}  # by the kind of x

    def taken(self, inputs: dict[str, Any], label_names: list[str]) -> tuple[Tensor, Tensor]:
        """(x [B, ...], y [B, ...]) of a micro-batch of the Trainer.

        Raises NotCovered where there is not one tensor of labels, and for inputs that do not begin
        with the samples.
        """
        inputs = dict(inputs)
        labels = [name for name in label_names if isinstance(inputs.get(name), Tensor)]
        if len(labels) != 1:
            raise NotCovered(
                f"the labels of a batch are {' '.join(labels) or 'none'} of {' '.join(label_names)}"
                ": a measurement takes one tensor of them"
            )
        y = inputs.pop(labels[0])
        tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor)}
        for name, value in tensors.items():
            if value.shape[:1] != y.shape[:1]:
                raise NotCovered(
                    f"the input {name} {list(value.shape)} does not begin with the {len(y)} "
                    "samples of the batch"
                )
        kinds = tuple((name, v.dtype, v.shape[1:]) for name, v in tensors.items())
        others = {name: v for name, v in inputs.items() if name not in tensors}
        x = next(iter(tensors.values())) if len(tensors) == 1 else as_bytes(tensors)
        if self.layouts.setdefault((x.dtype, x.shape[1:]), Layout(kinds, others)) != (
            kinds, others,
        ):  # fmt: skip
            raise NotCovered("the inputs of two batches cannot be told apart by their sizes")
        return x, y

    def forward(self, x: Tensor) -> Tensor:
        layout = self.layouts[x.dtype, x.shape[1:]]
        tensors = {layout.tensors[0][0]: x}
        if len(layout.tensors) > 1:
            tensors = dict(of_bytes(x, layout))
        own_forward = getattr(self.model, "_original_forward", None) if self.scaled else None
        return logits_of((own_forward or self.model)(**tensors, **layout.others))


def as_bytes(tensors: dict[str, Tensor]) -> Tensor:
    """uint8 [B, bytes] of tensors [B, ...], one after the other."""
    rows = [v.detach().reshape(len(v), -1).contiguous() for v in tensors.values()]
    return torch.cat([row.view(torch.uint8) for row in rows], dim=1)


def of_bytes(x: Tensor, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor [B, ...]) of the tensors that became x, uint8 [B, bytes]."""
    start = 0
    for name, dtype, shape in layout.tensors:
        end = start + shape.numel() * dtype.itemsize
        # a copy, as a view of another dtype begins at a multiple of its size; a single row of x is
        # contiguous already
        own = x[:, start:end].clone(memory_format=torch.contiguous_format)
        yield name, own.view(dtype).reshape(len(x), *shape)
        start = end


def logits_of(outputs: Any) -> Tensor:
    """What a model of transformers gives before its loss. Raises NotCovered."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        raise NotCovered(
            f"the model gives a {type(outputs).__name__} without logits: have its forward() return "
            "a dict with them, as with return_dict=True"
        )
    return logits


def length_of(dataset: Any) -> int:
    """The samples of a training set. Raises ValueError for one without a length."""
    if hasattr(dataset, "__len__"):
        return len(dataset)
    raise ValueError(
        f"samples: a {type(dataset).__name__} has no length: give NoiseCallback the number of "
        "samples that batches are drawn from"
    )


def loss_of(trainer: Any) -> Loss:
    """loss(logits [B, ...], labels [B, ...]), 0-d, of what the Trainer takes; its mean over the
    samples, whatever the Trainer divides by. Raises ValueError where it is not known."""
    model = trainer.model
    if trainer.compute_loss_func is not None:
        return OfEach(functools.partial(by_function, trainer.compute_loss_func))
    if trainer.label_smoother is not None:
        shift = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return OfEach(functools.partial(smoothed, trainer.label_smoother, shift))
    own = getattr(model, "loss_function", None)
    if own is None:
        raise ValueError(
            f"loss: of a {type(model).__name__} it is not known what it makes of logits and labels"
            ": give NoiseCallback loss=, a function of both"
        )
    return OfEach(functools.partial(by_model, own, model.config))


def by_function(function: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    """compute_loss_func of a Trainer, for logits [B, ...] and labels [B, ...]."""
    count = labels.ne(IGNORED).sum()
    return function(SequenceClassifierOutput(logits=logits), labels, num_items_in_batch=count)


def smoothed(
    smoother: Callable[..., Tensor], shift: bool, logits: Tensor, labels: Tensor
) -> Tensor:
    """A Trainer's label smoothing, for logits [B, ..., classes] and labels [B, ...]."""
    return smoother({"logits": logits}, labels, shift_labels=shift)


def by_model(own: Callable[..., Tensor], config: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """A model's loss_function, for logits [B, ...] and labels [B, ...]. Raises NotCovered for one
    that needs more than those."""
    given = {"logits": logits, "pooled_logits": logits, "labels": labels, "config": config}
    given["vocab_size"] = getattr(config, "vocab_size", None)
    wanted = inspect.signature(own).parameters
    try:
        return own(**{name: value for name, value in given.items() if name in wanted})
    except TypeError as error:
        raise NotCovered(
            f"{own.__name__} is not made of logits and labels alone: {error}"
        ) from error
