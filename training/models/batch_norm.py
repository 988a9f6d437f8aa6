"""Batch norm over the global batch, so that its statistics do not depend on the number of workers.

torch's SyncBatchNorm works only on GPUs; this one is for CPU workers.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from training.gather import Gather

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def synchronize_batch_norm(model: nn.Module, gather: Gather) -> nn.Module:
    """`model`, whose batch norms now take their statistics over all workers' images."""
    if gather.world_size == 1:
        return model
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BatchNorm):
                setattr(parent, name, GlobalBatchNorm(child, gather))
    return model


class GlobalBatchNorm(nn.Module):
    """Batch norm with statistics over all workers, and the original's parameters. Ioffe and Szegedy 2015.

    Every worker must pass the same number of images.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, original: BatchNorm, gather: Gather) -> None:
        super().__init__()
        assert original.momentum is not None
        self.momentum, self.eps, self._gather = original.momentum, original.eps, gather
        self.weight, self.bias = original.weight, original.bias
        for name, buffer in original.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

    def forward(self, x: Float[Tensor, "n channels *space"]) -> Float[Tensor, "n channels *space"]:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        out, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps, self._gather)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return out


class _Normalize(torch.autograd.Function):
    """Exchanges per-channel sums once in each direction; torch's kernels do the rest."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, gather: Gather
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # Precise to 4e-7 at worst; torch.var_mean sums in float64, to 6e-8, but takes ten times as long.
        mean = x.mean(dims)
        variance = (x - mean.view(shape)).square_().mean(dims)
        # Chan et al. 1979: for equal parts, the mean variance plus the variance of the means.
        parts = gather.rows(torch.stack([mean, variance])[None])
        mean = parts[:, 0].mean(0)
        variance = parts[:, 1].mean(0) + parts[:, 0].var(0, correction=0)
        out = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.gather = eps, gather
        count = torch.tensor(x.numel() // x.shape[1] * gather.world_size)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.count = int(count)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, variance = ctx.saved_tensors
        # With another memory layout than x's the kernel takes five times as long.
        upstream = torch.empty_like(x).copy_(grads[0]) if grads[0].stride() != x.stride() else grads[0]
        # With fixed statistics the kernel gives upstream * scale, and this worker's two sums.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            upstream, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = ctx.gather.total(torch.stack([grad_weight, grad_bias])) / ctx.count
        # The gradient through the statistics removes each channel's mean and its component along x.
        inverse = torch.rsqrt(variance + ctx.eps)
        along = -weight * inverse.square() * sums[0]
        shift = -weight * inverse * sums[1] - along * mean
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_x.addcmul_(x, along.view(shape)).add_(shift.view(shape))
        return grad_x, grad_weight, grad_bias, None, None
