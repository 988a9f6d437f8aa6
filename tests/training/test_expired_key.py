"""A key of a storage that expires in the middle of a run ends it with one line, and costs no more."""

import uuid
from dataclasses import replace
from typing import Any

import pytest
import torch
from proxy import proxied
from small_digits import small_digits

from cluster.objectstore import S3Server
from pipelines.config import RECIPES, DataConfig
from pipelines.index import build_index
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.evaluation.evaluator import Sets
from training.gather import LocalGather
from training.metrics import read_metrics
from training.process import Worker
from training.trainer import run_uri, train


def _train(config: TrainConfig) -> None:
    worker = Worker(gather=LocalGather(), device=torch.device("cpu"), threads=1, tables=read_windows)
    index = build_index(config.data.train, config.data)
    train(config, Sets(index, None, None), worker, lambda values: None)


def _weights(config: TrainConfig) -> dict[str, Any]:
    return Checkpoints(run_uri(config), 1).load(8)["model"]


def test_the_run_says_so_and_resumes_with_a_fresh_one_bit_for_bit(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"{bucket}/{uuid.uuid4().hex}"
    write_shards(small_digits(0, 49), f"{place}/images", rows_per_shard=20, rows_per_group=10)
    data = DataConfig(
        train=f"{place}/images", window_rows=12, view=replace(RECIPES["simclr-cifar"][0], size=16)
    )
    fields: dict[str, Any] = {
        "batch_size": 24, "lanes": 2, "steps": 8, "encoder": {"name": "resnet8"},
        "projector": {"hidden_dim": 32, "dim": 16}, "optimizer": {"name": "sgd", "learning_rate": 0.001},
        "evaluation": {"diagnostic_images": 0}, "checkpoint": {"every_steps": 2},
    }  # fmt: skip
    undisturbed = TrainConfig(data=data, output=place, name="undisturbed", **fields)
    config = replace(undisturbed, name="expired")
    _train(undisturbed)
    with proxied(s3.variables["AWS_ENDPOINT_URL"], monkeypatch) as proxy:
        saved = f"/{run_uri(config).removeprefix('s3://')}/checkpoints/step-000000004.pt"
        proxy.fault = lambda method, path, number: "expired" if proxy.count("PUT", saved) else None
        with pytest.raises(
            (ValueError, OSError), match=r"^(read|writ|list)ing .*(denied; check AWS|expired; set)"
        ) as end:
            _train(config)
        assert "\n" not in str(end.value)
        proxy.fault = lambda method, path, number: None
        step = Checkpoints(run_uri(config), 1).latest_step()
        assert step == 2
        _train(config)
    torch.testing.assert_close(_weights(config), _weights(undisturbed), rtol=0, atol=0)
    steps = [line["step"] for line in read_metrics(run_uri(config)) if "loss" in line]
    assert steps == list(range(1, 9))
