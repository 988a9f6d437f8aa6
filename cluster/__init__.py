"""The `diptych` command and the clusters it runs on."""

from typing import TYPE_CHECKING

from pipelines.exports import lazily

if TYPE_CHECKING:
    from cluster.data import run_embed, run_inspect, run_pack, run_preview
    from cluster.doctor.checks import run_doctor
    from cluster.evaluate import run_evaluation, run_export
    from cluster.options import Columns, EvaluationRequest
    from cluster.ray_cluster import cluster
    from cluster.scale import run_scale
    from cluster.train import run_training
    from cluster.tune import kept_search, read_search, run_tuning

# Imported once they are asked for: most take seconds, and Ray reads its environment as it is imported.
__getattr__ = lazily(
    __name__,
    {
        "cluster.options": (
            "Columns",
            "EvaluationRequest",
        ),
        "cluster.data": (
            "run_embed",
            "run_inspect",
            "run_pack",
            "run_preview",
        ),
        "cluster.doctor.checks": ("run_doctor",),
        "cluster.evaluate": (
            "run_evaluation",
            "run_export",
        ),
        "cluster.ray_cluster": ("cluster",),
        "cluster.scale": ("run_scale",),
        "cluster.train": ("run_training",),
        "cluster.tune": (
            "kept_search",
            "read_search",
            "run_tuning",
        ),
    },
)

__all__ = [
    "Columns",
    "EvaluationRequest",
    "cluster",
    "kept_search",
    "read_search",
    "run_doctor",
    "run_embed",
    "run_evaluation",
    "run_export",
    "run_inspect",
    "run_pack",
    "run_preview",
    "run_scale",
    "run_training",
    "run_tuning",
]
