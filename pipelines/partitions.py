"""Labels that stand in the paths of files, as in label=3/, which Hive, Spark and pyarrow write."""

import re
from collections.abc import Sequence
from urllib.parse import unquote

import numpy as np
from jaxtyping import Int

# What stands for no value.
_NONE = "__HIVE_DEFAULT_PARTITION__"

_NUMBER = re.compile(r"-?\d{1,18}")

# The label of each file, and the names of the labels where they have names.
Labels = tuple[Int[np.ndarray, " files"], tuple[str, ...]]


def partition_values(paths: Sequence[str], column: str) -> list[str | None]:
    """The value that the folders of each path have for the column, or None where they have none."""
    return [_value(path, f"{column}=") for path in paths]


def value_labels(values: Sequence[str]) -> Labels:
    """The values themselves where all are whole numbers, else their places among all of them, sorted."""
    if all(_NUMBER.fullmatch(value) for value in values):
        return np.array([int(value) for value in values], np.int64), ()
    return name_labels(values)


def name_labels(names: Sequence[str]) -> Labels:
    """Each name's place among all of them, sorted."""
    classes, labels = np.unique(np.array(names), return_inverse=True)
    return labels.astype(np.int64), tuple(classes.tolist())


def _value(path: str, prefix: str) -> str | None:
    if prefix not in path:
        return None
    named = [part for part in path.split("/")[:-1] if part.startswith(prefix)]
    value = unquote(named[-1].removeprefix(prefix)) if named else _NONE
    return None if value == _NONE else value
