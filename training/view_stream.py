"""A run's training views on one worker, and the images that were left out of them."""

from collections.abc import Callable, Iterator
from functools import partial

import pyarrow as pa
import torch

from pipelines import storage
from pipelines.feed import training_views
from pipelines.images.decoding import screened
from pipelines.index import Index
from pipelines.inspection import contact_sheet
from pipelines.plan import Plan, lanes_of
from pipelines.quarantine import Quarantine, Quarantined, decode, encode
from pipelines.views import Views
from training.config import TrainConfig, training_recipes
from training.metrics import RunLog
from training.process import Worker


class ViewStream:
    """Reads the images that the plan gives to this worker's lanes, and makes their views.

    left_out: images that could not be used since settle was last called.
    """

    def __init__(
        self,
        config: TrainConfig,
        index: Index,
        plan: Plan,
        worker: Worker,
        quarantine: Quarantine,
        *,
        careful_until: int,
    ) -> None:
        """Up to the step `careful_until` images are first decoded in another process."""
        self._config, self._index, self._plan, self._worker = config, index, plan, worker
        self._quarantine, self._careful_until = quarantine, careful_until
        self.lanes = lanes_of(worker.gather.rank, worker.gather.world_size, config.lanes)
        self.left_out: list[Quarantined] = []

    def views(
        self, start_step: int, stop_step: int, log: RunLog | None, on_first: Callable[[], None]
    ) -> Iterator[Views]:
        """The views of the steps from `start_step` to before `stop_step`, a batch each.

        Draws the first images with their views into RUN/views.png through `log`, which rank 0 has. Calls
        on_first() once the first batch is made.
        """
        recipes = training_recipes(self._config)
        windows = self._plan.windows(self.lanes, start_step, stop_step)
        tables = self._worker.training_tables(self._index, self._config.data, windows)
        if (careful := min(self._careful_until, stop_step)) > start_step:
            looked_at = self._plan.windows(self.lanes, start_step, careful)
            rows = sum(window.rows_read for window in looked_at)
            tables = screened(tables, rows, gpu=self._worker.dali.gpu)
        if log and start_step == 0:
            tables = self._with_contact_sheet(tables, log)
        steps = {"start_step": start_step, "stop_step": stop_step}
        views = training_views(tables, self._plan, self.lanes, recipes, self._worker.dali, **steps)
        return self._noting(views, on_first)

    def _noting(self, views: Iterator[Views], on_first: Callable[[], None]) -> Iterator[Views]:
        """The same views; notes which images were left out of them."""
        for number, batch in enumerate(views):
            if number == 0:
                on_first()
            self.left_out.extend(batch.quarantined)
            yield batch

    def settle(self, done: int, log: RunLog | None) -> None:
        """Tell all workers which images were left out since the last time; too many raise ValueError."""
        lines = encode(self.left_out)
        local = torch.tensor(list(lines), dtype=torch.uint8, device=self._worker.device)
        self.left_out.clear()
        everyone = decode(bytes(self._worker.gather.uneven_rows(local).tolist()))
        if not everyone:
            return
        self._quarantine.add(everyone)
        if log:
            log.keep("quarantine.jsonl", self._quarantine.write)
            log.note(done, quarantined=len(self._quarantine))
        self._quarantine.check(self._index, self._config.data.max_bad_share)

    def _with_contact_sheet(self, tables: Iterator[pa.Table], log: RunLog) -> Iterator[pa.Table]:
        """The same tables; the first few images of them are drawn with their views into RUN/views.png."""
        for number, table in enumerate(tables):
            if number == 0:
                sheet = contact_sheet(table, training_recipes(self._config), seed=self._config.seed)
                place = storage.join(self._config.output, self._config.name, "views.png")
                log.keep("views.png", partial(storage.write, place, sheet))
            yield table
