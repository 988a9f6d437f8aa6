"""The `data inspect` command."""

import json
import pickle
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.datasets import absolute, image_bar, read_index
from cluster.options import Columns
from cluster.ray_cluster import cluster
from pipelines.config import DataConfig
from pipelines.epoch_cost import EpochCost, epoch_cost
from pipelines.index import Index
from pipelines.inspection import Survey, report, survey_all, survey_jobs
from pipelines.labels import label_names
from pipelines.mixing import Mixing, measure
from pipelines.plan import Plan, training_plan, window_rows
from pipelines.reader import Reading
from training.config import TrainConfig

# Most reasons and classes in a table on the terminal.
_SHOWN = 20


def run_inspect(
    uri: str,
    columns: Columns = Columns(),  # noqa: B008
    *,
    decode: bool = False,
    as_json: bool = False,
    cost: float | None = None,
) -> dict[str, Any]:
    """Print a summary of the images at `uri`, and return it. Raises ValueError if there are none.

    cost: price of 1,000 requests; the summary then has the requests, bytes and price of an epoch.
    """
    uri = absolute(uri)
    data = columns.data(uri)
    index = read_index(uri, data)
    plan = _plan(index, data)
    epoch = None if cost is None else _epoch(index, plan, cost)
    found = Survey()
    with cluster(cpus=1), image_bar("inspect", index) as shown:
        from pipelines.stream import cores, map_jobs

        jobs = survey_jobs(index, cores())
        for table in map_jobs(jobs, partial(_survey, data=data, decode=decode)):
            part: Survey = pickle.loads(table["found"][0].as_py())
            found.add(part)
            shown.update(part.images + part.bad_images)
    rows = window_rows(index, data)
    values = report(index, found, label_names(index), rows, _mixing(index, plan, found))
    if epoch:
        values["epoch"] = asdict(epoch)
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        _print_report(values)
    return values


def _plan(index: Index, data: DataConfig) -> Plan | None:
    """The plan of a run with default settings; None if there are too few images."""
    if index.rows.sum() < TrainConfig.batch_size:
        return None
    settings = {"seed": TrainConfig.seed, "lanes": TrainConfig.lanes, "batch_size": TrainConfig.batch_size}
    return training_plan(index, data, **settings)


def _mixing(index: Index, plan: Plan | None, found: Survey) -> Mixing | None:
    """The mixing of the batches of `plan`; None without a plan or without labels."""
    if plan is None or not index.has_labels:
        return None
    return measure(plan, np.concatenate(found.row_labels).__getitem__)


def _epoch(index: Index, plan: Plan | None, price: float) -> EpochCost:
    """The cost of an epoch at `price` for 1,000 requests. Raises ValueError if it cannot be counted."""
    if plan is None:
        raise ValueError(
            f"--cost counts the steps of an epoch, and {index.uri} has fewer images than a batch of "
            f"{TrainConfig.batch_size}; leave out --cost"
        )
    from pipelines.stream import READERS  # Importing Ray takes seconds; errors should not wait for it.

    cost = epoch_cost(index, plan, price=price, readers=READERS)
    if cost is None:
        raise ValueError(f"{index.uri} is not read from object storage; leave out --cost")
    return cost


def _survey(readings: Iterable[Reading], data: DataConfig, decode: bool) -> pa.Table:
    return pa.table({"found": [pickle.dumps(survey_all(readings, data, decode=decode))]})


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
    if values.get("epoch"):
        about.add_row("epoch", str(EpochCost(**values["epoch"])))
    console.print(about)
    _print_counts(console, "class", values["classes"].items())
    _print_counts(
        console, "bad", [(bad["reason"], bad["images"], *bad["examples"][:1]) for bad in values["bad"]]
    )
    for hint in values["hints"]:
        console.print(f"hint: {hint}", markup=False, highlight=False)


def _print_counts(console: Console, what: str, rows: Iterable[tuple]) -> None:
    """Print a table of names, counts and further columns, with at most _SHOWN names."""
    rows = list(rows)
    if not rows:
        return
    table = Table(what, "images", *(["such as"] if len(rows[0]) > 2 else []))
    for name, count, *others in rows[:_SHOWN]:
        table.add_row(escape(name), f"{count:,}", *map(escape, others))
    if len(rows) > _SHOWN:
        table.add_row(f"and {len(rows) - _SHOWN:,} more", f"{sum(row[1] for row in rows[_SHOWN:]):,}")
    console.print(table)
