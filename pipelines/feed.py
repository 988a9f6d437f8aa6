"""Turn Arrow tables of encoded images into the Views that each step trains on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import torch

from pipelines.augment.dali import Request, make_views, no_views
from pipelines.augment.draws import draw
from pipelines.batches import Batch, Rows, step_batches
from pipelines.config import DataConfig, ViewRecipe
from pipelines.plan import Plan
from pipelines.quarantine import Quarantined
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

    `tables` are those of plan.windows(lanes, start_step, stop_step), in that order. Another image of the same
    window stands in for a bad one. Raises ValueError if a window has no good image.
    """
    windows = plan.windows(lanes, start_step, stop_step)
    batches = step_batches(tables, windows, len(lanes), plan.lane_batch_size)

    def request(batch: Batch, epoch: int) -> Request:
        tag = (batch, epoch)
        return make_request(batch.rows, recipes, seed=plan.seed, epoch=epoch, tag=tag)

    def repair(failed: Request, broken: Mapping[int, str]) -> Request:
        batch, epoch = failed.tag
        return request(batch.without(broken), epoch)

    made = make_views(
        (
            request(batch, plan.position(step)[0])
            for step, batch in zip(range(start_step, stop_step), batches, strict=False)
        ),
        recipes,
        batch_size=plan.lane_batch_size * len(lanes),
        threads=device.threads,
        gpu=device.gpu,
        repair=repair,
    )
    return (_views(images, batch.rows, batch.rows.quarantined) for images, (batch, _) in made)


def evaluation_views(
    tables: Iterable[pa.Table], data: DataConfig, device: Device, *, batch_size: int
) -> Iterator[Views]:
    """One centre view of every good row of `tables`, in order, at most batch_size at a time."""
    return still_views(tables, (evaluation_recipe(data),), device, batch_size=batch_size, seed=0)


def still_views(
    tables: Iterable[pa.Table],
    recipes: tuple[ViewRecipe, ...],
    device: Device,
    *,
    batch_size: int,
    seed: int,
) -> Iterator[Views]:
    """The epoch-0 views of every good row of `tables`, in order, at most batch_size at a time.

    Empty Views may follow at the end; they only list quarantined images.
    """
    waiting: list[Quarantined] = []

    def request(rows: Rows, bad: tuple[Quarantined, ...]) -> Request:
        return make_request(rows, recipes, seed=seed, epoch=0, tag=(rows, bad))

    def requests() -> Iterator[Request]:
        for rows in map(Rows.of, tables):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                waiting.extend(batch.quarantined)
                if len(batch.good):
                    bad = tuple(waiting)
                    waiting.clear()
                    yield request(batch.good, bad)

    def repair(failed: Request, broken: Mapping[int, str]) -> Request:
        rows, bad = failed.tag
        rows = rows.marked(broken)
        return request(rows.good, bad + rows.quarantined)

    made = make_views(
        requests(), recipes, batch_size=batch_size, threads=device.threads, gpu=device.gpu, repair=repair
    )
    yield from (_views(images, rows, bad) for images, (rows, bad) in made)
    if waiting:
        nothing = torch.empty(0, dtype=torch.int64)
        yield Views(no_views(recipes, device.gpu), nothing, nothing.numpy(), tuple(waiting))


def evaluation_recipe(data: DataConfig) -> ViewRecipe:
    """A recipe with the training view's size, interpolation and normalisation, and nothing random."""
    view = data.view
    return ViewRecipe(
        size=view.size, interpolation=view.interpolation, mean=view.mean, std=view.std,
        centre_crop=data.evaluation_crop,
        flip=0.0, jitter=0.0, grey=0.0, blur=0.0,
    )  # fmt: skip


def make_request(
    rows: Rows, recipes: tuple[ViewRecipe, ...], *, seed: int, epoch: int, tag: object = None
) -> Request:
    """The request to make_views for the images of `rows`."""
    draws = tuple(
        draw(recipe, seed=seed, epoch=epoch, view=view, samples=rows.sample, sizes=rows.sizes)
        for view, recipe in enumerate(recipes)
    )
    return Request(rows.image.tolist(), draws, rows.orientation, tag)


def _views(images: tuple[torch.Tensor, ...], rows: Rows, quarantined: tuple[Quarantined, ...]) -> Views:
    return Views(images, torch.tensor(rows.label), rows.sample, quarantined)
