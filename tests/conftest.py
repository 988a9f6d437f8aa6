"""Fixtures for all tests: one S3 server and one Ray cluster a session, started by the first that asks."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.objectstore import s3_server

BUCKET = "diptych-tests"


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a bucket on a real S3 server; the AWS_... variables lead to it."""
    with s3_server(tmp_path_factory.mktemp("s3"), bucket=BUCKET):
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def ray_cluster(bucket: str) -> Iterator[None]:
    """A connected Ray cluster whose workers know the S3 server; room for four training workers."""
    import ray

    ray.init(num_cpus=9, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that stands beside the project on developers' machines."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder
