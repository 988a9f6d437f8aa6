"""Read and write files by URI, on this machine or in object storage."""

from pipelines.storage.files import (
    check_folder,
    exists,
    join,
    listing,
    make_folder,
    names,
    read,
    read_as,
    remove,
    remove_partials,
    write,
)
from pipelines.storage.filesystems import (
    absolute,
    resolve,
)
from pipelines.storage.retry import (
    briefly,
    first_line,
    patience,
    reading_again,
    retrying,
    transient,
    way_out,
)

__all__ = [
    "absolute",
    "briefly",
    "check_folder",
    "exists",
    "first_line",
    "join",
    "listing",
    "make_folder",
    "names",
    "patience",
    "read",
    "read_as",
    "reading_again",
    "remove",
    "remove_partials",
    "resolve",
    "retrying",
    "transient",
    "way_out",
    "write",
]
