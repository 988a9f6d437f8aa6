"""The fragments of a folder of images in little memory: each part of a path once, and small integers."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

# In place of `path` and `key`: the folder of each file as a dictionary column, and its name in there. The
# schema's metadata has the part of the paths that the keys lack.
_FOLDER, _NAME, _ROOT = "folder", "name", b"root"


def is_compact(fragments: pa.Table) -> bool:
    """Whether these fragments are what compacted returns."""
    return _FOLDER in fragments.column_names


def compacted(fragments: pa.Table) -> pa.Table:
    """Fragments of one row each without the columns that the others determine; all others as they are.

    The columns: folder, name, label and, unless it counts from 0, first_sample. For names of 20 characters
    these are about 30 bytes per image, in place of 130. The sizes and times of the files are left out.
    """
    if not len(fragments) or not {"path", "key", "label"} <= set(fragments.column_names):
        return fragments
    paths, root = fragments["path"], _root(fragments)
    parts = pc.list_flatten(pc.split_pattern(paths, "/", max_splits=1, reverse=True))  # pyright: ignore
    if root is None or len(parts) != 2 * len(paths) or not np.all(fragments["rows"].to_numpy() == 1):
        return fragments
    parts, first = parts.combine_chunks(), np.arange(0, 2 * len(paths), 2)
    columns = {
        _FOLDER: _encoded(parts.take(pa.array(first))),
        _NAME: parts.take(pa.array(first + 1)),
        "label": _small(fragments["label"].to_numpy()),
    }
    samples = fragments["first_sample"].to_numpy()
    if not np.array_equal(samples, np.arange(len(samples))):
        columns["first_sample"] = _small(samples)
    return pa.table(columns).replace_schema_metadata({_ROOT: root})


def _root(fragments: pa.Table) -> str | None:
    """The part of all paths before their keys; None if that differs."""
    paths, keys = fragments["path"], fragments["key"]
    root = paths[0].as_py().removesuffix(keys[0].as_py())
    same = pc.equal(pc.binary_join_element_wise(root, keys, ""), paths)  # pyright: ignore
    return root if pc.all(same).as_py() else None  # pyright: ignore


def _encoded(folders: pa.Array) -> pa.Array:
    encoded = folders.dictionary_encode()
    return pa.DictionaryArray.from_arrays(_small(encoded.indices.to_numpy()), encoded.dictionary)


def _small(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The values in the smallest signed integers that hold all of them."""
    if not len(values):
        return values
    for kind in (np.int8, np.int16, np.int32):
        if np.iinfo(kind).min <= values.min() and values.max() <= np.iinfo(kind).max:
            return values.astype(kind)
    return values


def expanded(rows: pa.Table) -> pa.Table:
    """Compacted rows with path, key and rows; first_sample, if it was left out, remains so."""
    if not is_compact(rows):
        return rows
    root = (rows.schema.metadata or {})[_ROOT].decode()
    paths = pc.binary_join_element_wise(rows[_FOLDER].cast(pa.string()), rows[_NAME], "/")  # pyright: ignore
    columns = {
        "path": paths,
        "rows": np.ones(len(rows), np.int64),
        "label": rows["label"].cast(pa.int64()),
        "key": pc.utf8_slice_codeunits(paths, len(root)),  # pyright: ignore
    }
    if "first_sample" in rows.column_names:
        columns["first_sample"] = rows["first_sample"].cast(pa.int64())
    return pa.table(columns)


def chosen(fragments: pa.Table, rows: Int[np.ndarray, " chosen"]) -> pa.Table:
    """These rows of compacted fragments, with their sample numbers."""
    kept = fragments.take(pa.array(rows))
    if "first_sample" in kept.column_names:
        return kept
    return kept.append_column("first_sample", pa.array(_small(rows)))


def found(fragments: pa.Table, paths: set[str]) -> set[str]:
    """Those of `paths` that are files of the fragments."""
    if is_compact(fragments):
        names = pa.array({path.rpartition("/")[2] for path in paths}, pa.string())
        fragments = expanded(fragments.filter(pc.is_in(fragments[_NAME], value_set=names)))  # pyright: ignore
    there = pc.is_in(fragments["path"], value_set=pa.array(paths, pa.string()))  # pyright: ignore
    return set(fragments["path"].filter(there).unique().to_pylist())
