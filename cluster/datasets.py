"""Listing a data set for a command, with a progress bar, and how well a run's batches of it are mixed."""

import sys

from cluster.terminal import Bar, counted, warn
from pipelines import storage
from pipelines.config import DataConfig
from pipelines.formats import torchvision_source
from pipelines.index import Index, build_index
from pipelines.mixing import MIXING_ADVICE, Mixing, run_mixing
from pipelines.plan import lane_bytes
from training.config import TrainConfig, worker_counts
from training.trainer import make_plan


def read_index(uri: str, data: DataConfig, classes: tuple[str, ...] = ()) -> Index:
    """The index of `uri`; raises ValueError as build_index does."""
    with counted(f"index {uri}", "file") as progress:
        index = build_index(uri, data, progress, classes=classes)
    if index.passed_over:
        print(index.passed_over, file=sys.stderr)
    return index


def absolute(uri: str) -> str:
    """`uri` as it means the same in every process."""
    if uri.startswith(torchvision_source.SCHEME):
        return torchvision_source.absolute(uri)
    return storage.absolute(uri)


def image_bar(what: str, index: Index) -> Bar:
    """A progress bar over the images of `index`."""
    return Bar(what, "image", int(index.rows.sum()))


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
        warn(
            f"images of {config.data.train} are stored by class, and batches are mixed badly: {MIXING_ADVICE}"
        )
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
