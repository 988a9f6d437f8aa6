"""Training with the same bits on any number of workers: lane by lane, with sums in a fixed order.

How a kernel rounds may depend on how many rows it is given, so a worker's rows go through each layer one lane
at a time: a kernel then sees the same shape on any number of workers. A sum over lanes is a balanced binary
tree whose upper part is the workers' and whose lower part is a worker's own lanes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipelines.views import Views
from training.config import TrainConfig
from training.gather import Gather
from training.objectives import Objective

# Kernels divide their sums among threads: as many of them on every worker, whatever cores it has.
_THREADS = 1


def tree_sum(parts: Sequence[Float[Tensor, "*dims"]]) -> Float[Tensor, "*dims"]:
    """Sum of the parts as a balanced binary tree: those at even places, plus those at odd places.

    The parts of every 2nd, 4th, ... place are a subtree. Worker r of W has the lanes r, r + W, ..., so that
    the tree over workers of each one's tree is the tree over all lanes where W is a power of two.
    """
    return parts[0] if len(parts) == 1 else tree_sum(parts[0::2]) + tree_sum(parts[1::2])


@dataclass(frozen=True, eq=False)
class Lanes:
    """This worker's lanes, and how sums and rows of all workers' lanes are put together.

    count: lanes of this worker. rows: images of a lane that go through the networks at a time. parts:
    micro-batches of a step.
    """

    gather: Gather
    count: int
    rows: int
    parts: int = 1

    def split(self, x: Shaped[Tensor, "n *dims"]) -> tuple[Shaped[Tensor, "rows *dims"], ...]:
        """Blocks of one lane and one view each: all lanes of the first view, then of the second."""
        assert len(x) % (self.rows * self.count) == 0, f"{len(x)} rows are no {self.count} x {self.rows}"
        return x.split(self.rows)

    def total(self, blocks: Sequence[Float[Tensor, "*dims"]]) -> Float[Tensor, "*dims"]:
        """Sum over all workers' lanes of what each block of `split` gives; the same on all workers."""
        lanes = [reduce(add, blocks[lane :: self.count]) for lane in range(self.count)]
        # Of one layout on any number of workers: norms add up in the order in which memory lies.
        own = tree_sum(lanes).contiguous()
        return tree_sum(self.gather.rows(own[None]).unbind())

    def everyone(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "world_size*n *dims"]:
        """All workers' rows, lane after lane in each micro-batch; gradients return to a row's own worker.

        They are this worker's alone: every worker must compute the same from all rows.
        """
        return _Everyone.apply(local, self)

    def _joined(self, local: Tensor) -> Tensor:
        world_size, rest = self.gather.world_size, local.shape[1:]
        everyone = self.gather.rows(local).view(world_size, self.parts, self.count, self.rows, *rest)
        return everyone.movedim(0, 2).reshape(-1, *rest)

    def _own(self, everyone: Tensor) -> Tensor:
        rest = everyone.shape[1:]
        lanes = everyone.reshape(self.parts, self.count, self.gather.world_size, self.rows, *rest)
        return lanes[:, :, self.gather.rank].reshape(-1, *rest)


class _Everyone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes = lanes
        return lanes._joined(local)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.lanes._own(upstream[0]), None


def exact_lanes(config: TrainConfig, gather: Gather, device: torch.device) -> Lanes:
    """The lanes of this worker; ValueError on a GPU, where the same bits are not yet promised."""
    if device.type != "cpu":
        raise ValueError(f"exact=true trains on CPUs alone, not on {device.type}; set --gpus-per-worker 0")
    parts = config.batch_size // (config.micro_batch_size or config.batch_size)
    rows = config.batch_size // parts // config.lanes
    return Lanes(gather, config.lanes // gather.world_size, rows, parts)


@contextmanager
def fixed_threads(*, exact: bool) -> Iterator[None]:
    """Where `exact`, torch's kernels run in one thread."""
    before = torch.get_num_threads()
    if exact:
        torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_exact(objective: Objective, lanes: Lanes) -> None:
    """Have `objective`, built with a LocalGather, give the same loss and gradients on any number of workers.

    Its layers keep their parameters and names: only their classes change. Gradients are sums over all
    workers' lanes at once, so that nothing is left to be averaged. Every worker computes the loss of all
    workers' rows. Raises ValueError, naming it, for a layer that has no exact form.
    """
    for name, module in objective.named_modules():
        if type(module) in _EXACT:
            _check(name, module)
            module.__class__ = _EXACT[type(module)]
            module.lanes = lanes  # pyright: ignore[reportArgumentType]
        elif module is not objective and _owns_weights(module):
            raise ValueError(f"exact=true has no exact form of {name}, a {type(module).__name__}; {_WAY_OUT}")
    objective.loss = _LossOfAll(objective.loss, lanes)  # pyright: ignore[reportAttributeAccessIssue]


_WAY_OUT = "choose another encoder, or leave exact out"


def _owns_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _check(name: str, module: nn.Module) -> None:
    """Raise ValueError for settings of a layer that its exact form lacks."""
    if isinstance(module, nn.Conv2d):
        fits = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        fits = module.affine and module.track_running_stats and module.momentum is not None
    else:
        fits = True
    if not fits:
        raise ValueError(f"exact=true has no exact form of {name}, {module}; {_WAY_OUT}")


@dataclass(frozen=True, eq=False)
class _LossOfAll:
    """The loss of all workers' rows, in an order that is the same on any number of workers."""

    loss: Callable[[list[Tensor], Views], Float[Tensor, ""]]
    lanes: Lanes

    def __call__(self, embedded: list[Float[Tensor, "n dim"]], views: Views) -> Float[Tensor, ""]:
        labels = self.lanes.everyone(views.labels)
        return self.loss([self.lanes.everyone(rows) for rows in embedded], replace(views, labels=labels))


class _LaneConv2d(nn.Conv2d):
    lanes: Lanes

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        if not self.training:
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolve.apply(input, self.weight, self.bias, settings, self.lanes)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...], lanes: Lanes
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.lanes = settings, lanes
        return torch.cat([torch.conv2d(block, weight, bias, *settings) for block in lanes.split(x)])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.settings
        wanted, lanes = list(ctx.needs_input_grad[:3]), ctx.lanes
        # Laid out as x is: what comes from a mean over places has no layout of its own.
        gradient = upstream[0].contiguous(memory_format=torch.channels_last)
        blocks = [
            torch.ops.aten.convolution_backward(
                above, block, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups, wanted
            )
            for above, block in zip(lanes.split(gradient), lanes.split(x), strict=True)
        ]
        to_x, to_weight, to_bias = zip(*blocks, strict=True)
        return (
            torch.cat(to_x) if wanted[0] else None,
            lanes.total(to_weight) if wanted[1] else None,
            lanes.total(to_bias) if wanted[2] else None,
            None,
            None,
        )


class _LaneLinear(nn.Linear):
    lanes: Lanes

    def forward(self, input: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        if not self.training:
            return super().forward(input)
        return _Multiply.apply(input, self.weight, self.bias, self.lanes)


class _Multiply(torch.autograd.Function):
    """Blocks are copied: a matrix product may round otherwise where its rows begin elsewhere in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lanes: Lanes) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.lanes = lanes
        out = torch.cat([block.clone() @ weight.T for block in lanes.split(x)])
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), lanes = ctx.saved_tensors, ctx.lanes
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        above = [block.clone() for block in lanes.split(upstream[0].contiguous())]
        weights = [up.T @ block.clone() for up, block in zip(above, lanes.split(x), strict=True)]
        return (
            torch.cat([block @ weight for block in above]) if to_x else None,
            lanes.total(weights) if to_weight else None,
            lanes.total([block.sum(0) for block in above]) if to_bias else None,
            None,
        )


class _LaneNorm:
    """Batch norm over all workers' lanes. Ioffe and Szegedy 2015."""

    lanes: Lanes

    def forward(self: Any, input: Float[Tensor, "n channels *space"]) -> Float[Tensor, "n channels *space"]:
        if not self.training:
            return super().forward(input)
        out, mean, variance = _Normalize.apply(input, self.weight, self.bias, self.eps, self.lanes)
        count = input.numel() // input.shape[1] * self.lanes.gather.world_size
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return out


class _LaneBatchNorm1d(_LaneNorm, nn.BatchNorm1d):
    pass


class _LaneBatchNorm2d(_LaneNorm, nn.BatchNorm2d):
    pass


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, lanes: Lanes
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * lanes.gather.world_size
        mean = lanes.total([block.sum(dims) for block in lanes.split(x)]) / count
        centred = x - mean.view(shape)
        variance = lanes.total([block.square().sum(dims) for block in lanes.split(centred)]) / count
        inverse = (variance + eps).rsqrt()
        normal = centred.mul_(inverse.view(shape))
        ctx.save_for_backward(normal, weight, inverse)
        ctx.lanes, ctx.dims, ctx.shape, ctx.count = lanes, dims, shape, count
        ctx.mark_non_differentiable(mean, variance)
        return normal * weight.view(shape) + bias.view(shape), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (normal, weight, inverse), lanes, shape = ctx.saved_tensors, ctx.lanes, ctx.shape
        # Laid out as the layer's input is, whatever came from above.
        upstream = torch.empty_like(normal).copy_(grads[0])
        blocks = zip(lanes.split(upstream), lanes.split(normal), strict=True)
        sums = [torch.stack([(up * x).sum(ctx.dims), up.sum(ctx.dims)]) for up, x in blocks]
        to_weight, to_bias = lanes.total(sums)
        along, shift = (to_weight / ctx.count).view(shape), (to_bias / ctx.count).view(shape)
        to_x = (upstream - shift - normal * along) * (weight * inverse).view(shape)
        return to_x, to_weight, to_bias, None, None


_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: _LaneConv2d,
    nn.Linear: _LaneLinear,
    nn.BatchNorm1d: _LaneBatchNorm1d,
    nn.BatchNorm2d: _LaneBatchNorm2d,
}
