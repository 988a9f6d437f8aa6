"""The `diptych data` commands."""

from typing import Annotated, Literal

from cyclopts import App, Parameter, validators

from cluster.options import Columns

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]

data = App(
    name="data", help="Pack, inspect, preview and embed data sets; a data set is what --data.train takes."
)

# The settings of how images are read, as flags without a prefix.
ColumnFlags = Annotated[Columns, Parameter(name="*")]


@data.command
def pack(
    source: str,
    dest: str,
    /,
    *,
    rows_per_shard: Count | None = None,
    rows_per_group: Count | None = None,
    rows_per_part: Count | None = None,
    shuffle: int | Literal["none"] = 0,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Write images as Parquet shards, in a random order; their bytes are kept.

    The same command resumes after an interruption.

    Parameters
    ----------
    source
        A data set, or one of torchvision's, as 'torchvision:CIFAR10?root=DIR&train=true': the arguments are
        the class's; with download=true it is fetched. On a cluster, DIR must be there on every node.
    dest
        Folder of the shards: a path, file://, s3://, gs:// or az://.
    rows_per_shard
        Images of a shard; unset: about 128 MB of them.
    rows_per_group
        Images of a row group, which is read at once; unset: about 8 MB of them, at most 1,024.
    rows_per_part
        Images that a task shuffles at once; unset: about 256 MB of them, for which it takes about 1 GB.
    shuffle
        Seed of the order in which images are written, all shuffled; none: the source's order.
    """
    from cluster.data import run_pack

    sizes = {
        "rows_per_shard": rows_per_shard,
        "rows_per_group": rows_per_group,
        "rows_per_part": rows_per_part,
    }
    run_pack(source, dest, columns, **sizes, shuffle=shuffle)


@data.command
def inspect(
    uri: str,
    /,
    *,
    decode: bool = False,
    json: bool = False,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Count the images of a data set by class, size, format and fault.

    Parameters
    ----------
    uri
        A data set.
    decode
        Decode every image too, to find those that are broken behind their header.
    json
        Print JSON.
    """
    from cluster.data import run_inspect

    run_inspect(uri, columns, decode=decode, as_json=json)


@data.command
def preview(
    uri: str,
    /,
    *,
    output: Annotated[str, Parameter(alias="-o")] = "preview.png",
    recipe: str | None = None,
    size: Annotated[int, Parameter(validator=validators.Number(gte=8))] | None = None,
    seed: int = 0,
    images: Count = 12,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Draw a contact sheet: images, and the first and the second view of each.

    Parameters
    ----------
    uri
        A data set.
    output
        The PNG to write: a path, file://, s3://, gs:// or az://.
    recipe
        Named recipe of the views: simclr, simclr-cifar, byol, supervised or evaluation; unset: simclr.
    size
        Height and width of the views; unset: the recipe's.
    seed
        Seed of the views.
    images
        How many images, taken evenly from the data set.
    """
    from cluster.data import run_preview

    run_preview(uri, output, columns, recipe=recipe, size=size, seed=seed, images=images)


@data.command
def embed(
    run: str,
    uri: str,
    dest: str,
    /,
    *,
    checkpoint: int | None = None,
    rows_per_shard: Count | None = None,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Write the features of images by a run's encoder as Parquet: key, path, label, class, feature.

    They are seen as the run's evaluation sees them. The same command goes on after an interruption.

    Parameters
    ----------
    run
        OUTPUT/NAME of the run: a path, file://, s3://, gs:// or az://.
    uri
        A data set.
    dest
        Folder of the shards: likewise.
    checkpoint
        Step of the checkpoint; unset: the newest.
    rows_per_shard
        Images of a shard; unset: 8,192.
    """
    from cluster.data import run_embed

    run_embed(run, uri, dest, columns, checkpoint=checkpoint, rows_per_shard=rows_per_shard)
