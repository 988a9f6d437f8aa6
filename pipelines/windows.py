"""How many images a window holds, from the index and the config, and what it takes of a worker's memory."""

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


def lane_bytes(plan: Plan, index: Index) -> float:
    """What a lane's window takes of a worker's memory, in bytes."""
    return min(plan.window_size, plan.lane_rows) * (index.image_bytes + ROW_BYTES)
