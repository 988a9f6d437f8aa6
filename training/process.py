"""Where one worker of a run stands: its place among the others, its devices, and how tables reach it."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
import torch

from pipelines.config import DataConfig
from pipelines.decoding import known_bad, screened
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
    def careful(self) -> "Worker":
        """The same, whose images are first decoded in another process: those that end it are bad."""

        def tables(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
            return screened(self.tables(index, data, windows), sys.maxsize, gpu=self.dali.gpu)

        return replace(self, tables=tables)

    def without(self, known: Mapping[tuple[str, str], str]) -> "Worker":
        """The same, for which the images at these paths and keys are bad."""

        def tables(index: Index, data: DataConfig, windows: Iterable[Window]) -> Iterator[pa.Table]:
            return known_bad(self.tables(index, data, windows), known)

        return replace(self, tables=tables)

    @property
    def dali(self) -> Device:
        if self.device.type != "cuda":
            return Device(self.threads, None)
        index = self.device.index  # None is the current one's.
        return Device(self.threads, torch.cuda.current_device() if index is None else index)
