"""What the `data` commands do: inspect, preview, pack and embed."""

import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.datasets import absolute, image_bar, read_index
from cluster.options import Columns
from cluster.ray_cluster import cluster
from cluster.terminal import warn
from pipelines import shards, storage
from pipelines.config import DataConfig
from pipelines.formats import torchvision_source
from pipelines.images.decoding import screened
from pipelines.index import Index
from pipelines.inspection import Survey, contact_sheet, report, survey
from pipelines.labels import label_names
from pipelines.mixing import Mixing, measure
from pipelines.packing import (
    Order,
    ShardJob,
    Sizes,
    all_readings,
    direct_jobs,
    finished_parts,
    finished_shards,
    good_rows,
    mean_bytes,
    pack_shard,
    part_jobs,
    remove_parts,
    shard_jobs,
    spread,
    write_gathered,
    write_part,
)  # fmt: skip  # fmt: skip
from pipelines.plan import training_plan, window_rows
from pipelines.quarantine import BESIDE_SHARDS, Quarantine, Quarantined, decode
from pipelines.reader import Reading, read_pieces
from training.config import TrainConfig

_Job = TypeVar("_Job")

# Images that are looked at to tell how many bytes one has.
_SAMPLE = 64

# Images that a task reads at a time; features of 8,192 images of 2,048 numbers are 64 MiB.
_WINDOW_ROWS, _EMBEDDED_ROWS = 512, 8192
_EMBEDDER_CPUS = 2


def run_pack(
    source: str,
    dest: str,
    columns: Columns = Columns(),  # noqa: B008
    *,
    rows_per_shard: int | None = None,
    rows_per_group: int | None = None,
    rows_per_part: int | None = None,
    shuffle: int | Literal["none"] = 0,
) -> None:
    """Write the images at `source` as Parquet shards below `dest`, or resume where it was interrupted.

    In a random order, for the seed `shuffle`, or in the source's. Raises ValueError where source or dest will
    not do, before anything is written.
    """
    source, dest = absolute(source), storage.absolute(dest)
    data = columns.data(source)
    index = _index(source, dest, data)
    wanted = {
        **_same(index, data),
        "shuffle": "no" if shuffle == "none" else f"of all images, seed {shuffle}",
        "rows_per_shard": rows_per_shard,
        "rows_per_group": rows_per_group,
        "rows_per_part": rows_per_part,
    }
    noted = shards.claim(dest, "pack", wanted)
    if noted is None:
        per_image = mean_bytes(read_pieces(spread(index, _SAMPLE), data, own_bytes=True))
        sizes = Sizes.of(per_image, shard=rows_per_shard, group=rows_per_group, part=rows_per_part)
        noted = wanted | asdict(sizes)
        shards.note(dest, "pack", noted)
    written = {"dest": dest, "rows_per_group": noted["rows_per_group"], "classes": label_names(index)}
    if shuffle == "none" or index.random_access:
        whole = shard_jobs(index, noted["rows_per_shard"])
        jobs = whole if shuffle == "none" else direct_jobs(index, shuffle, noted["rows_per_shard"])
        reports = partial(_mapped, partial(pack_shard, data=data, **written))
        _write(dest, index, jobs, noted["rows_per_shard"], reports)
    else:
        _shuffle(dest, index, data, noted, shuffle, written)


def _shuffle(
    dest: str, index: Index, data: DataConfig, noted: dict[str, Any], seed: int, written: dict[str, Any]
) -> None:
    """Write the shards of an external shuffle by way of its parts, and remove these."""
    order = Order.of(seed, int(index.rows.sum()), noted["rows_per_shard"])
    parts = sum(1 for _ in part_jobs(index, noted["rows_per_part"]))

    def reports(jobs: Iterable[int], most: int) -> Iterator[pa.Table]:
        there = finished_parts(dest)
        missing = (job for job in part_jobs(index, noted["rows_per_part"]) if job.number not in there)
        with image_bar("shuffle", index) as shown:
            for done in _mapped(partial(write_part, data=data, dest=dest, order=order), missing):
                shown.update(done["images"][0].as_py())
        work = partial(write_gathered, order=order, parts=parts, labelled=index.has_labels, **written)
        return _mapped(work, jobs)

    _write(dest, index, range(order.shards), noted["rows_per_shard"], reports)
    remove_parts(dest)


def _mapped(work: Callable[[Any], pa.Table], jobs: Iterable[Any], most: int = 0) -> Iterator[pa.Table]:
    from pipelines.stream import map_jobs  # Ray takes seconds to import; bad input should not.

    return map_jobs(jobs, work)


def run_embed(
    run: str,
    source: str,
    dest: str,
    columns: Columns = Columns(),  # noqa: B008
    *,
    checkpoint: int | None = None,
    rows_per_shard: int | None = None,
) -> None:
    """Write the features of the images at `source`, by the encoder of `run`, as Parquet shards at `dest`.

    Raises ValueError where one of the three will not do, before anything is written.
    """
    from training.config import config_hash
    from training.embed import Embedder  # torch takes seconds to import.
    from training.export import read_trained

    run, source, dest = storage.absolute(run.rstrip("/")), absolute(source), storage.absolute(dest)
    trained = read_trained(run, checkpoint, warn)
    data = replace(trained.config.data, train=source, **columns.given)
    index = _index(source, dest, data)
    wanted = {
        **_same(index, data),
        "run": run,
        "config": config_hash(trained.config),
        "checkpoint": checkpoint,
        "rows_per_shard": rows_per_shard,
    }
    noted = shards.claim(dest, "embed", wanted)
    if noted is None:
        noted = wanted | {"checkpoint": trained.step, "rows_per_shard": rows_per_shard or _EMBEDDED_ROWS}
        shards.note(dest, "embed", noted)
    if noted["checkpoint"] != trained.step:  # The one that the shards so far were made with.
        trained = read_trained(run, noted["checkpoint"])
    embedder = Embedder(trained.config, noted["checkpoint"], data, dest, label_names(index))

    def reports(jobs: Iterable[ShardJob], most: int) -> Iterator[pa.Table]:
        from pipelines.stream import map_jobs_on_actors

        return map_jobs_on_actors(jobs, embedder, cpus=_EMBEDDER_CPUS, most=most)

    jobs = shard_jobs(index, noted["rows_per_shard"], window_rows=_WINDOW_ROWS)
    _write(dest, index, jobs, noted["rows_per_shard"], reports)


def run_preview(
    uri: str,
    output: str,
    columns: Columns = Columns(),  # noqa: B008
    *,
    recipe: str | None = None,
    size: int | None = None,
    seed: int = 0,
    images: int = 12,
) -> None:
    """Write a contact sheet of images that lie evenly over the data set at `uri`, with both views of each."""
    uri, output = absolute(uri), storage.absolute(output)
    settings = {"recipe": recipe, "view": {"size": size} if size else None}
    given = {name: value for name, value in settings.items() if value is not None}
    data = DataConfig(train=uri, **columns.given, **given)
    read = [read_pieces(spread(_index(uri, None, data), images), data)]
    (table,) = screened(read, len(read[0]))
    sheet = contact_sheet(table, data.views, seed=seed, images=images)
    try:
        storage.write(output, sheet)
    except OSError as error:
        raise ValueError(
            f"cannot write {output}: {storage.first_line(error)}; choose another file"
        ) from error
    print(
        f"{output}: {min(images, len(good_rows(table)))} images, the first and the second view of each below"
    )


def _index(uri: str, dest: str | None, data: DataConfig) -> Index:
    """The index of `uri`; ValueError where `dest` lies within, and would be read as images next time."""
    if dest is not None and f"{dest}/".startswith(f"{uri.rstrip('/')}/"):
        raise ValueError(f"{dest} lies within {uri}, whose images it would change; choose another DEST")
    return read_index(uri, data)


def _same(index: Index, data: DataConfig) -> dict[str, Any]:
    """What must be the same where an interrupted command goes on."""
    names = ("image_column", "label_column", "key_column", "key_dot", "image_ending", "max_pixels")
    columns = (index.fragments[name].to_pylist() for name in ("path", "rows", "file_bytes", "file_written"))
    files = "\n".join(" ".join(map(str, file)) for file in zip(*columns, strict=True))
    content = hashlib.sha256(files.encode()).hexdigest()[:16]
    return {
        "source": torchvision_source.plain(index.uri),
        **{name: getattr(data, name) for name in names},
        "images": int(index.rows.sum()),
        "content": content,
    }


def _write(
    dest: str,
    index: Index,
    jobs: Iterable[_Job],
    rows_per_shard: int,
    reports: Callable[[Iterable[_Job], int], Iterator[pa.Table]],
) -> None:
    """Have the shards written that are not there yet, and say what was; `reports` starts the work.

    `jobs` are those of all shards, in order.
    """
    finished, shards = finished_shards(dest), -(-int(index.rows.sum()) // rows_per_shard)
    total = Counter(shards=len(finished))
    bad: list[Quarantined] = []
    with image_bar("write", index) as shown:

        def count(report: pa.Table) -> None:
            row = report.to_pylist()[0]
            left_out = decode(row["bad"].encode())
            bad.extend(left_out)
            total.update(images=row["images"], bytes=row["bytes"])
            shown.update(row["images"] + len(left_out))

        for done in finished.values():
            count(done)
        if len(finished) < shards:
            missing = (job for number, job in enumerate(jobs) if number not in finished)
            with cluster(cpus=_EMBEDDER_CPUS):
                for done in reports(missing, shards - len(finished)):
                    total.update(shards=1)
                    count(done)
    # Once: each shard keeps its own, should this not be reached.
    quarantine = Quarantine(dest, BESIDE_SHARDS)
    quarantine.add(bad)
    quarantine.write()
    print(
        f"{dest}: {total['images']:,} images in {total['shards']:,} shards, {total['bytes'] / 2**20:,.1f} MiB"
        + (f"; {len(bad):,} bad left out: {dest}/{BESIDE_SHARDS}" if bad else "")
    )


# Images that a task reads at a time.
_SURVEY_ROWS = 512

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
    readings = all_readings(index, _SURVEY_ROWS)
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
