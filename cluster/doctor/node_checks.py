"""What each node of a cluster must be able to do by itself: run diptych, make views, reach the storage."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.examination import Examiner, about, example_views
from cluster.doctor.findings import Finding, Level
from pipelines import storage
from pipelines.storage.filesystems import IN_A_JOB
from training.ray_train.nodes import usable_resources

# A node's process has to start and to import PyTorch and DALI; a busy node takes longer, and one that first
# installs a job's packages much longer.
_NODE_SECONDS, _INSTALL_SECONDS = 120.0, 3600.0

# What the smallest runs take; less of it is told of.
_MEMORY, _OBJECT_STORE = 2 * 10**9, 256 * 2**20

# S3 refuses requests that are older, or from the future, by 15 minutes.
_SKEW_TOLD, _SKEW_TOO_MUCH = 1.0, 600.0

# Largest difference of a view between nodes, of values that spread by about 1: rounding, or a GPU's decoder.
_CPU_DIFFERENCE, _GPU_DIFFERENCE = 1e-3, 0.3


@dataclass(frozen=True)
class Node:
    """A living node, its resources, and the process on it that is asked."""

    name: str
    resources: dict[str, float]
    examiner: Any
    gpu_examiner: Any

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)


def check_nodes(uri: str | None) -> Iterator[Finding]:
    """What every node has to say, as it is asked; `uri` is the storage that all of them must reach."""
    nodes, answers, lost = _nodes()
    yield from lost
    yield from version_findings(answers | {"this process": asdict(about())})
    yield from token_findings(answers)
    yield from _resources(nodes, answers)
    yield from _dali(nodes)
    yield from _clocks(nodes)
    yield from _storage(nodes, uri)


def _nodes() -> tuple[list[Node], dict[str, dict[str, Any]], list[Finding]]:
    """The nodes that answer, what they say of themselves, and a finding for each that does not."""
    nodes, answers, lost = [], {}, []
    examiner = ray.remote(num_cpus=0)(Examiner)
    for node in (node for node in ray.nodes() if node["Alive"]):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeID'][:8]} {node['NodeManagerAddress']}"
        gpu = None
        if node["Resources"].get("GPU", 0.0):
            gpu = examiner.options(scheduling_strategy=there, num_gpus=0.01).remote()
        nodes.append(Node(name, node["Resources"], examiner.options(scheduling_strategy=there).remote(), gpu))
    asked = [(node, node.examiner.about.remote()) for node in nodes]
    for node, answer in asked:
        try:
            seconds = _INSTALL_SECONDS if os.environ.get(IN_A_JOB) else _NODE_SECONDS
            answers[node.name] = _answer(answer, seconds)
        except ExaminationError as error:
            lost.append(
                Finding(
                    "node", node.name, str(error), "fault",
                    "install diptych and the same Python and Ray on it, or submit: diptych submit -- doctor",
                )
            )  # fmt: skip
    return [node for node in nodes if node.name in answers], answers, lost


class ExaminationError(Exception):
    """A node could not do what it was asked for; the message is one line."""


def _answer(reference: Any, seconds: float = _NODE_SECONDS) -> Any:
    try:
        return ray.get(reference, timeout=seconds)
    except GetTimeoutError as error:
        raise ExaminationError(f"no answer within {seconds:.0f} s") from error
    except RayTaskError as error:
        raise ExaminationError(f"{type(error.cause).__name__}: {_first_line(error.cause)}") from error
    except RayError as error:
        raise ExaminationError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def version_findings(answers: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """One finding for all that is the same on every node, one for each package that is not."""
    by_package: dict[str, dict[str, list[str]]] = {}
    for node, answer in answers.items():
        for package, version in answer["versions"].items():
            by_package.setdefault(package, {}).setdefault(version, []).append(node)
    same = [f"{package} {next(iter(found))}" for package, found in by_package.items() if len(found) == 1]
    yield Finding("versions", "every node", ", ".join(same))
    for package, versions in by_package.items():
        if len(versions) > 1:
            found = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in versions.items())
            yield Finding("versions", package, found, "fault", "give all nodes the same image")


def token_findings(answers: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Whether the cluster wants its token, and others of its nodes can read that."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        yield Finding(
            "token", "cluster", "it wants none", "told",
            "whoever reaches its ports can run code on it: start its nodes with RAY_AUTH_MODE=token",
        )  # fmt: skip
        return
    exposed = {node: answer["open_token"] for node, answer in answers.items() if answer["open_token"]}
    for node, found in exposed.items():
        way_out = "make it 0600 in a folder of 0700, and another one if others may have read it"
        yield Finding("token", node, found, "told", way_out)
    if not exposed:
        yield Finding("token", "every node", "the cluster wants it, and its owner alone can read it")


def _resources(nodes: list[Node], answers: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    for node in nodes:
        has = node.resources
        memory, store = has.get("memory", 0.0), has.get("object_store_memory", 0.0)
        yield Finding("CPUs, GPUs", node.name, f"{has.get('CPU', 0):g} CPUs, {node.gpus:g} GPUs")
        if memory < _MEMORY and has.get("CPU"):
            yield Finding(
                "memory", node.name, f"{memory / 1e9:.1f} GB", "told",
                "a worker takes about 1.5 GB and its model: give the node more",
            )  # fmt: skip
        else:
            yield Finding("memory", node.name, f"{memory / 1e9:.1f} GB")
        yield object_store_finding(node.name, store, answers[node.name]["shared_memory"])
    resources = usable_resources()
    if not resources.get("CPU") and not resources.get("GPU"):
        yield Finding("CPUs, GPUs", "cluster", "none", "fault", "add worker nodes")


def object_store_finding(node: str, store: float, shared: int) -> Finding:
    """Whether so many bytes do for reading ahead, and fit into the node's shared memory."""
    found = f"{store / 2**20:,.0f} MiB, /dev/shm {shared / 2**20:,.0f} MiB"
    if store > shared:
        return Finding(
            "object store", node, found, "told",
            "it lies on disk: give the container more shared memory, as docker --shm-size does",
        )  # fmt: skip
    if store < _OBJECT_STORE:
        return Finding("object store", node, found, "told", "start Ray with more: --object-store-memory")
    return Finding("object store", node, found)


def _dali(nodes: list[Node]) -> Iterator[Finding]:
    expected = example_views(gpu=None)
    asked = [(node, "DALI on the CPU", node.examiner.views.remote(False)) for node in nodes]
    asked += [(node, "DALI on the GPU", node.gpu_examiner.views.remote(True)) for node in nodes if node.gpus]
    for node, check, answer in asked:
        on_gpu = check.endswith("GPU")
        way_out = (
            "wait until its GPUs are not all taken; its driver must be 580 or newer, see nvidia-smi there"
            if on_gpu
            else "install nvidia-dali-cuda130 on it, on Linux with glibc 2.28 or newer"
        )
        try:
            difference = float(np.abs(_answer(answer) - expected).max())
            device = f"{_answer(node.gpu_examiner.gpu.remote())}: " if on_gpu else ""
        except ExaminationError as error:
            yield Finding(check, node.name, str(error), "fault", way_out)
            continue
        same = difference <= (_GPU_DIFFERENCE if on_gpu else _CPU_DIFFERENCE)
        yield Finding(
            check, node.name, f"{device}views within {difference:.0e} of this process's",
            "ok" if same else "fault", "" if same else "give all nodes the same version of DALI",
        )  # fmt: skip


def _clocks(nodes: list[Node]) -> Iterator[Finding]:
    for node in nodes:
        try:
            skew = min((_skew(node) for _ in range(5)), key=abs)
        except ExaminationError as error:
            yield Finding("clock", node.name, str(error), "fault", "see `ray status` and the node's logs")
            continue
        level: Level = "ok" if abs(skew) < _SKEW_TOLD else "told" if abs(skew) < _SKEW_TOO_MUCH else "fault"
        yield Finding(
            "clock", node.name, f"{skew:+.3f} s from this process's", level,
            "" if level == "ok" else "let the node keep time by NTP; S3 refuses requests 15 minutes off",
        )  # fmt: skip


def _skew(node: Node) -> float:
    """Seconds by which its clock is ahead, the answer being half a round trip old."""
    began = time.time()
    there = _answer(node.examiner.now.remote())
    return there - (began + time.time()) / 2


def _storage(nodes: list[Node], uri: str | None) -> Iterator[Finding]:
    """Each node writes a file, then each reads another's."""
    if uri is None:
        yield Finding(
            "storage", "every node", "not looked at", "told", "name one: --storage s3://BUCKET/PATH"
        )
        return
    uri = storage.absolute(uri)
    files = {node.name: f".diptych-doctor-{secrets.token_hex(8)}" for node in nodes}
    try:
        yield from _written_and_read(nodes, uri, files)
    finally:
        for removal in [node.examiner.remove.remote(uri, files[node.name]) for node in nodes]:
            with suppress(ExaminationError):
                _answer(removal)


def _written_and_read(nodes: list[Node], uri: str, files: dict[str, str]) -> Iterator[Finding]:
    rates: dict[str, float] = {}
    writing = [(node, node.examiner.write.remote(uri, files[node.name])) for node in nodes]
    for node, answer in writing:
        try:
            rates[node.name] = _answer(answer)
        except ExaminationError as error:
            yield Finding(
                "storage", node.name, str(error), "fault", "let the node's own credentials write there"
            )
    wrote = [node for node in nodes if node.name in rates]
    # Each what the one before it has written: were all to read all, a large cluster would never end.
    reading = [
        (node, node.examiner.read.remote(uri, files[wrote[number - 1].name]))
        for number, node in enumerate(wrote)
    ]
    for node, answer in reading:
        try:
            read = _answer(answer)
        except ExaminationError as error:
            way_out = "let the node read there; a path must be one file system on all nodes"
            yield Finding("storage", node.name, str(error), "fault", way_out)
        else:
            found = f"wrote {rates[node.name] / 1e6:,.0f} MB/s, read {read / 1e6:,.0f} MB/s"
            yield Finding("storage", node.name, found)
