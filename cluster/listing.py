"""Listing a data set for a command, with a progress bar; says what lies there and is passed over."""

import sys

from cluster.progress import Bar, counted
from pipelines import storage, torchvision_source
from pipelines.config import DataConfig
from pipelines.sources import Index, build_index


def read_index(uri: str, data: DataConfig, classes: tuple[str, ...] = ()) -> Index:
    """The index of `uri`; raises ValueError as build_index does."""
    with counted(f"index {uri}", "file") as progress:
        index = build_index(uri, data, progress, classes=classes)
    if index.passed_over:
        print(index.passed_over, file=sys.stderr)
    return index


def absolute(uri: str) -> str:
    """`uri` as it means the same in every process."""
    if uri.startswith(torchvision_source.SCHEME):
        return torchvision_source.absolute(uri)
    return storage.absolute(uri)


def image_bar(what: str, index: Index) -> Bar:
    """A progress bar over the images of `index`."""
    return Bar(what, "image", int(index.rows.sum()))
