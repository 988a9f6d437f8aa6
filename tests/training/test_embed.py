"""A shard of features is what evaluation's embedding gives, and bad images are noted, not embedded."""

import io
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from animated import with_deadly
from PIL import Image

import training.embed
from cluster.digits import scattered_digits
from pipelines.config import DataConfig, ViewRecipe
from pipelines.feed import Device, evaluation_views
from pipelines.images.isolation import Crash, Isolated
from pipelines.index import build_index
from pipelines.packing import all_readings, shard_jobs
from pipelines.quarantine import decode
from pipelines.reader import read_pieces
from pipelines.shards import write_shards
from training.checkpoint import Checkpoints
from training.config import EncoderConfig, EvaluationConfig, TrainConfig
from training.embed import Embedder
from training.evaluation.knn import embed
from training.models.encoders import build_encoder
from training.objectives import Objective
from training.run_folder import claim_run
from training.trainer import run_uri

_STEP = 7


class _Bare(Objective):
    """An objective of nothing but its encoder."""

    def forward(self, views: object) -> torch.Tensor:
        raise AssertionError("nothing is trained here")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """The config of a run with one checkpoint."""
    data = DataConfig(train=str(tmp_path / "images"), view=ViewRecipe(size=32))
    config = TrainConfig(
        data=data, output=str(tmp_path), encoder=EncoderConfig(name="resnet8"),
        evaluation=EvaluationConfig(batch_size=8),
    )  # fmt: skip
    torch.manual_seed(3)
    objective = _Bare(build_encoder(config.encoder))
    objective.encoder.train()
    objective.encoder(torch.randn(16, 3, 32, 32))  # Batch norm's statistics move from where they start.
    optimizer = torch.optim.SGD(objective.parameters(), 0.1)
    claim_run(run_uri(config), config)
    Checkpoints(run_uri(config), keep=1).save(_STEP, objective, optimizer, config)
    return config


def _broken_png() -> bytes:
    """Its header is fine and its pixels are not compressed data."""
    out = io.BytesIO()
    Image.effect_noise((32, 32), 80).save(out, "PNG")
    content = bytearray(out.getvalue())
    at = content.index(b"IDAT") + 4
    content[at : at + 200] = b"\xff" * 200
    return bytes(content)


def test_features_are_those_of_evaluation_with_keys_paths_and_labels(config: TrainConfig, tmp_path: Path):
    images = list(scattered_digits(20, held_out=False, seed=0))
    write_shards(images, config.data.train, rows_per_shard=6, rows_per_group=3)
    index = build_index(config.data.train, config.data)
    embedder = Embedder(config, _STEP, config.data, str(tmp_path / "features"))
    reports = [embedder(job) for job in shard_jobs(index, 12, window_rows=5)]
    assert [report["images"][0].as_py() for report in reports] == [12, 8]

    shards = [pq.read_table(path) for path in sorted((tmp_path / "features").iterdir())]
    rows = [row for shard in shards for row in shard.to_pylist()]
    assert shards[0].schema.field("feature").type.list_size == 64
    assert [(row["label"], row["key"]) for row in rows] == [(label, key) for _, label, key in images]
    assert [row["path"] for row in rows[::6]] == index.paths
    tables = [read_pieces(reading, config.data) for reading in all_readings(index, 100)]
    encoder = build_encoder(config.encoder)
    saved = Checkpoints(run_uri(config), keep=1).load(_STEP)["model"]
    encoder.load_state_dict({key.removeprefix("encoder."): value for key, value in saved.items()})
    views = evaluation_views(tables, config.data, Device(threads=1), batch_size=20)
    (expected,), _ = embed([encoder], views, torch.device("cpu"))
    assert expected.std() > 0.01
    np.testing.assert_allclose([row["feature"] for row in rows], expected.numpy(), rtol=1e-4, atol=1e-5)


# The broken one stands alone in the last batch, among good ones, or there is nothing else.
@pytest.mark.parametrize("good", [8, 3, 0])
def test_bad_images_are_noted_and_the_others_embedded(config: TrainConfig, tmp_path: Path, good: int):
    images = list(scattered_digits(good, held_out=False, seed=0))
    images += [(b"no image", 0, "no image"), (_broken_png(), 0, "broken")]
    write_shards(images, config.data.train, rows_per_shard=20, rows_per_group=20)
    (job,) = shard_jobs(build_index(config.data.train, config.data), 20)
    report = Embedder(config, _STEP, config.data, str(tmp_path / "features"))(job)
    bad = decode(report["bad"][0].as_py().encode())
    assert [image.key for image in bad] == ["no image", "broken"]
    assert bad[0].reason == "no image in a known format, or truncated"
    table = pq.read_table(tmp_path / "features" / "00000.parquet")
    assert table["key"].to_pylist() == [key for _, _, key in images[:good]]


def _embed_a_deadly_image(embedder: Embedder) -> str:
    """Embed the only shard, sample 3 of which ends the process that decodes it; its quarantined images."""
    read = training.embed.read_pieces
    training.embed.read_pieces = lambda reading, data: with_deadly(read(reading, data), 3)
    (job,) = shard_jobs(build_index(embedder.data.train, embedder.data), 20)
    return embedder(job)["bad"][0].as_py()


def test_an_image_that_ends_the_process_is_found_when_the_shard_is_tried_again(
    config: TrainConfig, tmp_path: Path
):
    images = list(scattered_digits(8, held_out=False, seed=0))
    write_shards(images, config.data.train, rows_per_shard=20, rows_per_group=20)
    embedder = Embedder(config, _STEP, config.data, str(tmp_path / "features"))
    work = Isolated(_embed_a_deadly_image)
    first, second = work.each([embedder, embedder])
    work.close()
    assert first == Crash(signal.SIGSEGV)
    (bad,) = decode(second.encode())
    assert (bad.key, bad.reason) == (images[3][2], "decoding it ends the process (SIGSEGV)")
    assert [path.name for path in (tmp_path / "features").iterdir()] == ["00000.parquet"]
    table = pq.read_table(tmp_path / "features" / "00000.parquet")
    assert table["key"].to_pylist() == [key for number, (_, _, key) in enumerate(images) if number != 3]


def test_a_key_is_data_and_no_path(config: TrainConfig, tmp_path: Path):
    keys = ["../../x", "/x", "..", ""]
    images = [
        (content, label, key)
        for (content, label, _), key in zip(scattered_digits(4, held_out=False, seed=0), keys, strict=True)
    ]
    write_shards(images, config.data.train, rows_per_shard=20, rows_per_group=20)
    (job,) = shard_jobs(build_index(config.data.train, config.data), 20)
    before = set(tmp_path.rglob("*"))
    Embedder(config, _STEP, config.data, str(tmp_path / "features"))(job)
    assert set(tmp_path.rglob("*")) - before == {
        tmp_path / "features",
        tmp_path / "features" / "00000.parquet",
    }
    assert pq.read_table(tmp_path / "features" / "00000.parquet")["key"].to_pylist() == keys
