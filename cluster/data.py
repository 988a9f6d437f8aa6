"""The `data` commands pack, embed and preview."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from cluster.datasets import absolute, image_bar, read_index
from cluster.options import Columns
from cluster.ray_cluster import cluster
from cluster.terminal import warn
from pipelines import shards, storage
from pipelines.config import DataConfig
from pipelines.formats import torchvision_source
from pipelines.images.decoding import screened
from pipelines.index import Index
from pipelines.inspection import contact_sheet
from pipelines.labels import label_names
from pipelines.packing import (
    Order,
    Sizes,
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
)  # fmt: skip
from pipelines.quarantine import BESIDE_SHARDS, Quarantine, Quarantined, decode
from pipelines.reader import read_pieces

# Images to read for the mean size of an image.
_SAMPLE = 64

# Images that a task reads at a time. Features of 8,192 images of 2,048 numbers are 64 MiB.
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
    """Write the images at `source` as Parquet shards below `dest`, or resume an interrupted command.

    In a random order (seed `shuffle`), or in the order of the source. Raises ValueError for an invalid source
    or dest, before anything is written.
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
        images = int(index.rows.sum())
        sizes = Sizes.of(per_image, images, shard=rows_per_shard, group=rows_per_group, part=rows_per_part)
        noted = wanted | asdict(sizes)
        shards.note(dest, "pack", noted)
    written = {"dest": dest, "rows_per_group": noted["rows_per_group"], "classes": label_names(index)}
    seed = None if shuffle == "none" else shuffle
    _write(dest, index, noted["rows_per_shard"], _Packing(index, data, seed, noted, written).reports)
    remove_parts(dest)


@dataclass(frozen=True)
class _Packing:
    """How the shards of one `pack` command are written. seed: of the random order; None: the source's order.

    noted: the settings at the destination. written: arguments of all functions that write a shard.
    """

    index: Index
    data: DataConfig
    seed: int | None
    noted: dict[str, Any]
    written: dict[str, Any]

    def reports(self, missing: Sequence[int]) -> Iterator[pa.Table]:
        """Write the shards with the numbers `missing` on the connected cluster; their reports."""
        from pipelines.stream import cores  # Importing Ray takes seconds; errors should not wait for it.

        images = int(self.index.rows.sum())
        shards, parts = images / self.noted["rows_per_shard"], images / self.noted["rows_per_part"]
        # With fewer shards than cores, more cores can read parts. All shards count, not the missing ones:
        # else a resume would read all images again for the last few shards.
        if (self.seed is None or self.index.random_access) and shards >= min(cores(), parts):
            return self._directly(missing)
        return self._by_parts(missing)

    def _directly(self, missing: Sequence[int]) -> Iterator[pa.Table]:
        """Write each missing shard from the images themselves."""
        from pipelines.stream import map_jobs

        rows, wanted = self.noted["rows_per_shard"], set(missing)
        jobs = shard_jobs(self.index, rows) if self.seed is None else direct_jobs(self.index, self.seed, rows)
        work = partial(pack_shard, data=self.data, **self.written)
        return map_jobs((job for job in jobs if job.number in wanted), work)

    def _by_parts(self, missing: Sequence[int]) -> Iterator[pa.Table]:
        """Write the missing parts of an external sort, then each missing shard from all parts."""
        from pipelines.stream import map_jobs

        index, dest, rows = self.index, self.written["dest"], self.noted["rows_per_part"]
        order = Order.of(self.seed, int(index.rows.sum()), self.noted["rows_per_shard"])
        finished, parts = finished_parts(dest), sum(1 for _ in part_jobs(index, rows))
        jobs = (job for job in part_jobs(index, rows) if job.number not in finished)
        with image_bar("shuffle", index) as shown:
            for done in map_jobs(jobs, partial(write_part, data=self.data, dest=dest, order=order)):
                shown.update(done["images"][0].as_py())
        work = partial(write_gathered, order=order, parts=parts, labelled=index.has_labels, **self.written)
        return map_jobs(missing, work)


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

    Raises ValueError if one of the three is invalid, before anything is written.
    """
    from training.config import config_hash
    from training.embed import Embedder  # Importing torch takes seconds.
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
    if noted["checkpoint"] != trained.step:  # The checkpoint of the finished shards.
        trained = read_trained(run, noted["checkpoint"])
    embedder = Embedder(trained.config, noted["checkpoint"], data, dest, label_names(index))

    def reports(missing: Sequence[int]) -> Iterator[pa.Table]:
        from pipelines.stream import map_jobs_on_actors

        wanted = set(missing)
        jobs = shard_jobs(index, noted["rows_per_shard"], window_rows=_WINDOW_ROWS)
        jobs = (job for job in jobs if job.number in wanted)
        return map_jobs_on_actors(jobs, embedder, cpus=_EMBEDDER_CPUS, most=len(missing))

    _write(dest, index, noted["rows_per_shard"], reports)


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
    """Write a contact sheet of images spread evenly over the data set at `uri`, with both views of each."""
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
    """The index of `uri`. Raises ValueError if `dest` is inside it, and would be read as images next time."""
    if dest is not None and f"{dest}/".startswith(f"{uri.rstrip('/')}/"):
        raise ValueError(f"{dest} lies within {uri}, whose images it would change; choose another DEST")
    return read_index(uri, data)


def _same(index: Index, data: DataConfig) -> dict[str, Any]:
    """The values that must be the same to resume an interrupted command."""
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
    dest: str, index: Index, rows_per_shard: int, reports: Callable[[Sequence[int]], Iterator[pa.Table]]
) -> None:
    """Write the missing shards and print a summary; reports(missing numbers) does the work on the cluster."""
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
        if missing := [number for number in range(shards) if number not in finished]:
            with cluster(cpus=_EMBEDDER_CPUS):
                for done in reports(missing):
                    total.update(shards=1)
                    count(done)
    # Once, at the end: each shard also has its own list.
    quarantine = Quarantine(dest, BESIDE_SHARDS)
    quarantine.add(bad)
    quarantine.write()
    print(
        f"{dest}: {total['images']:,} images in {total['shards']:,} shards, {total['bytes'] / 2**20:,.1f} MiB"
        + (f"; {len(bad):,} bad left out: {dest}/{BESIDE_SHARDS}" if bad else "")
    )
