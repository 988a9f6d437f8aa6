"""What 1 to 1,024 workers should do, by pieces that are measured here; and the plan of 1e9 images.

    python benchmarks/scale.py    # the demo's images and networks: 3 minutes on two cores
    python benchmarks/scale.py PHOTOGRAPHS --config simclr-imagenet-resnet50 --step-seconds 0:0.025 128:0.127

Measures the bytes of an image, what its views take of a core, what each of two real workers brings to a
step's collectives and, unless --step-seconds says it, the time of steps; those of one and of two workers are
held against what the model expects of them. Then prints what the model expects of clusters, with the global
batch fixed and with each worker's; scale_model.py says what it assumes. At last makes the index of up to 1e9
images in 1e6 shards that are only on paper, and lists what one worker of 1 to 1,024 reads in an epoch:
seconds of CPU and the peak of memory, each in a fresh process.
"""

import argparse
import math
import os
import platform
import sys
import tempfile
from importlib.metadata import version

from benchmarks.comparison import add_json_option, write_json
from benchmarks.scale_model import Curve, Expected, Link, Pieces, Traffic, expected, reading
from benchmarks.scale_plan import Job, growth, print_simulation
from pipelines.sources import build_index
from pipelines.windows import window_rows
from training.config import TrainConfig

_DIGITS = 2048

# Of the images that are only on paper, and have no bytes.
_WINDOW_ROWS = 1024

_HEADER = """\
         images/s, gradients   communi-           read, Gbit/s    sent, Gbit/s   epoch   held
workers     after      during     cation  limit     all     each          each     min     GB"""


def _steps(text: str) -> tuple[int, float]:
    images, seconds = text.split(":")
    return int(images), float(seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", help="Parquet files of images with a column image; unset: digits of its own")
    add("--config", default="demo", help="the shipped config whose networks and views these are")
    add("--workers", type=int, nargs="*", default=[2**n for n in range(11)], help="none: only the plan")
    add_json_option(parser)
    add(
        "--lanes", type=int, default=1024, help="on paper; as many as divide the batch, where that is smaller"
    )
    add("--batch-size", type=int, default=4096, help="the global batch that is fixed")
    add("--local-batch-size", type=int, default=64, help="each worker's batch that is fixed")
    add("--images", type=int, default=1_281_167, help="of an epoch; ImageNet's")
    add("--gbit", type=float, default=25.0, help="bandwidth of a worker's link, each way")
    add("--latency-us", type=float, default=20.0, help="until a message is at the next worker")
    add("--view-cores", type=float, default=8.0, help="cores that make a worker's views, beside its step")
    add("--step-seconds", type=_steps, nargs="+", metavar="IMAGES:SECONDS", help="a worker's steps on some "
        "device, by its images; unset: measured here, on a core")  # fmt: skip
    add("--pair-seconds", type=float, help="of NT-Xent for two rows on that device; unset: measured here")
    add("--measured-batch-size", type=int, default=128, help="global batch of the steps that are measured")
    add("--rounds", type=int, default=6, help="of the steps; of the plan half as many")
    add("--shards", type=int, nargs="*", default=[10**4, 10**5, 10**6], help="of 1,000 images; none: no plan")
    add("--groups", type=int, default=1, help="row groups in each of these shards")
    add("--serving", type=int, nargs="+", default=[1, 8, 64, 512, 1024], help="workers that share them")
    return parser.parse_args()


def _config(arguments: argparse.Namespace, folder: str) -> TrainConfig:
    """The config whose steps these are; its images are in `folder` unless the user has some."""
    # Processes that measure memory import this file, and torch is large.
    from benchmarks import scale_pieces

    if not arguments.folder:
        scale_pieces.write_digits(folder, _DIGITS)
    config = scale_pieces.read_config(arguments.config, arguments.folder or folder)
    if config.objective != "simclr":
        sys.exit(f"--config {arguments.config} trains {config.objective}; the model is of SimCLR's NT-Xent")
    return config


def _pieces(arguments: argparse.Namespace, config: TrainConfig) -> tuple[Pieces, int]:
    """The pieces, printed as they are measured; rows of a row group."""
    from benchmarks import scale_pieces, scale_steps

    index = build_index(config.data.train, config.data)
    stored, views = scale_pieces.stored_bytes(index), scale_pieces.view_seconds(config, index)
    print(
        f"an image: {scale_pieces.image_bytes(config, index):,.0f} bytes, {stored:,.0f} as stored;", end=" "
    )
    print(f"both views: {1e3 * views:.3f} ms of a core", flush=True)
    if arguments.step_seconds:
        traffic = scale_pieces.count(config, index)
        alone = among = Curve(tuple(arguments.step_seconds))
        pair = arguments.pair_seconds or scale_steps.pair_seconds(config)
    else:
        batch = arguments.measured_batch_size
        traffic, rounds = scale_steps.measure(config, index, batch=batch, rounds=arguments.rounds)
        scale_steps.print_validity(traffic, rounds, batch)
        best = scale_steps.fastest(rounds)
        alone, among, pair = best.alone, best.among, best.pair
    pieces = Pieces(stored, views, traffic, alone, among, pair)
    _print_pieces(pieces, scale_pieces.formula(config, index))
    return pieces, int(index.rows.max())


def _print_pieces(pieces: Pieces, formula: Traffic) -> None:
    print("\nWhat a worker brings to a step's collectives: counted in one of two real ones (by formula)")
    for name in ("projections", "statistics", "statistics_gradients", "gradients"):
        counted, other = getattr(pieces.traffic, name), getattr(formula, name)
        what = f"{name.replace('s_gradients', 's, their gradients')}{', an image' * (name == 'projections')}"
        print(f"  {what:<29} {counted.bytes:>13,.0f} ({other.bytes:,}) bytes, {counted.calls} calls")
    for name, curve in {"the only one": pieces.alone, "one of several": pieces.among}.items():
        points = ", ".join(f"{images}: {1e3 * seconds:.1f}" for images, seconds in sorted(curve.points))
        print(f"Arithmetic of a worker's step as {name}, ms by images: {points}")
    print(f"NT-Xent of two rows, forward and backward: {1e9 * pieces.pair:.3g} ns")


def _print_expected(arguments: argparse.Namespace, pieces: Pieces, group_rows: int, window_rows: int) -> None:
    print(
        f"\nExpected by computation, not measured: {arguments.images:,} images an epoch, {group_rows:,} in\n"
        f"a row group; {arguments.gbit:g} Gbit/s, {arguments.latency_us:g} us and {arguments.view_cores:g} "
        "cores for views for each worker. Gradients are\nsummed after or during the backward pass; all that "
        "follows is of the latter. held: encoded images in windows."
    )
    for name, fixed in (("in all", arguments.batch_size), ("a worker", None)):
        print(f"\n{fixed or arguments.local_batch_size:,} images a step {name}\n{_HEADER}")
        for workers in arguments.workers:
            batch_size = fixed or workers * arguments.local_batch_size
            if batch_size % workers == 0:
                _print_row(arguments, pieces, workers, batch_size, group_rows, window_rows)


def _print_row(
    arguments: argparse.Namespace,
    pieces: Pieces,
    workers: int,
    batch_size: int,
    group_rows: int,
    window_rows: int,
) -> None:
    lanes = math.gcd(arguments.lanes, batch_size)
    read = reading(
        arguments.images, group_rows=group_rows, lanes=lanes, batch_size=batch_size, window_rows=window_rows
    )
    step: Expected = expected(
        pieces, Link(arguments.latency_us / 1e6, arguments.gbit * 1e9 / 8), workers=workers,
        batch_size=batch_size, view_cores=arguments.view_cores, excess=read.excess,
    )  # fmt: skip
    reads, sends = (8e-9 * amount / step.overlapped_seconds for amount in (step.read_bytes, step.sent_bytes))
    print(
        f"{workers:7,} {batch_size / step.seconds:9,.0f} {batch_size / step.overlapped_seconds:11,.0f} "
        f"{step.communication:10.1%} {step.limit:>6} {reads * workers:7.2f} {reads:8.3f} {sends:13.3f} "
        f"{read.steps * step.overlapped_seconds / 60:7,.1f} "
        f"{lanes / workers * window_rows * pieces.stored_bytes / 1e9:6,.2f}"
    )


def main() -> None:
    """Measure, compute and print."""
    arguments = _arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "pyarrow"))
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    with tempfile.TemporaryDirectory() as folder:
        config = _config(arguments, folder)
        if arguments.workers:
            rows = window_rows(build_index(config.data.train, config.data), config.data)
            _print_expected(arguments, *_pieces(arguments, config), rows)
    comparisons = []
    if arguments.shards:
        job = Job(1, arguments.lanes, arguments.batch_size, _WINDOW_ROWS)
        rounds = max(1, arguments.rounds // 2)
        costs = print_simulation(
            arguments.shards, arguments.serving, job, groups=arguments.groups, rounds=rounds
        )
        comparisons = growth(costs)
    write_json(arguments.json, comparisons)


if __name__ == "__main__":
    main()
