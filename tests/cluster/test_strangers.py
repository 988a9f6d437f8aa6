"""What others reach of a run on a cluster of this machine: from elsewhere, and as another user here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from pool import Pool
from processes import LOOPBACK, listening, processes_in
from strangers import as_stranger, needs_root, stranger_reads

from cluster.auth_token import token_file
from cluster.digits import scattered_digits
from cluster.train import run_training
from pipelines.config import DataConfig
from pipelines.shards import write_shards
from training.config import EvaluationConfig, TrainConfig
from training.config.encoder import EncoderConfig

pytestmark = pytest.mark.ray

_IMPORTS = """
import grpc
from ray.core.generated import gcs_service_pb2 as messages, gcs_service_pb2_grpc as services
"""

_ASK = """
channel = grpc.insecure_channel(sys.argv[1])
asks = services.NodeInfoGcsServiceStub(channel).GetAllNodeInfo
for token in ("", "0" * 64, sys.argv[2]):
    try:
        asks(messages.GetAllNodeInfoRequest(), metadata=[("authorization", f"Bearer {token}")][: len(token)])
        print("answered")
    except grpc.RpcError as error:
        print(error.code().name)
"""


@pytest.fixture
def folder(ray_cluster: None) -> Path:
    """Ray's, of the session's cluster."""
    return Path(ray.get_runtime_context().get_temp_dir())


def test_all_of_a_run_listens_on_loopback_alone(pool: Pool, folder: Path, tmp_path: Path) -> None:
    images = scattered_digits(64, held_out=False, seed=0)
    write_shards(images, str(tmp_path / "images"), rows_per_shard=32, rows_per_group=16)
    config = TrainConfig(
        data=DataConfig(train=str(tmp_path / "images"), recipe="simclr-cifar"),
        encoder=EncoderConfig(name="resnet8"), evaluation=EvaluationConfig(diagnostic_images=0),
        output=str(tmp_path), batch_size=16, lanes=2, workers=2, steps=4,
    )  # fmt: skip
    found = dict[int, list[str]]()
    workers = set[int]()

    def looking(config: TrainConfig, sets: Any, progress: Callable, *rest: Any, **settings: Any) -> None:
        def hear(event: dict[str, Any]) -> None:
            if "loss" in event:
                found.update(listening(processes_in(folder)))
                workers.update(filter(_is_training, found))
            progress(event)

        pool.launch(config, sets, hear, *rest, **settings)

    run_training(config, launch=looking)
    assert {address for addresses in found.values() for address in addresses} <= LOOPBACK
    # Each has a port of Ray's and one of gloo's, and rank 0 that of the store.
    assert sorted(len(found[one]) for one in workers)[-2:] >= [2, 3]


def _is_training(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::RayTrainWorker")
    except FileNotFoundError:  # It has ended.
        return False


@needs_root
def test_another_user_does_not_get_into_its_folder(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o777  # Ray's own way.
    assert stranger_reads(folder) == "PermissionError"


@needs_root
def test_another_user_is_turned_away_without_the_token(folder: Path) -> None:
    path = token_file()
    assert path
    address = ray.get_runtime_context().gcs_address
    answers = as_stranger(_IMPORTS, _ASK, address, path.read_text()).split()
    assert answers == ["UNAUTHENTICATED", "UNAUTHENTICATED", "answered"]
