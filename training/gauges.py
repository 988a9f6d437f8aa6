"""What Ray's dashboard, and whatever scrapes its metrics, shows of a run."""

from typing import Any

from ray.util.metrics import Gauge

_GAUGES = {
    "step": "Steps done",
    "epoch": "Number of the epoch, from 1",
    "loss": "Loss of the last step shown",
    "learning_rate": "Learning rate of the last step shown",
    "images_per_second": "Images a second, over all workers",
    "data_wait_seconds": "Seconds of the last step shown that rank 0 waited for data",
    "view_matching": "Share of the last step's views whose nearest other view in the batch is their partner",
    "knn_top1": "kNN accuracy, from 0 to 1",
    "effective_rank": "Effective rank of the features",
    "skipped": "Steps skipped so far, whose loss or gradient was not finite",
    "quarantined": "Images left out so far",
}


class Gauges:
    """Metrics named diptych_..., with the run's name as a tag."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(f"diptych_{name}", description, tag_keys=("run",))
            for name, description in _GAUGES.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run})

    def show(self, values: dict[str, Any]) -> None:
        """Set those that `values` has."""
        for name, gauge in self._gauges.items():
            if name in values:
                gauge.set(values[name])
