"""A job on a cluster that has never heard of diptych: its code is sent, and pip installs what it lacks."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import diptych

from cluster.auth_token import ensure_token
from cluster.digits import scattered_digits
from pipelines.shards import write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Of what diptych needs, what the cluster does not have: small, and pure Python.
_LACKING = ("cyclopts", "jaxtyping")

# With ports and a folder of its own, so that other clusters on this machine are not in the way.
_HOLD = """
import shutil, sys, tempfile
from ray._common.utils import get_default_ray_temp_dir, reset_ray_address, try_to_create_directory
from ray._private import utils
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray.cluster_utils import Cluster
ensure_token_if_auth_enabled()
try_to_create_directory(get_default_ray_temp_dir())
folder, named = tempfile.mkdtemp(prefix="diptych-"), utils.read_ray_address()
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 2, "include_dashboard": True, "dashboard_port": 0, "dashboard_agent_listen_port": 0,
    "node_ip_address": "127.0.0.1", "dashboard_host": "127.0.0.1", "temp_dir": folder,
})
utils.write_ray_address(named) if named else reset_ray_address()
utils.write_ray_address(cluster.address, folder)
print("dashboard", cluster.head_node.webui_url, flush=True)
sys.stdin.read()
cluster.shutdown()
shutil.rmtree(folder, ignore_errors=True)
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard of a cluster whose Python has what this one has, but for diptych and two packages."""
    folder = tmp_path_factory.mktemp("bare")
    has = folder / "has"
    has.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("diptych", "_diptych", "__editable__", *_LACKING)):
            (has / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "has.pth").write_text(f"{has}\n")
    environment = os.environ | {"PATH": f"{folder}/venv/bin:/usr/bin:/bin", "RAY_AUTH_MODE": "token"}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    ensure_token()
    with (folder / "log").open("w") as log:
        holder = subprocess.Popen(
            [folder / "venv" / "bin" / "python", "-c", _HOLD], env=environment, cwd=folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    assert holder.stdin
    assert holder.stdout
    try:
        said = next((line for line in holder.stdout if line.startswith("dashboard")), None)
        assert said, (folder / "log").read_text()
        yield f"http://{said.split()[1]}"
    finally:
        holder.stdin.close()
        holder.wait(60)
        holder.stdout.close()
        shutil.rmtree(folder)


def _submit(bare: str, *arguments: str) -> subprocess.CompletedProcess:
    return diptych("submit", "--address", bare, *arguments, RAY_AUTH_MODE="token")


def test_a_run_brings_its_code_and_what_it_lacks(bare: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_shards(
        scattered_digits(64, held_out=False, seed=0), str(images), rows_per_shard=32, rows_per_group=16
    )
    command = (
        "train", "--data.train", str(images), "--data.recipe", "simclr-cifar", "--encoder.name", "resnet8",
        "--projector.hidden-dim", "32", "--projector.dim", "16", "--batch-size", "16", "--lanes", "2",
        "--workers", "1", "--steps", "2", "--evaluation.diagnostic-images", "0", "--output", str(tmp_path),
    )  # fmt: skip
    listed = _submit(bare, "--dry-run", "--", *command)
    assert listed.returncode == 0, listed.stderr
    first, *files, total, _ = listed.stdout.splitlines()
    assert "the cluster has no diptych: the code is sent; pip adds what is missing there" in first
    assert all(f"{name}==" in first for name in _LACKING)
    assert "torch==" not in first
    assert any(line.endswith("cluster/__main__.py") for line in files)
    assert int(total.split()[0].replace(",", "")) < 2 * 2**20
    ran = _submit(bare, "--", *command)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "run" / "report.html").exists()
