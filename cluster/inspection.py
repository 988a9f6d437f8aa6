"""`diptych data inspect`: what a data set holds, and how well a run's batches of it would be mixed."""

import json
import pickle
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.columns import Columns
from cluster.listing import absolute, image_bar, read_index
from cluster.local import cluster
from pipelines.config import DataConfig
from pipelines.labels import label_names
from pipelines.mixing import Mixing, measure
from pipelines.packing import all_readings
from pipelines.reader import Reading
from pipelines.sources import Index
from pipelines.survey import Survey, report, survey
from pipelines.windows import training_plan, window_rows
from training.config import TrainConfig

# Images that a task reads at a time.
_WINDOW_ROWS = 512

# Reasons and classes that a table on the terminal shows.
_SHOWN = 20


def run_inspect(
    uri: str,
    columns: Columns = Columns(),  # noqa: B008
    *,
    decode: bool = False,
    as_json: bool = False,
) -> dict[str, Any]:
    """Print what the images at `uri` are, and return it; raises ValueError where there are none."""
    uri = absolute(uri)
    data = columns.data(uri)
    index = read_index(uri, data)
    readings = all_readings(index, _WINDOW_ROWS)
    found = Survey()
    with cluster(cpus=1), image_bar("inspect", index) as shown:
        from pipelines.stream import map_jobs

        for table in map_jobs(readings, partial(_survey, data=data, decode=decode)):
            part: Survey = pickle.loads(table["found"][0].as_py())
            found.add(part)
            shown.update(part.images + part.bad_images)
    rows = window_rows(index, data)
    values = report(index, found, label_names(index), rows, _mixing(index, data, found))
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        _print_report(values)
    return values


def _mixing(index: Index, data: DataConfig, found: Survey) -> Mixing | None:
    """The mixing of a run's batches by default; None without labels, and where there are too few images."""
    if not index.has_labels or index.rows.sum() < TrainConfig.batch_size:
        return None
    settings = {"seed": TrainConfig.seed, "lanes": TrainConfig.lanes, "batch_size": TrainConfig.batch_size}
    labels = np.concatenate(found.row_labels)
    return measure(training_plan(index, data, **settings), labels.__getitem__)


def _survey(reading: Reading, data: DataConfig, decode: bool) -> pa.Table:
    return pa.table({"found": [pickle.dumps(survey(reading, data, decode=decode))]})


def _print_report(values: dict[str, Any]) -> None:
    console = Console()
    about = Table(title=values["uri"], show_header=False, title_justify="left")
    layout = f"{values['layout']}: {values['files']:,} files, {values['fragments']:,} fragments"
    about.add_row("layout", f"{layout} of at most {values['largest_fragment_rows']:,} rows")
    about.add_row("images", f"{values['images']:,}, and {values['bad_images']:,} bad")
    about.add_row("bytes", f"{values['bytes']:,}, {values['mean_bytes']:,} an image")
    for name in ("height", "width", "pixels"):
        about.add_row(name, ", ".join(f"{key} {value:,}" for key, value in values[name].items()))
    about.add_row("formats", ", ".join(f"{name} {count:,}" for name, count in values["formats"].items()))
    if values["no_labels"]:
        about.add_row("labels", escape(f"none: {values['no_labels']}"))
    if values["mixing"]:
        about.add_row("mixing", f"{Mixing(**values['mixing'])}; windows of {values['window_rows']:,} images")
    console.print(about)
    _print_counts(console, "class", values["classes"].items())
    _print_counts(
        console, "bad", [(bad["reason"], bad["images"], *bad["examples"][:1]) for bad in values["bad"]]
    )
    for hint in values["hints"]:
        console.print(f"hint: {hint}", markup=False, highlight=False)


def _print_counts(console: Console, what: str, rows: Iterable[tuple]) -> None:
    """A table of a name, its count and what else there is, cut where it is long."""
    rows = list(rows)
    if not rows:
        return
    table = Table(what, "images", *(["such as"] if len(rows[0]) > 2 else []))
    for name, count, *others in rows[:_SHOWN]:
        table.add_row(escape(name), f"{count:,}", *map(escape, others))
    if len(rows) > _SHOWN:
        table.add_row(f"and {len(rows) - _SHOWN:,} more", f"{sum(row[1] for row in rows[_SHOWN:]):,}")
    console.print(table)
