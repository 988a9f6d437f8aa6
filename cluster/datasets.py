"""List a data set for a command, with a progress bar, and measure how well a run mixes its classes."""

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
    """Build the index of `uri`, with progress on the terminal. Raises ValueError as `build_index` does."""
    with counted(f"index {uri}", "file") as progress:
        index = build_index(uri, data, progress, classes=classes)
    if index.passed_over:
        print(index.passed_over, file=sys.stderr)
    return index


def absolute(uri: str) -> str:
    """`uri` in a form that means the same in every process."""
    if uri.startswith(torchvision_source.SCHEME):
        return torchvision_source.absolute(uri)
    return storage.absolute(uri)


def image_bar(what: str, index: Index) -> Bar:
    """A progress bar over the images of `index`."""
    return Bar(what, "image", int(index.rows.sum()))


def say_mixing(config: TrainConfig, index: Index) -> Mixing | None:
    """Measure and print how well batches are mixed; warn if they hold too few classes.

    Returns None if nothing could be measured. Raises ValueError if labels cannot be read.
    """
    plan = make_plan(config, index)
    rows = min(plan.window_size, plan.lane_rows)
    print(f"windows of {rows:,} images in {plan.lanes} lanes{_memory(config, index)}")
    mixing = run_mixing(plan, index, config.data)
    print(f"mixing: {mixing or _unmeasured(index)}")
    if mixing and mixing.is_poor:
        warn(
            f"images of {config.data.train} are stored by class, so batches are poorly mixed: {MIXING_ADVICE}"
        )
    return mixing


def _unmeasured(index: Index) -> str:
    """Say why nothing was measured."""
    if index.random_access:
        return "as by a full shuffle, since each image is read by itself"
    return "unknown, since there are no labels to tell whether images are stored by class"


def _memory(config: TrainConfig, index: Index) -> str:
    """Memory of a worker's windows, or of all workers' while their number is unknown."""
    if not index.image_bytes:
        return ""
    lane, counts = lane_bytes(make_plan(config, index), index), worker_counts(config)
    if config.workers is None:
        return f": {config.lanes * lane / 2**20:,.0f} MiB in all"
    sizes = dict.fromkeys(f"{config.lanes / count * lane / 2**20:,.0f}" for count in (counts[-1], counts[0]))
    return f": {' to '.join(sizes)} MiB a worker"
