"""The `diptych data` commands."""

from typing import Annotated, Literal

from cyclopts import App, Parameter, validators

from cluster.options import Columns

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]

data = App(name="data", help="Pack, inspect, preview and embed data sets, given as for --data.train.")

# How images are read, as flags without a prefix.
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
    """Write images as Parquet shards in a random order, keeping their bytes.

    The same command resumes after an interruption.

    Parameters
    ----------
    source
        A data set, or one of torchvision's such as 'torchvision:CIFAR10?root=DIR&train=true', with the
        arguments of its class; download=true downloads it. On a cluster, DIR must exist on every node.
    dest
        Folder of the shards: a path, file://, s3://, gs:// or az://.
    rows_per_shard
        Images in a shard; unset: about 128 MB of them.
    rows_per_group
        Images in a row group, which is read at once; unset: about 8 MB of them, at most 1,024.
    rows_per_part
        Images that a task shuffles at once; unset: a 64th of all, at least 2,048 or 16 MB and at most 256 MB,
        which take about 1 GB of memory.
    shuffle
        Seed of the random order, in which all images are shuffled; none: keep the source's order.
    """
    from cluster.data import run_pack

    sizes = {
        "rows_per_shard": rows_per_shard,
        "rows_per_group": rows_per_group,
        "rows_per_part": rows_per_part,
    }
    run_pack(source, dest, columns, **sizes, shuffle=shuffle)


@data.command
def digits(dest: str, /, *, count: Count = 4096, by_class: bool = False) -> None:
    """Write handwritten digits on coloured canvases as PNG files: images to try diptych on.

    They are drawn from scikit-learn's 8 x 8 digits, without their labels, and need no network. `diptych train
    demo --data.train DEST` trains on them.

    Parameters
    ----------
    dest
        A new folder: a path, file://, s3://, gs:// or az://.
    count
        Images to write.
    by_class
        Write them into a folder for each digit.
    """
    # scikit-learn takes seconds to import; help should not.
    from cluster.digits import write_digits

    write_digits(dest, count, by_class=by_class)


@data.command
def inspect(
    uri: str,
    /,
    *,
    decode: bool = False,
    json: bool = False,
    cost: Annotated[float, Parameter(validator=validators.Number(gte=0))] | None = None,
    columns: ColumnFlags = Columns(),  # noqa: B008
) -> None:
    """Count the images of a data set by class, size, format and fault.

    Parameters
    ----------
    uri
        A data set.
    decode
        Also decode every image, to find those that are broken after the header.
    json
        Print JSON.
    cost
        Price of 1,000 requests to the storage, such as 0.0004: also estimate the requests, the bytes and the
        price of an epoch.
    """
    from cluster.inspection import run_inspect

    run_inspect(uri, columns, decode=decode, as_json=json, cost=cost)


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
        Recipe of the views: simclr, simclr-cifar, byol, supervised or evaluation; unset: simclr.
    size
        Height and width of the views; unset: the recipe's.
    seed
        Seed of the views.
    images
        Number of images, taken evenly from the data set.
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
    """Write the features of images from a run's encoder as Parquet: key, path, label, class, feature.

    Images are preprocessed as in the run's evaluation. The same command resumes after an interruption.

    Parameters
    ----------
    run
        OUTPUT/NAME of the run: a path, file://, s3://, gs:// or az://.
    uri
        A data set.
    dest
        Folder of the shards: a path, file://, s3://, gs:// or az://.
    checkpoint
        Step of the checkpoint; unset: the newest.
    rows_per_shard
        Images in a shard; unset: 8,192.
    """
    from cluster.data import run_embed

    run_embed(run, uri, dest, columns, checkpoint=checkpoint, rows_per_shard=rows_per_shard)
