"""The pieces of a step: its images' bytes, the time of their views, and what workers send each other."""

import pickle
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scale_model import Collective, Traffic
from cluster.digits import scattered_digits
from pipelines import storage
from pipelines.feed import Device, training_views
from pipelines.packing import Sizes
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from pipelines.sources import Index
from pipelines.views import Views
from pipelines.windows import training_plan
from training.batch_norm import BatchNorm, synchronize_batch_norm
from training.config import TrainConfig, shipped_config
from training.gather import Gather, LocalGather, ProcessGroupGather
from training.gradients import whole_batch
from training.loop import fit
from training.objectives import build_objective
from training.optimizers import build_optimizer
from training.run import _NO_BUFFER_SYNC, make_plan

_RANKS, _WARM_UP = 2, 2

# Images of a batch, and batches, by which views are measured.
_VIEW_BATCH, _VIEW_STEPS = 64, 30

# Images of a step of which only the collectives are counted.
_COUNTED = 2


@dataclass(eq=False)
class _Counted:
    """A gather that notes the bytes of what is brought to it."""

    gather: Gather
    gathered: list[int] = field(default_factory=list)
    summed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rank, self.world_size = self.gather.rank, self.gather.world_size

    def rows(self, local: Tensor) -> Tensor:
        self.gathered.append(local.nbytes)
        return self.gather.rows(local)

    uneven_rows = rows

    def total(self, local: Tensor) -> Tensor:
        self.summed.append(local.nbytes)
        return self.gather.total(local)


def read_config(name: str, train: str) -> TrainConfig:
    """The shipped config `name` with the training images at `train`."""
    values = tomllib.loads(shipped_config(name).read_text())
    return TrainConfig(**{**values, "data": {**values.get("data", {}), "train": train}})


def write_digits(folder: str, images: int) -> None:
    """The demo's images, packed as `diptych data pack` would."""
    digits = list(scattered_digits(images, held_out=False, seed=0))
    sizes = Sizes.of(sum(len(image) for image, *_ in digits) / images, shard=None, group=None)
    write_shards(digits, folder, rows_per_shard=sizes.rows_per_shard, rows_per_group=sizes.rows_per_group)


def stored_bytes(index: Index) -> float:
    """Bytes of the files for each image, all that goes with it included."""
    filesystem, _ = storage.resolve(index.uri)
    return sum(file.size for file in filesystem.get_file_info(index.paths)) / int(index.rows.sum())


def image_bytes(config: TrainConfig, index: Index) -> float:
    """The mean encoded image's bytes, of those in the first window."""
    plan = training_plan(index, config.data, seed=config.seed, lanes=1, batch_size=1)
    (table,) = read_windows(index, config.data, islice(plan.windows(range(1), 0, 1), 1))
    return statistics.mean(len(image.as_buffer()) for image in table["image"] if image.is_valid)


def view_seconds(config: TrainConfig, index: Index) -> float:
    """Seconds of CPU that both views of an image take; reading is left out."""
    images = int(index.rows.sum())
    batch = min(_VIEW_BATCH, images // 4)
    steps = min(_VIEW_STEPS, images // batch)
    plan = training_plan(index, config.data, seed=config.seed, lanes=1, batch_size=batch)
    tables = list(read_windows(index, config.data, plan.windows(range(1), 0, steps)))
    views = training_views(
        tables, plan, range(1), config.data.views, Device(1), start_step=0, stop_step=steps
    )
    next(views)
    started = time.process_time()
    images = sum(len(made.samples) for made in views)
    return (time.process_time() - started) / images


def count(config: TrainConfig, index: Index) -> Traffic:
    """What each of two real workers brings to a step's collectives, noted while it does."""
    return on_ranks(count_here, config, index)


def formula(config: TrainConfig, index: Index) -> Traffic:
    """The same by arithmetic: numbers of four bytes, by the networks' widths and weights."""
    objective = build_objective(config, index, LocalGather())
    norms = [part for part in objective.modules() if isinstance(part, BatchNorm)]
    channels = sum(2 * norm.num_features for norm in norms)
    weights = sum(weight.numel() for weight in objective.parameters() if weight.requires_grad)
    # Two views of an image: their projections, and then for each the sum over its negatives.
    dim = objective.get_submodule("projector").dim
    return Traffic(
        Collective(2, 4 * 2 * (dim + 1)),
        Collective(len(norms), 4 * channels),
        Collective(len(norms), 4 * channels),
        Collective(1, 4 * weights),
    )


def on_ranks(work: Callable[..., Any], *arguments: Any) -> Any:
    """What rank 0 of a real gloo group gives."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, work, arguments), nprocs=_RANKS)  # pyright: ignore[reportPrivateImportUsage]
        return pickle.loads(Path(folder, "result").read_bytes())


def _rank(rank: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=_RANKS)
    result = work(*arguments)
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def views_of(config: TrainConfig, index: Index, images: int) -> Views:
    """Real views of so many images."""
    config = replace(config, lanes=1, batch_size=images)
    plan = make_plan(config, index)
    tables = read_windows(index, config.data, plan.windows(range(1), 0, 1))
    return next(
        training_views(tables, plan, range(1), config.data.views, Device(1), start_step=0, stop_step=1)
    )


class Trainer:
    """The real loop on views that are at hand; `norms` is the gather of batch norm's statistics."""

    def __init__(self, config: TrainConfig, index: Index, gather: Gather, norms: Gather) -> None:
        torch.manual_seed(config.seed)
        self._objective = build_objective(config, index, gather)
        self._objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        synchronize_batch_norm(self._objective, norms)
        self._optimizer = build_optimizer(self._objective, config.optimizer)
        self.model: Any = self._objective

    def distribute(self, buckets: list[int] | None = None) -> "Trainer":
        """With DistributedDataParallel; the bytes of each bucket of gradients are added to `buckets`."""
        self.model = DistributedDataParallel(self._objective, **_NO_BUFFER_SYNC)
        if buckets is not None:

            def note(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
                buckets.append(bucket.buffer().nbytes)
                return allreduce_hook(dist.group.WORLD, bucket)

            self.model.register_comm_hook(None, note)
        return self

    def seconds(self, views: Views, steps: int, before: Callable[[], None] = lambda: None) -> list[float]:
        """Seconds of each step; `before` is called after those that warm up."""
        times: list[float] = []

        def after(done: int, _loss: Tensor, _rate: float) -> None:
            if done == _WARM_UP:
                before()
            times.append(time.perf_counter())

        batches: Iterator[Views] = repeat(views, _WARM_UP + steps)
        fit(
            self._objective, whole_batch(self.model, dtype=torch.float32), self._optimizer, batches,
            start_step=0, stop_step=_WARM_UP + steps, rate=lambda _: 1e-3, after_step=after,
            device=torch.device("cpu"),
        )  # fmt: skip
        return [end - start for start, end in zip(times[_WARM_UP - 1 :], times[_WARM_UP:], strict=False)]


def count_here(config: TrainConfig, index: Index) -> Traffic:
    """What this worker brings to a step's collectives; all workers of the process group call it."""
    loss, norms, buckets = _Counted(ProcessGroupGather()), _Counted(ProcessGroupGather()), []
    trainer = Trainer(config, index, loss, norms).distribute(buckets)
    lists = [loss.gathered, loss.summed, norms.gathered, norms.summed, buckets]
    trainer.seconds(views_of(config, index, _COUNTED), 1, before=lambda: [kept.clear() for kept in lists])
    assert not loss.summed
    found = [Collective(len(kept), sum(kept)) for kept in lists if kept is not loss.summed]
    return Traffic(Collective(found[0].calls, found[0].bytes / _COUNTED), *found[1:])
