"""What only a GPU can show: right views and losses, their speed, whole steps, and the accuracy of a run.

    python benchmarks/gpu.py --photographs FOLDER --cifar10 FOLDER --output FOLDER    # Parquet files
    python benchmarks/gpu.py --sections loss --minutes 5 --output FOLDER
    python benchmarks/gpu.py --sections accuracy --cifar10 FOLDER --runs FOLDER --minutes 9 --output FOLDER
    python benchmarks/gpu.py --device cpu --small --photographs FOLDER --cifar10 FOLDER --output FOLDER

Sections: `right` runs the tests that are marked gpu; `views` looks which stage bounds images a second, and
how long the GPU waits for data; `loss` holds NT-Xent against its peers and against variants; `step` holds
`diptych train` against plain PyTorch; `accuracy` trains simclr-cifar10-resnet18 as far as the time allows.
Each is given its minutes, leaves NAME.txt and NAME.json, written as it goes, and may fail without stopping
the others; the exit code is 1 then. A run that accuracy had to stop goes on when called again with the same
--runs. The last command is a dry run that only shows that all works; what needs CUDA says that it is skipped.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Before torch reads it.

import torch

from benchmarks.gpu_machine import describe, installed
from benchmarks.gpu_report import Report, Setting

# Minutes on a GPU, 32 in all.
_MINUTES = {"right": 6.0, "loss": 4.0, "views": 6.0, "step": 6.0, "accuracy": 10.0}

_NEED_DALI = ("views", "accuracy")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=list(_MINUTES), default=list(_MINUTES), help="in this order")
    add("--output", type=Path, required=True, help="folder of the results")
    add(
        "--photographs", type=Path, help="folder of Parquet files with a column image, some 500 pixels a side"
    )
    add("--cifar10", type=Path, help="folder of Parquet files train-* and test-*: image, label")
    add("--runs", type=Path, help="folder of the accuracy section's run, which may go on; unset: in OUTPUT")
    add("--minutes", type=float, help="of each section; unset: right 6, loss 4, views 6, step 6, accuracy 10")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--small", action="store_true", help="tiny sizes, whose times say nothing")
    add("--rounds", type=int, default=5, help="of what takes turns")
    add("--batch-size", type=int, default=256, help="images in a step of views and step")
    add("--epochs", type=int, default=200, help="of accuracy, or as many as there is time for")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of DALI")
    return parser.parse_args()


def _setting(arguments: argparse.Namespace) -> Setting:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("CUDA sees no GPU here; give --device cpu --small for a dry run")
    device = torch.device("cuda", torch.cuda.current_device()) if arguments.device == "cuda" else None
    output = arguments.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    return Setting(
        device=device or torch.device("cpu"),
        small=arguments.small,
        photographs=arguments.photographs and arguments.photographs.absolute(),
        cifar10=arguments.cifar10 and arguments.cifar10.absolute(),
        output=output,
        runs=(arguments.runs or output / "runs").absolute(),
        rounds=2 if arguments.small else arguments.rounds,
        batch_size=16 if arguments.small else arguments.batch_size,
        epochs=1 if arguments.small else arguments.epochs,
        threads=arguments.threads,
    )


def _run(name: str, setting: Setting, report: Report) -> bool:
    """Whether the section failed in nothing."""
    report.say(f"== {name}: {report.left / 60:.1f} minutes at most")
    if name in _NEED_DALI and not installed("nvidia.dali"):
        report.skip(name, "needs nvidia.dali, which is not installed")
        return report.finish()
    try:
        section: Callable[[Setting, Report], None] = import_module(f"benchmarks.gpu_{name}").run
        section(setting, report)
    except (Exception, SystemExit):
        report.failed(name, traceback.format_exc())
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return report.finish()


def main() -> None:
    """Measure, print and write."""
    arguments = _arguments()
    setting = _setting(arguments)
    machine = describe(setting.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    good = True
    for name in arguments.sections:
        seconds = 60 * (arguments.minutes or _MINUTES[name])
        good &= _run(name, setting, Report(name, setting.output, seconds, machine))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
