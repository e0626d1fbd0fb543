"""The exponential moving average of a model's weights, kept beside them and evaluated in their
place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """After every update, ema = decay ema + (1 - decay) w, of weights and of floating buffers;
    other buffers are copied. It begins at the weights that the model has when it is made, and has
    no warm-up: as timm.utils.ModelEmaV3(model, decay), and as torch's AveragedModel with
    get_ema_multi_avg_fn(decay) and use_buffers, whose first update copies.

    Args: model, whose weights and buffers stay in their memory from now on; decay, in (0, 1).

    A CUDA graph may hold update(): it works on the same tensors always, none of which the host
    reads.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._average: dict[str, Tensor] = {}  # what state_dict gives
        self._live: list[Tensor] = []  # the model's own, each once
        self._own: list[Tensor] = []  # and the average of each
        places: dict[tuple, Tensor] = {}
        for name, value in model.state_dict().items():
            place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if place not in places or not value.numel():  # else it has another name already
                places[place] = value.clone()
                self._live.append(value)
                self._own.append(places[place])
            self._average[name] = places[place]
        self._moved, self._copied = self._pairs(True), self._pairs(False)

    def _pairs(self, floating: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The averages of this kind, and what they are of."""
        pairs = zip(self._own, self._live, strict=True)
        kind = [pair for pair in pairs if pair[0].is_floating_point() == floating]
        return [own for own, _ in kind], [live for _, live in kind]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        own, live = self._moved
        if own:
            torch._foreach_lerp_(own, live, 1 - self.decay)
        own, live = self._copied
        if own:
            torch._foreach_copy_(own, live)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages for its weights and buffers, in the same memory;
        afterwards its own again, to the last bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for own, live in zip(self._own, self._live, strict=True):
            held = live.clone()  # one tensor at a time: memory for a second model may not be there
            live.copy_(own)
            own.copy_(held)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names that model.state_dict() has, in its order, shapes and dtypes:
        the tensors themselves."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what state_dict gave. Raises ValueError for what is of another model."""
        if state.keys() != self._average.keys():
            raise ValueError("the average of the weights is that of another model")
        for name, own in self._average.items():
            if state[name].shape != own.shape:
                raise ValueError(f"the average of {name} is {list(state[name].shape)}")
            own.copy_(state[name])
