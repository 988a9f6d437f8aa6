"""Training with the same bits on any number of workers: lane by lane, with sums in a fixed order.

How a kernel rounds may depend on how many rows it gets (the last numbers of a tensor, which fill no vector,
have another exp too), so each layer gets the rows of one lane at a time: the same shape on any number of
workers. A sum over lanes is a balanced binary tree; each worker adds up its own lanes, a subtree of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from pipelines.views import Views
from training.config import TrainConfig
from training.gather import Gather
from training.models.batch_norm import BatchNorm
from training.objectives import Objective

# Kernels may round differently where their input begins between multiples of this many bytes.
_ALIGNMENT = 64


# Modules that do not round, so that the number of rows makes no difference.
_NO_ROUNDING = (nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.Identity, nn.Flatten, nn.Dropout)


def tree_sum(parts: Sequence[Float[Tensor, "*dims"]]) -> Float[Tensor, "*dims"]:
    """Sum of the parts as a balanced binary tree: those at even places, plus those at odd places.

    Every 2nd, 4th, ... part is a subtree. Worker r of W has lanes r, r + W, ..., so for a power of two W the
    tree over the workers of each one's tree is the tree over all lanes.
    """
    return parts[0] if len(parts) == 1 else tree_sum(parts[0::2]) + tree_sum(parts[1::2])


@dataclass(frozen=True, eq=False)
class Lanes:
    """This worker's lanes, and how rows and sums of all workers' lanes are put together.

    count: lanes of this worker. rows: images of a lane that go through the networks at a time. parts:
    micro-batches of a step.
    """

    gather: Gather
    count: int
    rows: int
    parts: int = 1

    def split(self, x: Shaped[Tensor, "n *dims"]) -> list[Shaped[Tensor, "rows *dims"]]:
        """Blocks of one lane and one view each: all lanes of the first view, then of the second."""
        assert len(x) % (self.rows * self.count) == 0, f"{len(x)} rows are not {self.count} x {self.rows}"
        return [_aligned(block) for block in x.split(self.rows)]

    def total(self, blocks: Sequence[Float[Tensor, "*dims"]]) -> Float[Tensor, "*dims"]:
        """Sum over all workers' lanes, given a term for each block of `split`; the same on all workers."""
        lanes = [reduce(add, blocks[lane :: self.count]) for lane in range(self.count)]
        # In one memory layout on any number of workers, since a norm adds up in the order of memory.
        own = tree_sum(lanes).contiguous()
        return tree_sum(self.gather.rows(own[None]).unbind())

    def everyone(self, local: Shaped[Tensor, "n *dims"]) -> Shaped[Tensor, "world_size*n *dims"]:
        """All workers' rows, lane after lane in each micro-batch; each worker gets its own rows' gradients.

        These are not summed over the workers: every worker must compute the same from all rows.
        """
        return _Everyone.apply(local, self)

    def joined(self, local: Tensor) -> Tensor:
        """All rows as `everyone` has them, without gradients."""
        world_size, rest = self.gather.world_size, local.shape[1:]
        everyone = self.gather.rows(local).view(world_size, self.parts, self.count, self.rows, *rest)
        return everyone.movedim(0, 2).reshape(-1, *rest)

    def own(self, everyone: Tensor) -> Tensor:
        """This worker's rows of `joined`."""
        rest = everyone.shape[1:]
        lanes = everyone.reshape(self.parts, self.count, self.gather.world_size, self.rows, *rest)
        return lanes[:, :, self.gather.rank].reshape(-1, *rest)


def exact_lanes(config: TrainConfig, gather: Gather) -> Lanes:
    """The lanes of this worker in a run of `config`."""
    parts = config.batch_size // (config.micro_batch_size or config.batch_size)
    rows = config.batch_size // parts // config.lanes
    return Lanes(gather, config.lanes // gather.world_size, rows, parts)


def make_exact(objective: Objective, lanes: Lanes) -> None:
    """Have `objective`, built with a LocalGather, give the same loss and gradients on any number of workers.

    Modules keep their parameters and names; only their `forward` changes, in training. Gradients are sums
    over all workers' lanes, so they need no averaging. Every worker computes the loss of all workers' rows.

    Raises ValueError, naming it, for a module that has no exact form. Modules must treat each row by itself,
    and those that contain batch norms must compute nothing that rounds, but for sums of two tensors and
    products. That is not checked; it holds for diptych's and torchvision's networks.
    """
    for name, module in list(_parts(objective)):
        module.forward = _exact_forward(name, module, lanes)
    objective.loss = _LossOfAll(objective.loss, lanes)  # pyright: ignore[reportAttributeAccessIssue]


def _exact_forward(name: str, module: nn.Module, lanes: Lanes) -> "_ByLane | _Norm":
    if not isinstance(module, BatchNorm):
        return _ByLane(module, lanes)
    if module.affine and module.track_running_stats and module.momentum is not None:
        return _Norm(module, lanes)
    raise _no_form(name, module)


def _parts(parent: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Batch norms below `parent`, and the outermost modules without any inside, by name."""
    for key, child in parent.named_children():
        if isinstance(child, BatchNorm) or not _has_norm(child):
            if not isinstance(child, _NO_ROUNDING):
                yield prefix + key, child
        elif next(child.parameters(recurse=False), None) is not None:
            raise _no_form(prefix + key, child)
        else:
            yield from _parts(child, f"{prefix}{key}.")


def _has_norm(module: nn.Module) -> bool:
    return any(isinstance(part, BatchNorm) for part in module.modules())


def _no_form(name: str, module: nn.Module) -> ValueError:
    return ValueError(
        f"exact=true has no exact form of {name}, a {type(module).__name__}, because of its batch norm; "
        "choose another encoder, or leave exact out"
    )


def _aligned(block: Tensor) -> Tensor:
    """The block as kernels see it on any number of workers: with one layout, at an aligned address."""
    layout = _layout(block)
    laid_out = block.contiguous(memory_format=layout)
    # Strides of dimensions of size 1 say nothing, and yet kernels are chosen by them.
    strides = torch.empty(block.shape, device="meta", memory_format=layout).stride()
    if laid_out.stride() == strides and laid_out.data_ptr() % _ALIGNMENT == 0:
        return laid_out
    return torch.empty_like(block, memory_format=layout).copy_(block)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


class _Everyone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, lanes: Lanes) -> Tensor:
        ctx.lanes = lanes
        return lanes.joined(local)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.lanes.own(upstream[0]), None


@dataclass(frozen=True, eq=False)
class _LossOfAll:
    """The loss of all workers' rows, in an order that is the same on any number of workers."""

    loss: Callable[[list[Tensor], Views], Float[Tensor, ""]]
    lanes: Lanes

    def __call__(self, embedded: list[Float[Tensor, "n dim"]], views: Views) -> Float[Tensor, ""]:
        labels = self.lanes.everyone(views.labels.to(embedded[0].device))
        return self.loss([self.lanes.everyone(rows) for rows in embedded], replace(views, labels=labels))


class _Original(nn.Module):
    """A module with its class's own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x)


class _ByLane:
    """Forward of a module that treats each row by itself: in training, one lane after another."""

    def __init__(self, module: nn.Module, lanes: Lanes) -> None:
        self._original, self._lanes = _Original(module), lanes
        inplace: list[Any] = [part for part in module.modules() if hasattr(part, "inplace")]
        for part in inplace:
            part.inplace = False  # A block may be a part of another tensor.

    def __call__(self, x: Float[Tensor, "n *dims"]) -> Float[Tensor, "n *out"]:
        if not self._original.module.training:
            return self._original(x)
        blocks = _Split.apply(x, self._lanes)
        weights = {
            name: _Shared.apply(weight, self._lanes, len(blocks))
            for name, weight in self._original.named_parameters()
        }
        return _Join.apply(
            self._lanes,
            *(
                functional_call(self._original, {name: copies[i] for name, copies in weights.items()}, block)
                for i, block in enumerate(blocks)
            ),
        )


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lanes: Lanes) -> tuple[Tensor, ...]:
        return tuple(lanes.split(x))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return torch.cat([block.contiguous(memory_format=_layout(block)) for block in upstream]), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lanes: Lanes, *blocks: Tensor) -> Tensor:
        ctx.lanes = lanes
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.lanes.split(upstream[0])


class _Shared(torch.autograd.Function):
    """The same weight for each block, whose gradients are added up over all workers' lanes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, lanes: Lanes, blocks: int) -> tuple[Tensor, ...]:
        ctx.lanes = lanes
        return tuple(weight.view_as(weight) for _ in range(blocks))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.lanes.total(upstream), None, None


class _Norm:
    """Forward of a batch norm: in training, over all workers' lanes. Ioffe and Szegedy 2015."""

    def __init__(self, module: Any, lanes: Lanes) -> None:
        self._module, self._lanes = module, lanes

    def __call__(self, x: Float[Tensor, "n channels *space"]) -> Float[Tensor, "n channels *space"]:
        norm = self._module
        if not norm.training:
            return type(norm).forward(norm, x)
        out, mean, variance = _Normalize.apply(x, norm.weight, norm.bias, norm.eps, self._lanes)
        count = x.numel() // x.shape[1] * self._lanes.gather.world_size
        with torch.no_grad():
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
            norm.num_batches_tracked += 1
        return out


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
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (normal, weight, inverse), lanes, shape = ctx.saved_tensors, ctx.lanes, ctx.shape
        above = torch.empty_like(normal).copy_(upstream[0])  # Laid out as the input is.
        blocks = zip(lanes.split(above), lanes.split(normal), strict=True)
        sums = [torch.stack([(up * x).sum(ctx.dims), up.sum(ctx.dims)]) for up, x in blocks]
        to_weight, to_bias = lanes.total(sums)
        along, shift = (to_weight / ctx.count).view(shape), (to_bias / ctx.count).view(shape)
        to_x = (above - shift - normal * along) * (weight * inverse).view(shape)
        return to_x, to_weight, to_bias, None, None
