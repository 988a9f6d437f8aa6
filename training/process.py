"""Where one worker of a run stands: its place among the others, its devices, and how tables reach it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipelines.config import DataConfig
from pipelines.feed import Device
from pipelines.plan import Window
from pipelines.sources import Index
from training.gather import Gather

TableSource = Callable[[Index, DataConfig, Iterable[Window]], Iterator[pa.Table]]


@dataclass(frozen=True, eq=False)
class Worker:
    """One process of a run, on one device. `stopping` tells rank 0 that it shall save and end."""

    gather: Gather
    device: torch.device
    threads: int
    tables: TableSource
    stopping: Callable[[], bool] = lambda: False

    @property
    def dali(self) -> Device:
        if self.device.type != "cuda":
            return Device(self.threads, None)
        index = self.device.index  # None is the current one's.
        return Device(self.threads, torch.cuda.current_device() if index is None else index)
