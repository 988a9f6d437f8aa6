"""Arrow tables of encoded images to the Views that each step trains on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8

from pipelines.config import DataConfig
from pipelines.dali import Made, Request, make_views
from pipelines.draws import draw
from pipelines.plan import Plan, Window
from pipelines.recipes import ViewRecipe
from pipelines.views import Views


@dataclass(frozen=True)
class Device:
    """Where views are made: on this GPU, or with this many CPU threads."""

    threads: int
    gpu: int | None = None


def training_views(
    tables: Iterable[pa.Table],
    plan: Plan,
    lanes: range,
    recipes: tuple[ViewRecipe, ...],
    device: Device,
    *,
    start_step: int,
    stop_step: int,
) -> Iterator[Views]:
    """The views of steps [start_step, stop_step) for the worker that serves `lanes`.

    `tables` are those of plan.windows(lanes, start_step, stop_step), in that order.
    """
    windows = plan.windows(lanes, start_step, stop_step)
    batches = _lane_batches(tables, windows, len(lanes), plan.lane_batch_size)

    def requests() -> Iterator[Request]:
        for step, batch in zip(range(start_step, stop_step), batches, strict=False):
            epoch, _ = plan.position(step)
            yield make_request(batch, recipes, seed=plan.seed, epoch=epoch)

    made = make_views(
        requests(),
        recipes,
        batch_size=plan.lane_batch_size * len(lanes),
        threads=device.threads,
        gpu=device.gpu,
    )
    return map(_views, made)


def evaluation_views(
    tables: Iterable[pa.Table], data: DataConfig, device: Device, *, batch_size: int
) -> Iterator[Views]:
    """One centre view of every row of `tables`, in order, at most batch_size at a time."""
    recipe = evaluation_recipe(data)
    batches = (
        table.slice(start, batch_size) for table in tables for start in range(0, table.num_rows, batch_size)
    )
    requests = (make_request(batch, (recipe,), seed=0, epoch=0) for batch in batches)
    made = make_views(requests, (recipe,), batch_size=batch_size, threads=device.threads, gpu=device.gpu)
    return map(_views, made)


def evaluation_recipe(data: DataConfig) -> ViewRecipe:
    """The training view's size and normalisation, and nothing random."""
    view = data.view
    return ViewRecipe(
        size=view.size, mean=view.mean, std=view.std, centre_crop=data.evaluation_crop,
        flip=0.0, jitter=0.0, grey=0.0, blur=0.0,
    )  # fmt: skip


def make_request(batch: pa.Table, recipes: tuple[ViewRecipe, ...], *, seed: int, epoch: int) -> Request:
    """What make_views needs for the images of `batch` (rows as reader.SCHEMA), which is its tag."""
    samples = batch["sample"].to_numpy()
    sizes = np.stack([batch["height"].to_numpy(), batch["width"].to_numpy()], axis=1).astype(np.int64)
    draws = tuple(
        draw(recipe, seed=seed, epoch=epoch, view=view, samples=samples, sizes=sizes)
        for view, recipe in enumerate(recipes)
    )
    return Request(_image_bytes(batch), draws, tag=batch)


def _image_bytes(batch: pa.Table) -> list[UInt8[np.ndarray, " bytes"]]:
    """The encoded images as views of Arrow's own memory."""
    column = batch["image"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    whole = np.frombuffer(content, np.uint8)
    return [whole[start:end] for start, end in pairwise(ends)]


def _views(made: Made) -> Views:
    images, batch = made
    labels = torch.tensor(batch["label"].to_numpy())
    return Views(images, labels, batch["sample"].to_numpy())


def _lane_batches(
    tables: Iterable[pa.Table], windows: Iterable[Window], lanes: int, lane_batch_size: int
) -> Iterator[pa.Table]:
    """Batches of lane_batch_size rows of each lane, out of tables in which the lanes take turns."""
    rows = _Rows(tables)
    turn: list[pa.Table] = []
    for window in windows:
        turn.append(rows.take(window.rows))
        if len(turn) == lanes:
            for start in range(0, window.rows, lane_batch_size):
                yield pa.concat_tables([table.slice(start, lane_batch_size) for table in turn])
            turn = []


class _Rows:
    """A stream of tables, taken by the number of rows."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._rest: pa.Table | None = None

    def take(self, count: int) -> pa.Table:
        parts = []
        while count:
            table = next(self._tables) if self._rest is None else self._rest
            part = table.slice(0, count)
            parts.append(part)
            count -= part.num_rows
            self._rest = table.slice(part.num_rows) if part.num_rows < table.num_rows else None
        return pa.concat_tables(parts)
