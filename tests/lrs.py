"""The learning rates of PyTorch's schedulers, which schedules are compared with."""

from collections.abc import Callable
from typing import Any

import torch


def torch_lrs(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """That of each of so many steps under a scheduler that starts at 0.1 and is stepped after every
    one."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler, lrs = make(optimizer), []
    for _ in range(steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs
