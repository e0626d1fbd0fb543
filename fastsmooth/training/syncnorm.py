"""BatchNorm over the batch of all processes, on any device; PyTorch's own runs on GPUs alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastsmooth.freezing import FrozenNorm
from fastsmooth.kernels.backend import wide_dtype
from fastsmooth.ranks import talking


class SyncBatchNorm(_BatchNorm):
    """x [B, C, ...] normalised with the mean and variance of all processes' samples; B may differ,
    and be 0, among them.

    Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1, with the mini-batch of all processes.

    Every process must call it equally often. In evaluation mode it is BatchNorm, and nothing is
    sent.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input [B, C, ...], not {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """x [B, C, ...] in its own dtype. Raises RankLost, or ValueError for an input [B]."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            rest = (self.weight, self.bias, False, 0.0, self.eps)
            return F.batch_norm(input, self.running_mean, self.running_var, *rest)
        y, mean, variance, count = normalise(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            self._keep(mean, variance, count)
        return y

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics; there are some where track_running_stats is set."""
        names = ("num_batches_tracked", "running_mean", "running_var")
        batches, kept_mean, kept_var = map(self.get_buffer, names)
        batches += 1
        momentum = 1.0 / batches.item() if self.momentum is None else self.momentum
        unbiased = variance * count / (count - 1).clamp(min=1)
        kept_mean.lerp_(mean.to(kept_mean.dtype), momentum)
        kept_var.lerp_(unbiased.to(kept_var.dtype), momentum)


def convert(model: nn.Module) -> nn.Module:
    """The model with a SyncBatchNorm, of the same parameters and buffers, for each BatchNorm."""
    for name, child in model.named_children():
        if isinstance(child, FrozenNorm):
            continue
        if isinstance(child, _BatchNorm):
            about = (child.num_features, child.eps, child.momentum, child.affine)
            new = SyncBatchNorm(*about, child.track_running_stats)
            tensors = (*child.parameters(), *child.buffers())
            like = next((t for t in tensors if t.is_floating_point()), None)
            if like is not None:  # its device and dtype
                new.to(like)
            new.load_state_dict(child.state_dict())
            for own, before in zip(new.parameters(), child.parameters(), strict=True):
                own.requires_grad_(before.requires_grad)
            setattr(model, name, new.train(child.training))
        else:
            convert(child)
    return model


@torch.compiler.disable
def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y [B, C, ...] in the dtype of x, mean [C], biased variance [C], samples times places 0-d),
    the last three wide and of all processes; weight and bias are [C]."""
    return _Normalise.apply(x, weight, bias, eps)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = wide_dtype(x.device)
        over = [d for d in range(x.dim()) if d != 1]
        ctx.over, ctx.shape = over, [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1]
        # two sums of differences: from E x^2 - (E x)^2 a float32 variance would lose its digits
        # (wide may be float32)
        places = torch.tensor([count], dtype=wide, device=x.device)
        sums = torch.cat([x.sum(over, dtype=wide), places])
        summed(sums)
        total, mean = sums[-1], sums[:-1] / sums[-1]
        variance = summed((x - mean.view(ctx.shape)).square().sum(over, dtype=wide)) / total
        rstd = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean.to(x.dtype), rstd.to(x.dtype), total)
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        y = x * scale.to(x.dtype).view(ctx.shape) + shift.to(x.dtype).view(ctx.shape)
        ctx.mark_non_differentiable(mean, variance, total)
        return y, mean, variance, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, total = ctx.saved_tensors
        wide = wide_dtype(x.device)
        normal = (x - mean.view(ctx.shape)) * rstd.view(ctx.shape)
        sums = torch.stack([dy.sum(ctx.over, dtype=wide), (dy * normal).sum(ctx.over, dtype=wide)])
        # of this process alone: gradients of parameters are added up later
        db, dw = sums.to(dy.dtype).clone()
        means = (summed(sums) / total).to(dy.dtype)
        scale = rstd if weight is None else rstd * weight
        mean_dy, mean_both = means[0].view(ctx.shape), means[1].view(ctx.shape)
        dx = (dy - mean_dy - normal * mean_both) * scale.view(ctx.shape)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        return dx if need_x else None, dw if need_weight else None, db if need_bias else None, None


def summed(tensor: Tensor) -> Tensor:
    """The tensor [...], of any dtype, added up over the processes in place. Raises RankLost."""
    if dist.is_initialized():
        with talking():
            dist.all_reduce(tensor)
    return tensor
