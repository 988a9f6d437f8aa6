"""One worker process of a run: its rank, its device, and where its tables of images come from."""

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa
import torch

from pipelines.config import DataConfig
from pipelines.feed import Device
from pipelines.formats.base import Identity
from pipelines.images.decoding import known_bad, screened
from pipelines.index import Index
from pipelines.plan import Window
from training.evaluation.sets import ImageCache
from training.gather import Gather

TableSource = Callable[[Index, DataConfig, Iterable[Window]], Iterator[pa.Table]]
Screen = Callable[[Iterator[pa.Table]], Iterator[pa.Table]]


@dataclass(frozen=True, eq=False)
class Worker:
    """One process of a run, on one device.

    tables: reads images from storage. stopping: whether rank 0 should save and stop. cache: keeps the images
    of evaluations. screens: filters that all tables pass through, in this order.
    """

    gather: Gather
    device: torch.device
    threads: int
    tables: TableSource
    stopping: Callable[[], bool] = lambda: False
    cache: ImageCache = field(default_factory=ImageCache)
    screens: tuple[Screen, ...] = ()

    def training_tables(
        self, index: Index, data: DataConfig, windows: Iterable[Window]
    ) -> Iterator[pa.Table]:
        """The rows of the windows, in the format of reader.SCHEMA."""
        return self._screened(self.tables(index, data, windows))

    def kept_tables(self, key: Hashable, read: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
        """The tables of `read`; from the cache, under `key`, once they were read to the end."""
        return self._screened(self.cache.tables(key, read))

    def _screened(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for screen in self.screens:
            tables = screen(tables)
        return tables

    @property
    def careful(self) -> "Worker":
        """A copy that first decodes images in another process, to quarantine those that crash it."""
        return replace(
            self, screens=(*self.screens, lambda tables: screened(tables, sys.maxsize, gpu=self.dali.gpu))
        )

    def without(self, known: Mapping[Identity, str]) -> "Worker":
        """A copy that treats these images as bad."""
        return replace(self, screens=(*self.screens, lambda tables: known_bad(tables, known)))

    @property
    def dali(self) -> Device:
        if self.device.type != "cuda":
            return Device(self.threads, None)
        index = self.device.index  # None means the current device.
        return Device(self.threads, torch.cuda.current_device() if index is None else index)
