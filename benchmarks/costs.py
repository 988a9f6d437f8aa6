"""How the cost of listing and reading grows with a data set, at three sizes, beside plain loops of pyarrow.

    python benchmarks/costs.py    # or --sizes 2500 5000 10000

Prints seconds of CPU and bytes read for each size and, from the first and the last, the exponent: 1 where the
cost grows as the data set does. Images are a few bytes, so that what is measured is the work beside them.
"""

import argparse
import io
import json
import math
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.labels import read_labels
from pipelines.plan import Piece
from pipelines.reader import Reading, read_pieces
from training.metrics import MetricsLog, read_metrics

_DATA = DataConfig(train="")
_SIZES = [2_500, 5_000, 10_000]
_WINDOWS = 3

# The least PNG, of one pixel.
_IMAGE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000"
    "0400017f2a4b450000000049454e44ae426082"
)

Cost = tuple[float, int]


def measured(call: Callable[[], object]) -> Cost:
    """Seconds of this process's CPU that `call` takes, and bytes that it reads."""
    bytes_before, before = _bytes_read(), time.process_time()
    call()
    return time.process_time() - before, _bytes_read() - bytes_before


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _write_parquet(folder: Path, groups: int) -> None:
    columns = {"image": [_IMAGE] * groups, "label": np.arange(groups) % 1000}
    pq.write_table(pa.table(columns), folder / "0.parquet", row_group_size=1)


def _write_tar(folder: Path, images: int) -> None:
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(images):
            for ending, content in ((".png", _IMAGE), (".cls", b"%d" % (number % 1000))):
                member = tarfile.TarInfo(f"{number:09}{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_folder(folder: Path, images: int) -> None:
    for number in range(images):
        place = folder / f"class{number % 100:03}"
        place.mkdir(exist_ok=True)
        (place / f"{number:09}.png").write_bytes(_IMAGE)


def _labels(folder: Path) -> Cost:
    index = build_index(str(folder), _DATA)
    return measured(lambda: read_labels(index, _DATA, lambda done, count: None))


def _labels_by_pyarrow(folder: Path) -> Cost:
    return measured(lambda: pq.read_table(folder / "0.parquet", columns=["label"]))


def _order(groups: int) -> list[list[int]]:
    order = np.random.default_rng(0).permutation(groups)
    return [order[start::_WINDOWS].tolist() for start in range(_WINDOWS)]


def _windows(folder: Path) -> Cost:
    index = build_index(str(folder), _DATA)
    windows = [[Piece(fragment, 0, 1) for fragment in window] for window in _order(len(index.rows))]
    return measured(lambda: [read_pieces(Reading.of(index, pieces), _DATA) for pieces in windows])


def _windows_by_pyarrow(folder: Path) -> Cost:
    def read() -> None:
        with pq.ParquetFile(folder / "0.parquet") as file:
            for window in _order(file.num_row_groups):
                file.read_row_groups(window)

    return measured(read)


def _index(folder: Path) -> Cost:
    return measured(partial(build_index, str(folder), _DATA))


def _tar_by_tarfile(folder: Path) -> Cost:
    def read() -> None:
        with tarfile.open(folder / "0.tar") as tar:
            for _ in tar:
                pass

    return measured(read)


def _list_by_pyarrow(folder: Path) -> Cost:
    selector = fs.FileSelector(str(folder), recursive=True)
    return measured(lambda: fs.LocalFileSystem().get_file_info(selector))


def _write_metrics(folder: Path, tens: int) -> None:
    log = MetricsLog(str(folder), 0)
    for step in range(1, 10 * tens + 1):
        log.append(step=step, epoch=1, loss=1 / step, learning_rate=0.1 / step, images_per_second=1e3 / step)
        if step % 100 == 0:
            log.flush()


def _metrics(folder: Path) -> Cost:
    return measured(lambda: read_metrics(str(folder)).having("loss").column("loss"))


def _metrics_by_json(folder: Path) -> Cost:
    def read() -> None:
        with (folder / "metrics.jsonl").open() as file:
            [json.loads(line)["loss"] for line in file]

    return measured(read)


_CASES = {
    "labels of so many row groups": (_write_parquet, _labels, "pq.read_table", _labels_by_pyarrow),
    "three windows of so many row groups": (_write_parquet, _windows, "one ParquetFile", _windows_by_pyarrow),
    "index of a tar of so many images": (_write_tar, _index, "tarfile", _tar_by_tarfile),
    "index of a folder of so many images": (_write_folder, _index, "the listing alone", _list_by_pyarrow),
    "losses of ten times so many steps": (_write_metrics, _metrics, "json.loads a line", _metrics_by_json),
}


def _print_case(name: str, sizes: list[int]) -> None:
    write, mine, peer, theirs = _CASES[name]
    costs: dict[str, list[Cost]] = {"diptych": [], peer: []}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), size)
            for who, measure in (("diptych", mine), (peer, theirs)):
                measure(Path(folder))  # What is imported or opened once is not the data set's.
                costs[who].append(measure(Path(folder)))
    print(name)
    for who, found in costs.items():
        grown = math.log(found[-1][0] / found[0][0]) / math.log(sizes[-1] / sizes[0])
        shown = "".join(f"{seconds:9.3f} s {read / 1e6:8.1f} MB" for seconds, read in found)
        print(f"    {who:18}{shown}   exponent {grown:.2f}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=_SIZES, help="row groups, images or tens of steps"
    )
    sizes = parser.parse_args().sizes
    print(f"sizes: {', '.join(f'{size:,}' for size in sizes)}")
    for name in _CASES:
        _print_case(name, sizes)


if __name__ == "__main__":
    main()
