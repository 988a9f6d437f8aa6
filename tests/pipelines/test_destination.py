"""Only the same command may resume what a command has begun."""

from pathlib import Path

import pytest

from pipelines import shards


def test_the_same_command_finds_what_it_noted(tmp_path: Path):
    dest = str(tmp_path / "dest")
    assert shards.claim(dest, "pack", {"source": "a", "rows_per_shard": None}) is None
    shards.note(dest, "pack", {"source": "a", "rows_per_shard": 8})
    noted = shards.claim(dest, "pack", {"source": "a", "rows_per_shard": None})
    assert noted == {"command": "pack", "source": "a", "rows_per_shard": 8}


def test_what_differs_is_named_with_both_values(tmp_path: Path):
    shards.note(str(tmp_path), "pack", {"source": "a", "rows_per_shard": 8})
    with pytest.raises(ValueError, match=r"another source \(a there, b here\), rows_per_shard \(8 there, 9"):
        shards.claim(str(tmp_path), "pack", {"source": "b", "rows_per_shard": 9})
    with pytest.raises(ValueError, match="was written by `diptych data pack`"):
        shards.claim(str(tmp_path), "embed", {})


def test_a_folder_with_other_files_is_taken(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"is not empty: it holds .*mine\.txt"):
        shards.claim(str(tmp_path), "pack", {})


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write .*file/dest"):
        shards.note(str(tmp_path / "file" / "dest"), "pack", {})
