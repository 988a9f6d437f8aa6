"""Machine types of AWS and Google Cloud by GPU type and number of GPUs."""

from typing import TypeVar

Machine = TypeVar("Machine")

AWS = {
    "t4": {1: "g4dn.2xlarge", 4: "g4dn.12xlarge", 8: "g4dn.metal"},
    "a10g": {1: "g5.2xlarge", 4: "g5.12xlarge", 8: "g5.48xlarge"},
    "l4": {1: "g6.2xlarge", 4: "g6.12xlarge", 8: "g6.48xlarge"},
    "l40s": {1: "g6e.2xlarge", 4: "g6e.12xlarge", 8: "g6e.48xlarge"},
    "a100": {8: "p4d.24xlarge"},
    "a100-80gb": {8: "p4de.24xlarge"},
    "h100": {1: "p5.4xlarge", 8: "p5.48xlarge"},
}

# With their CPUs: Ray asks AWS for them, but not Google.
GCP = {
    "t4": {1: ("n1-standard-8", 8), 2: ("n1-standard-16", 16), 4: ("n1-standard-32", 32)},
    "l4": {
        1: ("g2-standard-8", 8),
        2: ("g2-standard-24", 24),
        4: ("g2-standard-48", 48),
        8: ("g2-standard-96", 96),
    },
    "a100": {count: (f"a2-highgpu-{count}g", 12 * count) for count in (1, 2, 4, 8)},
    "a100-80gb": {count: (f"a2-ultragpu-{count}g", 12 * count) for count in (1, 2, 4, 8)},
    "h100": {8: ("a3-highgpu-8g", 208)},
}


def machine(machines: dict[str, dict[int, Machine]], gpu_type: str, gpus: int | None) -> tuple[int, Machine]:
    """The number of GPUs of a node, and the machine type that has them; `gpus=None` takes the smallest.

    Raises ValueError, listing what exists, if there is no such machine.
    """
    if gpu_type not in machines:
        raise ValueError(f"--gpu-type {gpu_type} is unknown here; choose one of {', '.join(machines)}")
    counts = machines[gpu_type]
    gpus = gpus or min(counts)
    if gpus not in counts:
        has = " or ".join(map(str, counts))
        raise ValueError(f"--gpus-per-node {gpus}: no machine has that many {gpu_type}; try {has}")
    return gpus, counts[gpus]
