"""Fixtures for all tests: object storage, one Ray cluster, one pool of workers.

`make test` runs them in two processes: one has all tests that need Ray, so that there is one cluster, the
other the rest, a file at a time.
"""

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.auth_token import ensure_token
from cluster.objectstore import S3Server, s3_server
from cluster.ray_folder import IDLE_STAY, LOOPBACK_ONLY, files_in, ray_folder

sys.path.insert(0, str(Path(__file__).parent))

from objectstores import azure_server, azurite, gcs_server
from pool import Pool
from processes import MARK

# Neither a cluster that someone has named nor one that runs here is the tests', and theirs listens on this
# machine alone; before anything imports Ray.
_STATE = tempfile.TemporaryDirectory(prefix="diptych-")
os.environ |= LOOPBACK_ONLY | IDLE_STAY | {"XDG_STATE_HOME": _STATE.name, MARK: secrets.token_hex(8)}
# As in clusters that diptych starts: threads that wait must not spin.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# One thread for each of the processes that share the cores; tensors here are too small for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)

BUCKET = "diptych-tests"

# Room for the pool's three workers and for four more, at two CPUs each, and one CPU for tasks.
CLUSTER_CPUS = 15


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for two processes: those that need Ray, which take longest, begin."""
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_configure() -> None:
    """Make warnings that DALI logs errors: that it could not convert our graph, for one."""
    logging.getLogger().addFilter(_not_a_warning_of_dalis)


def _not_a_warning_of_dalis(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING and "/nvidia/dali/" in record.pathname:
        raise AssertionError(record.getMessage())
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked gpu where CUDA sees none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU that CUDA sees")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; the AWS_... variables lead to it."""
    with s3_server(tmp_path_factory.mktemp("s3"), bucket=BUCKET) as server:
        yield server


@pytest.fixture(scope="session")
def bucket(s3: S3Server) -> str:
    """The URI of a bucket on that server."""
    return f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def gcs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a bucket on a real GCS server; STORAGE_EMULATOR_HOST leads to it."""
    with gcs_server(tmp_path_factory.mktemp("gcs"), bucket=BUCKET):
        yield f"gs://{BUCKET}"


@pytest.fixture(scope="session")
def azure_container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a container on Azurite; AZURE_STORAGE_CONNECTION_STRING leads to it."""
    if azurite() is None:
        pytest.skip("no `azurite-blob` on PATH; npm install -g azurite")
    with azure_server(tmp_path_factory.mktemp("azure"), container=BUCKET):
        yield f"az://{BUCKET}"


@pytest.fixture(scope="session")
def ray_cluster(bucket: str) -> Iterator[None]:
    """A connected Ray cluster whose workers know the S3 server."""
    import ray

    ensure_token()
    with ray_folder() as folder:
        with files_in(folder):
            ray.init(
                "local",
                num_cpus=CLUSTER_CPUS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def pool(ray_cluster: None) -> Iterator[Pool]:
    """The session's training workers: to start two costs some 20 s of processor time."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that stands beside the project on developers' machines."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder
