from .data import run_embed, run_pack, run_preview
from .doctor.checks import run_doctor
from .evaluate import run_evaluation, run_export
from .inspection import run_inspect
from .options import Columns, EvaluationRequest
from .ray_cluster import cluster
from .scale import run_scale
from .train import run_training
from .tune import kept_search, read_search, run_tuning

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
