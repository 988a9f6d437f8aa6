"""What a run says before it starts of its windows: their memory, and how well its batches are mixed."""

from cluster.progress import warn
from pipelines.mixing import WAY_OUT, Mixing, run_mixing
from pipelines.sources import Index
from pipelines.windows import lane_bytes
from training.config import TrainConfig, worker_counts
from training.run import make_plan


def say_mixing(config: TrainConfig, index: Index) -> Mixing | None:
    """Print it, and warn where batches hold too few classes; what was measured, None where nothing was.

    Raises ValueError where labels cannot be read.
    """
    plan = make_plan(config, index)
    rows = min(plan.window_size, plan.lane_rows)
    print(f"windows of {rows:,} images in {plan.lanes} lanes{_memory(config, index)}")
    mixing = run_mixing(plan, index, config.data)
    print(f"mixing: {mixing or _unmeasured(index)}")
    if mixing and mixing.is_poor:
        warn(f"images of {config.data.train} are stored by class, and batches are mixed badly: {WAY_OUT}")
    return mixing


def _unmeasured(index: Index) -> str:
    """Why nothing was measured."""
    if index.random_access:
        return "each image is read by itself, and batches are those of a full shuffle"
    return "not known, since no labels tell whether images are stored by class"


def _memory(config: TrainConfig, index: Index) -> str:
    """Of a worker, or of all where their number is not known yet."""
    if not index.image_bytes:
        return ""
    lane, counts = lane_bytes(make_plan(config, index), index), worker_counts(config)
    if config.workers is None:
        return f": {config.lanes * lane / 2**20:,.0f} MiB in all"
    sizes = dict.fromkeys(f"{config.lanes / count * lane / 2**20:,.0f}" for count in (counts[-1], counts[0]))
    return f": {' to '.join(sizes)} MiB a worker"
