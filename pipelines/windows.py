"""How many images a window holds, from the index and the config, and what it takes of a worker's memory."""

from dataclasses import replace

from pipelines.config import DataConfig
from pipelines.plan import Plan
from pipelines.sources import Index

# What an image takes in a window beside its encoded bytes: its key, its path and the array that shows it.
ROW_BYTES = 512

# Enough to read at once where nothing is gained by more: images that are read one by one are mixed already.
_ENOUGH = 1024


def window_rows(index: Index, data: DataConfig) -> int:
    """Images of a lane that are read and shuffled together, the same on any number of workers."""
    if data.window_rows is not None:
        return data.window_rows
    fitting = max(1, int(data.window_bytes / (index.image_bytes + ROW_BYTES)))
    return min(fitting, _ENOUGH) if index.random_access else fitting


def reading_rows(index: Index, data: DataConfig) -> int:
    """Images to read at once where they are not shuffled, as evaluation does."""
    return min(window_rows(index, data), _ENOUGH)


def training_plan(index: Index, data: DataConfig, *, seed: int, lanes: int, batch_size: int) -> Plan:
    """The order in which a run sees the images of `index`. Raises ValueError as Plan does."""
    rows = window_rows(index, data)
    plan = Plan(index.rows, seed, lanes, batch_size, rows, random_access=index.random_access)
    if data.window_rows is not None:
        return plan
    # All windows alike: the short rest of a lane would be drawn from few places.
    windows = -(-plan.steps_per_epoch // (plan.window_size // plan.lane_batch_size))
    steps = -(-plan.steps_per_epoch // windows)
    return replace(plan, window_rows=steps * plan.lane_batch_size)


def lane_bytes(plan: Plan, index: Index) -> float:
    """What a lane's window takes of a worker's memory, in bytes."""
    return min(plan.window_size, plan.lane_rows) * (index.image_bytes + ROW_BYTES)
