"""A search by TPE and ASHA against random search, and trials in a search against runs of their own.

    python benchmarks/search.py CIFAR10    # a folder of Parquet files train-*: image, label

For each seed, on 5,000 images of which three fifths are held out: the search `simclr` that comes with
diptych, and a random search of the same space, which trains all its trials to the end. Prints how many images
the first had trained on when it reached the best accuracy of the second, as a share of all the images that
the second trained on. Then a few trials of one epoch are run by a search and one after the other, as
`diptych train` would on the same cluster, in turns; prints how long both take.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.

from benchmarks.comparison import Comparison, add_json_option, spread, write_json
from cluster.ray_cluster import cluster
from cluster.tune import read_search, run_tuning
from pipelines.index import build_index
from training.ray_train.elastic import run_to_its_end
from training.run_folder import claim_run
from training.trainer import run_uri
from tuning.config import SearchConfig
from tuning.figures import progress
from tuning.search import search_sets
from tuning.trial_config import search_space, trial_config
from tuning.trials import Trial


def main() -> None:
    """Run both comparisons and print them."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch, cluster(cpus=2.2):
        seeds = [_seed(arguments, seed, arguments.output or scratch) for seed in range(arguments.seeds)]
        _print_shares([images / whole for images, whole in seeds])
        rounds = [_overhead(arguments, number, scratch) for number in range(arguments.rounds)]
    if rounds:
        ratios = [search / alone for search, alone in rounds]
        print(f"a trial in a search / alone: {spread(ratios, '.2f')} of the time")
    claims = (
        ("TPE and ASHA until as good as random search", "random search", "images", seeds),
        ("4 trials in a search", "one after the other", "s", rounds),
    )
    write_json(
        arguments.json,
        [
            Comparison(claim, peer, unit, *(list(values) for values in zip(*found, strict=True)))
            for claim, peer, unit, found in claims
            if found
        ],
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cifar10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--trials", type=int, default=8, help="of random search; the other may begin twice as many"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="for the time that a trial takes")
    parser.add_argument("--output", help="keep the searches here")
    add_json_option(parser)
    return parser.parse_args()


def _search(arguments: argparse.Namespace, output: str, **fields: Any) -> SearchConfig:
    flags = {
        "train.data.train": f"{arguments.cifar10}/train-00000-*",
        "train.epochs": arguments.epochs,
        "held_out": 0.6,
        "output": output,
    }
    return read_search(Path("simclr"), flags | fields)


def _print_shares(shares: list[float]) -> None:
    if not shares:
        return
    middle = statistics.median(shares)
    print(f"reached in {sum(map(math.isfinite, shares))} of {len(shares)} seeds", end="")
    print(f", with {middle:.0%} of random search's images (median of all)" if math.isfinite(middle) else "")


def _seed(arguments: argparse.Namespace, seed: int, output: str) -> tuple[float, int]:
    """Images after which a search was as good as random search (infinite: never), and those of the latter."""
    fields: dict[str, Any] = {"seed": seed, "trials": arguments.trials, "name": f"random-{seed}"}
    random = run_tuning(_search(arguments, output, scheduler="none", searcher="random", **fields))
    fields |= {"trials": 2 * arguments.trials, "name": f"tpe-asha-{seed}"}
    clever = run_tuning(_search(arguments, output, **fields))
    goal, whole = _best(random), progress(random)[-1][1]
    reached = next((images for _, images, best in progress(clever) if best >= goal), math.inf)
    said = f"after {reached / whole:.0%} of its images" if math.isfinite(reached) else "never"
    print(
        f"seed {seed}: random search {goal:.1%} with {whole:,} images; TPE and ASHA reach that {said}, "
        f"and {_best(clever):.1%} with {progress(clever)[-1][1]:,}"
    )
    return reached, whole


def _best(trials: list[Trial]) -> float:
    return progress(trials)[-1][2]


def _overhead(arguments: argparse.Namespace, number: int, scratch: str) -> tuple[float, float]:
    """Seconds for the same few trials in a search, and as runs of their own."""
    fields: dict[str, Any] = {"scheduler": "none", "searcher": "random", "train.epochs": 1}
    fields |= {"trials": 4, "seed": 100 + number, "name": "together"}
    search = _search(arguments, f"{scratch}/{number}", **fields)
    began = time.perf_counter()
    run_tuning(search)
    together = time.perf_counter() - began
    index = build_index(search.train.data.train, search.train.data)
    sets = search_sets(search, index)
    began = time.perf_counter()
    for point in search.points(search_space(search)):
        config = replace(trial_config(search, point), output=f"{scratch}/{number}/alone")
        claim_run(run_uri(config), config)
        run_to_its_end(config, sets, lambda event: None, Event())
    alone = time.perf_counter() - began
    print(f"4 trials of one epoch: {together:.1f} s in a search, {alone:.1f} s one after the other")
    return together, alone


if __name__ == "__main__":
    main()
