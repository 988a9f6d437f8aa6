"""How the costs of listing, reading and packing grow with a data set, at three sizes, beside plain loops.

    python benchmarks/costs.py    # or --sizes 10000 100000 500000 --only folder

Prints milliseconds of CPU and megabytes read (or sent) for each size and, from the first and the last, the
exponent: 1 if the cost is proportional to the size. Images are a few bytes, so the figures are of the work
beside the pixels. Everything runs in this process. The peer of kNN is faiss (`pip install faiss-cpu`) or,
without it, a matrix product in PyTorch.
"""

import argparse
import io
import json
import math
import pickle
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pyarrow import fs

from pipelines.config import DataConfig
from pipelines.index import Index, build_index
from pipelines.inspection import survey_all, survey_jobs
from pipelines.labels import read_labels
from pipelines.packing import Order, Sizes, part_jobs, write_gathered, write_part
from pipelines.plan import Piece
from pipelines.quarantine import Quarantine, Quarantined
from pipelines.reader import Reading, read_pieces
from training.config import EvaluationConfig
from training.evaluation.knn import knn_accuracy
from training.gather import LocalGather
from training.metrics import MetricsLog, read_metrics

try:
    import faiss  # pyright: ignore[reportMissingImports]
except ImportError:
    faiss = None

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
    """Seconds of CPU of this process for `call`, and bytes that it reads."""
    bytes_before, before = _bytes_read(), time.process_time()
    call()
    return time.process_time() - before, _bytes_read() - bytes_before


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _write_parquet(folder: Path, groups: int) -> None:
    columns = {"image": [_IMAGE] * groups, "label": np.arange(groups) % 1000}
    pq.write_table(pa.table(columns), folder / "0.parquet", row_group_size=1)


def _write_row_group(folder: Path, rows: int) -> None:
    columns = {"image": [_IMAGE] * rows, "label": np.arange(rows) % 1000}
    pq.write_table(pa.table(columns), folder / "0.parquet", row_group_size=rows)


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


def _sent(make: Callable[[], object]) -> Cost:
    """Seconds of CPU to make and pickle an object, and the bytes of the pickle."""
    before = time.process_time()
    size = len(pickle.dumps(make()))
    return time.process_time() - before, size


def _sent_index(folder: Path) -> Cost:
    return _sent(build_index(str(folder), _DATA).compacted)


def _sent_paths(folder: Path) -> Cost:
    paths = build_index(str(folder), _DATA).paths
    return _sent(lambda: paths)


def _held_out(folder: Path) -> tuple[Index, Index]:
    return build_index(str(folder), _DATA).split(0.1, seed=0)


def _sent_row_group(folder: Path) -> Cost:
    kept, _ = _held_out(folder)
    return _sent(lambda: Reading.of(kept, [Piece(0, 0, int(kept.rows[0]))]))


def _sent_rows(folder: Path) -> Cost:
    kept, _ = _held_out(folder)
    return _sent(lambda: kept.samples.astype(np.int32))


def _inspect(folder: Path) -> Cost:
    index = build_index(str(folder), _DATA)
    return measured(lambda: [survey_all(job, _DATA, decode=False) for job in survey_jobs(index, cores=2)])


def _sizes_by_pillow(folder: Path) -> Cost:
    paths = build_index(str(folder), _DATA).paths
    return measured(lambda: [Image.open(io.BytesIO(Path(path).read_bytes())).size for path in paths])


def _pack(folder: Path) -> Cost:
    index = build_index(str(folder), _DATA)
    images = int(index.rows.sum())
    sizes = Sizes.of(index.image_bytes, images, shard=None, group=None, part=None)
    order = Order.of(0, images, sizes.rows_per_shard)

    def pack() -> None:
        with tempfile.TemporaryDirectory() as dest:
            parts = [write_part(job, _DATA, dest, order) for job in part_jobs(index, sizes.rows_per_part)]
            for number in range(order.shards):
                write_gathered(
                    number, dest, order, parts=len(parts), labelled=True,
                    rows_per_group=sizes.rows_per_group, classes=(),
                )  # fmt: skip

    return measured(pack)


def _pack_by_pyarrow(folder: Path) -> Cost:
    paths = build_index(str(folder), _DATA).paths

    def pack() -> None:
        images = [Path(path).read_bytes() for path in np.random.default_rng(0).permutation(paths)]
        pq.write_table(pa.table({"image": images}), folder / "packed", compression="none")

    return measured(pack)


def _quarantined(folder: Path) -> Cost:
    known = Quarantine(str(folder))
    known.add([Quarantined("new.jpg", "new", "truncated JPEG", -1)])
    index = build_index(str(folder / "images"), _DATA)
    known.check(index, 1.0)
    known.add([Quarantined("newer.jpg", "newer", "truncated JPEG", -2)])

    def settle() -> None:
        known.write()
        known.check(index, 1.0)

    return measured(settle)


def _write_quarantine(folder: Path, images: int) -> None:
    (folder / "images").mkdir()
    _write_folder(folder / "images", 1)
    known = Quarantine(str(folder))
    known.add(Quarantined(f"{number}.jpg", f"{number}", "truncated JPEG", number) for number in range(images))
    known.write()


def _append_line(folder: Path) -> Cost:
    def append() -> None:
        with (folder / "lines").open("a") as file:
            file.write(
                json.dumps({"path": "new.jpg", "key": "new", "reason": "truncated JPEG", "sample": -1})
            )

    return measured(append)


def _write_features(folder: Path, images: int) -> None:
    generator = np.random.default_rng(0)
    np.save(folder / "features.npy", generator.standard_normal((images, 512), np.float32))


def _features(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    bank = torch.nn.functional.normalize(torch.from_numpy(np.load(folder / "features.npy")))
    return bank, bank[::5].clone()


def _knn(folder: Path) -> Cost:
    bank, queries = _features(folder)
    labels = torch.arange(len(bank)) % 100
    config = EvaluationConfig(neighbours=200)
    return measured(lambda: knn_accuracy((bank, labels), (queries, labels[::5]), config, LocalGather()))


def _knn_by_peer(folder: Path) -> Cost:
    bank, queries = _features(folder)
    if faiss is None:
        return measured(lambda: (queries @ bank.T).topk(200))
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    return measured(lambda: index.search(queries.numpy(), 200))


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
    "that index as it is sent": (_write_folder, _sent_index, "the paths", _sent_paths),
    "a row group of so many rows less a tenth, as a job": (
        _write_row_group,
        _sent_row_group,
        "32-bit numbers",
        _sent_rows,
    ),
    "inspection of a folder of so many images": (_write_folder, _inspect, "Pillow", _sizes_by_pillow),
    "pack of a folder of so many images": (_write_folder, _pack, "pq.write_table", _pack_by_pyarrow),
    "one bad image where so many are known": (
        _write_quarantine,
        _quarantined,
        "an appended line",
        _append_line,
    ),
    "kNN of so many images by a fifth as many": (
        _write_features,
        _knn,
        "faiss" if faiss else "torch",
        _knn_by_peer,
    ),
    "losses of ten times so many steps": (_write_metrics, _metrics, "json.loads a line", _metrics_by_json),
}


def _print_case(name: str, sizes: list[int]) -> None:
    write, mine, peer, theirs = _CASES[name]
    costs: dict[str, list[Cost]] = {"diptych": [], peer: []}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), size)
            for who, measure in (("diptych", mine), (peer, theirs)):
                measure(Path(folder))  # Imports, and files that are opened once.
                costs[who].append(measure(Path(folder)))
    print(name)
    for who, found in costs.items():
        grown = math.log(found[-1][0] / found[0][0]) / math.log(sizes[-1] / sizes[0])
        shown = "".join(f"{1e3 * seconds:9.1f} ms {read / 1e6:8.3f} MB" for seconds, read in found)
        print(f"    {who:18}{shown}   exponent {grown:.2f}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=_SIZES, help="row groups, images or tens of steps"
    )
    parser.add_argument("--only", default="", help="a part of the names of the cases to measure")
    arguments = parser.parse_args()
    print(f"sizes: {', '.join(f'{size:,}' for size in arguments.sizes)}")
    for name in _CASES:
        if arguments.only in name:
            _print_case(name, arguments.sizes)


if __name__ == "__main__":
    main()
