"""A finished run is judged as while it trained, on any number of ranks, with any share of the labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.digits import scattered_digits
from pipelines.config import DataConfig
from pipelines.index import build_index
from pipelines.labels import labelled_part
from pipelines.reader import read_windows
from pipelines.shards import write_shards
from training.config import ProbeConfig, TrainConfig
from training.evaluation.certainty import COMPARED
from training.evaluation.evaluator import Sets
from training.evaluation.finetune import Protocol, load_encoder
from training.gather import LocalGather, ProcessGroupGather
from training.metrics import read_metrics
from training.process import Worker
from training.trainer import run_uri, train

_STEPS = 4
_PROBE = ProbeConfig(epochs=10, batch_size=64, learning_rates=(0.01, 0.1))


def _worker() -> Worker:
    gather = ProcessGroupGather() if dist.is_initialized() else LocalGather()
    return Worker(gather=gather, device=torch.device("cpu"), threads=1, tables=read_windows)


def _sets(config: TrainConfig) -> Sets:
    assert config.data.test
    train_index, test_index = (build_index(uri, config.data) for uri in (config.data.train, config.data.test))
    return Sets.of(config, train_index, test_index)


def _judge(config: TrainConfig, protocol: Protocol, share: float = 1.0) -> dict[str, Any]:
    """What rank 0 tells; nothing on the others."""
    found: dict[str, Any] = {}
    sets = _sets(config)
    if share < 1:
        part = labelled_part(sets.train, config.data, share, seed=0, progress=lambda *_: None)
        sets = sets.training_on(part, config)
    protocol(config, sets, _worker(), found.update)
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of a few steps on scattered digits, already at its end."""
    folder = tmp_path_factory.mktemp("protocols")
    for split, count, held_out in (("train", 240, False), ("test", 90, True)):
        rows = scattered_digits(count, held_out=held_out, seed=2)
        write_shards(rows, str(folder / split), rows_per_shard=100, rows_per_group=30)
    data: dict[str, Any] = {
        "train": str(folder / "train"),
        "test": str(folder / "test"),
        "recipe": "simclr-cifar",
    }
    config = TrainConfig(
        data=DataConfig(**data), output=str(folder), steps=_STEPS, batch_size=32, lanes=4,
        encoder={"name": "resnet8"}, projector={"hidden_dim": 32, "dim": 16},
        optimizer={"name": "sgd", "learning_rate": 0.01},
    )  # fmt: skip
    train(config, _sets(config), _worker(), lambda _: None)
    return config


def test_knn_is_what_the_run_measured_at_its_end(config: TrainConfig):
    (measured,) = [
        line for line in read_metrics(run_uri(config)) if line["step"] == _STEPS and "knn_top1" in line
    ]
    found = _judge(config, Protocol(name="knn", step=_STEPS))
    assert found == {
        "step": _STEPS,
        "protocol": "knn",
        "features": "encoder",
        "top1": measured["knn_top1"],
        "top1_margin": measured["knn_top1_margin"],
        **{key: measured[key] for key in (*COMPARED, "neighbours")},
    }
    assert (found["evaluated_images"], found["bank_images"], found["chance"]) == (90, 240, 0.1)


@pytest.mark.parametrize("share", [1.0, 0.2])
@pytest.mark.parametrize("name", ["knn", "linear"])
def test_two_ranks_find_what_one_finds(name: Any, share: float, config: TrainConfig, run_ranks: Callable):
    protocol = Protocol(name=name, step=_STEPS, probe=_PROBE)
    alone, (together, silent) = (
        _judge(config, protocol, share),
        run_ranks(_judge, 2, config, protocol, share),
    )
    assert together == alone | {"top1": pytest.approx(alone["top1"], abs=1.5 / 90)}
    assert silent == {}


def test_of_the_labels_only_the_share_is_known(config: TrainConfig):
    protocol = Protocol(name="linear", step=_STEPS, probe=_PROBE)
    found = {share: _judge(config, protocol, share)["bank_images"] for share in (0.05, 1.0)}
    assert found == {0.05: 12, 1.0: 240}


def test_the_projectors_output_can_be_judged(config: TrainConfig):
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoder = load_encoder(config, _STEPS)
    projected = load_encoder(config, _STEPS, "projector")
    assert (encoder(images).shape, projected(images).shape) == ((8, 64), (8, 16))
    assert (encoder.dim, projected.dim) == (64, 16)
    found = _judge(config, Protocol(name="knn", step=_STEPS, features="projector"))
    assert 0 <= found["top1"] <= 1


def test_the_encoder_is_the_checkpoints(config: TrainConfig):
    path = Path(run_uri(config), "checkpoints", f"step-{_STEPS:09}.pt")
    saved = torch.load(path, weights_only=True)["model"]
    loaded = load_encoder(config, _STEPS).state_dict()
    assert loaded.keys() == {key.removeprefix("encoder.") for key in saved if key.startswith("encoder.")}
    for key, value in loaded.items():
        assert torch.equal(value, saved[f"encoder.{key}"])


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(config: TrainConfig):
    with pytest.raises(ValueError, match=rf"has no checkpoint of step 3; it has {_STEPS}"):
        load_encoder(config, 3)
