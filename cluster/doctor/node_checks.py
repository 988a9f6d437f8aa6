"""Checks of each node: that it runs diptych, makes views and reaches the storage."""

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

from cluster.doctor.check_results import CheckResult, Level
from cluster.doctor.node_agent import NodeAgent, example_views, node_info
from pipelines import storage
from pipelines.storage.filesystems import IN_A_JOB
from training.determinism import Kind, kind_differences
from training.ray_train.nodes import usable_resources

# The agent has to start and to import PyTorch and DALI. A busy node takes longer; one that first installs a
# job's packages takes much longer.
_NODE_SECONDS, _INSTALL_SECONDS = 120.0, 3600.0

# The smallest runs need this much; less gives a warning.
_MEMORY, _OBJECT_STORE = 2 * 10**9, 256 * 2**20

# S3 refuses requests whose time is 15 minutes off.
_SKEW_WARNING, _SKEW_ERROR = 1.0, 600.0

# Largest difference of a view between nodes, for values with a standard deviation near 1. It comes from
# rounding, or from the GPU's decoder.
_CPU_DIFFERENCE, _GPU_DIFFERENCE = 1e-3, 0.3


@dataclass(frozen=True)
class Node:
    """A live node, its resources, and the agents on it."""

    name: str
    resources: dict[str, float]
    agent: Any
    gpu_agent: Any

    @property
    def gpus(self) -> float:
        return self.resources.get("GPU", 0.0)


def check_nodes(uri: str | None) -> Iterator[CheckResult]:
    """Check every node; `uri` is the storage that all of them must reach."""
    nodes, answers, lost = _nodes()
    yield from lost
    yield from version_results(answers | {"this process": asdict(node_info())})
    yield from token_results(answers)
    yield from _resources(nodes, answers)
    yield from _dali(nodes)
    yield from _exact_steps(nodes)
    yield from _clocks(nodes)
    yield from _storage(nodes, uri)


def _nodes() -> tuple[list[Node], dict[str, dict[str, Any]], list[CheckResult]]:
    """The nodes that answer, their `NodeInfo` fields by name, and an error for each node that does not."""
    nodes, answers, lost = [], {}, []
    agent = ray.remote(num_cpus=0)(NodeAgent)
    for node in (node for node in ray.nodes() if node["Alive"]):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        name = f"{node['NodeID'][:8]} {node['NodeManagerAddress']}"
        gpu = None
        if node["Resources"].get("GPU", 0.0):
            gpu = agent.options(scheduling_strategy=there, num_gpus=0.01).remote()
        nodes.append(Node(name, node["Resources"], agent.options(scheduling_strategy=there).remote(), gpu))
    asked = [(node, node.agent.node_info.remote()) for node in nodes]
    for node, answer in asked:
        try:
            seconds = _INSTALL_SECONDS if os.environ.get(IN_A_JOB) else _NODE_SECONDS
            answers[node.name] = _answer(answer, seconds)
        except NodeAgentError as error:
            lost.append(
                CheckResult(
                    "node", node.name, str(error), "error",
                    "install diptych and the same Python and Ray on it, or submit: diptych submit -- doctor",
                )
            )  # fmt: skip
    return [node for node in nodes if node.name in answers], answers, lost


class NodeAgentError(Exception):
    """A node agent failed or did not answer; the message is one line."""


def _answer(reference: Any, seconds: float = _NODE_SECONDS) -> Any:
    try:
        return ray.get(reference, timeout=seconds)
    except GetTimeoutError as error:
        raise NodeAgentError(f"no answer within {seconds:.0f} s") from error
    except RayTaskError as error:
        raise NodeAgentError(f"{type(error.cause).__name__}: {_first_line(error.cause)}") from error
    except RayError as error:
        raise NodeAgentError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def version_results(answers: dict[str, dict[str, Any]]) -> Iterator[CheckResult]:
    """One result for the versions that all nodes share, one for each package whose versions differ."""
    by_package: dict[str, dict[str, list[str]]] = {}
    for node, answer in answers.items():
        for package, version in answer["versions"].items():
            by_package.setdefault(package, {}).setdefault(version, []).append(node)
    same = [f"{package} {next(iter(found))}" for package, found in by_package.items() if len(found) == 1]
    yield CheckResult("versions", "every node", ", ".join(same))
    for package, versions in by_package.items():
        if len(versions) > 1:
            found = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in versions.items())
            yield CheckResult("versions", package, found, "error", "give all nodes the same image")


def token_results(answers: dict[str, dict[str, Any]]) -> Iterator[CheckResult]:
    """Check that the cluster requires a token, and that other users of its nodes cannot read it."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        yield CheckResult(
            "token", "cluster", "not required", "warning",
            "anyone who reaches its ports can run code on it: start its nodes with RAY_AUTH_MODE=token",
        )  # fmt: skip
        return
    exposed = {node: answer["open_token"] for node, answer in answers.items() if answer["open_token"]}
    for node, found in exposed.items():
        way_out = "set its mode to 0600 and its folder's to 0700; make a new one if others may have read it"
        yield CheckResult("token", node, found, "warning", way_out)
    if not exposed:
        yield CheckResult("token", "every node", "required, and readable by its owner alone")


def _resources(nodes: list[Node], answers: dict[str, dict[str, Any]]) -> Iterator[CheckResult]:
    for node in nodes:
        has = node.resources
        memory, store = has.get("memory", 0.0), has.get("object_store_memory", 0.0)
        yield CheckResult("CPUs, GPUs", node.name, f"{has.get('CPU', 0):g} CPUs, {node.gpus:g} GPUs")
        if memory < _MEMORY and has.get("CPU"):
            yield CheckResult(
                "memory", node.name, f"{memory / 1e9:.1f} GB", "warning",
                "a worker needs about 1.5 GB and its model: give the node more",
            )  # fmt: skip
        else:
            yield CheckResult("memory", node.name, f"{memory / 1e9:.1f} GB")
        yield object_store_result(node.name, store, answers[node.name]["shared_memory"])
    resources = usable_resources()
    if not resources.get("CPU") and not resources.get("GPU"):
        yield CheckResult("CPUs, GPUs", "cluster", "none", "error", "add worker nodes")


def object_store_result(node: str, store: float, shared: int) -> CheckResult:
    """Check that `store` bytes are enough to read ahead, and fit into the node's `shared` memory."""
    found = f"{store / 2**20:,.0f} MiB, /dev/shm {shared / 2**20:,.0f} MiB"
    if store > shared:
        return CheckResult(
            "object store", node, found, "warning",
            "it is on disk: give the container more shared memory, such as docker --shm-size=8g",
        )  # fmt: skip
    if store < _OBJECT_STORE:
        return CheckResult(
            "object store", node, found, "warning", "start Ray with more: --object-store-memory"
        )
    return CheckResult("object store", node, found)


def _dali(nodes: list[Node]) -> Iterator[CheckResult]:
    expected = example_views(gpu=None)
    asked = [(node, "DALI on the CPU", node.agent.views.remote(False)) for node in nodes]
    asked += [(node, "DALI on the GPU", node.gpu_agent.views.remote(True)) for node in nodes if node.gpus]
    for node, check, answer in asked:
        on_gpu = check.endswith("GPU")
        way_out = (
            "wait until one of its GPUs is free; its driver must be 580 or newer, see nvidia-smi there"
            if on_gpu
            else "install nvidia-dali-cuda130 on it, on Linux with glibc 2.28 or newer"
        )
        try:
            difference = float(np.abs(_answer(answer) - expected).max())
            device = f"{_answer(node.gpu_agent.gpu.remote())}: " if on_gpu else ""
        except NodeAgentError as error:
            yield CheckResult(check, node.name, str(error), "error", way_out)
            continue
        same = difference <= (_GPU_DIFFERENCE if on_gpu else _CPU_DIFFERENCE)
        yield CheckResult(
            check, node.name, f"{device}views within {difference:.0e} of this process's",
            "ok" if same else "error", "" if same else "give all nodes the same version of DALI",
        )  # fmt: skip


def _exact_steps(nodes: list[Node]) -> Iterator[CheckResult]:
    asked = {"CPU": [(node, node.agent.exact_step.remote(False)) for node in nodes]}
    asked["GPU"] = [(node, node.gpu_agent.exact_step.remote(True)) for node in nodes if node.gpus]
    for device, answers in asked.items():
        found = {}
        for node, answer in answers:
            try:
                found[node.name] = _answer(answer)
            except NodeAgentError as error:
                way_out = "runs with exact=true may fail there too: see the node's logs"
                yield CheckResult(f"exact step on the {device}", node.name, str(error), "warning", way_out)
        yield from exact_results(device, found)


def exact_results(device: str, found: dict[str, tuple[str, Kind]]) -> Iterator[CheckResult]:
    """Compare the bits of an exact step between nodes, and name what differs where they do.

    found: the step's digest and the kind of machine of each node.
    """
    if not found:
        return
    check, (first, (bits, kind)) = f"exact step on the {device}", next(iter(found.items()))
    others = {node: theirs for node, (digest, theirs) in found.items() if digest != bits}
    if not others:
        yield CheckResult(check, "every node", f"the same bits, {bits}")
    for node, theirs in others.items():
        differing = (
            "; ".join(kind_differences(kind, theirs)) or "no difference in hardware or versions is known"
        )
        yield CheckResult(
            check, node, f"other bits than on {first}: {differing}", "warning",
            "train with exact=true on nodes of one kind; runs without it are not affected",
        )  # fmt: skip


def _clocks(nodes: list[Node]) -> Iterator[CheckResult]:
    for node in nodes:
        try:
            skew = min((_skew(node) for _ in range(5)), key=abs)
        except NodeAgentError as error:
            yield CheckResult("clock", node.name, str(error), "error", "see `ray status` and the node's logs")
            continue
        level: Level = (
            "ok" if abs(skew) < _SKEW_WARNING else "warning" if abs(skew) < _SKEW_ERROR else "error"
        )
        yield CheckResult(
            "clock", node.name, f"{skew:+.3f} s from this process's", level,
            "" if level == "ok" else "let the node keep time by NTP; S3 refuses requests 15 minutes off",
        )  # fmt: skip


def _skew(node: Node) -> float:
    """Seconds by which the node's clock is ahead. The answer is half a round trip old."""
    began = time.time()
    there = _answer(node.agent.now.remote())
    return there - (began + time.time()) / 2


def _storage(nodes: list[Node], uri: str | None) -> Iterator[CheckResult]:
    """Each node writes a file, then reads another node's file."""
    if uri is None:
        yield CheckResult(
            "storage", "every node", "not checked", "warning", "give one: --storage s3://BUCKET/PATH"
        )
        return
    uri = storage.absolute(uri)
    files = {node.name: f".diptych-doctor-{secrets.token_hex(8)}" for node in nodes}
    try:
        yield from _written_and_read(nodes, uri, files)
    finally:
        for removal in [node.agent.remove.remote(uri, files[node.name]) for node in nodes]:
            with suppress(NodeAgentError):
                _answer(removal)


def _written_and_read(nodes: list[Node], uri: str, files: dict[str, str]) -> Iterator[CheckResult]:
    rates: dict[str, float] = {}
    writing = [(node, node.agent.write.remote(uri, files[node.name])) for node in nodes]
    for node, answer in writing:
        try:
            rates[node.name] = _answer(answer)
        except NodeAgentError as error:
            yield CheckResult(
                "storage", node.name, str(error), "error", "give the node credentials that may write there"
            )
    wrote = [node for node in nodes if node.name in rates]
    # Each node reads the file of the node before it: all files on all nodes would take too long on a large
    # cluster.
    reading = [
        (node, node.agent.read.remote(uri, files[wrote[number - 1].name]))
        for number, node in enumerate(wrote)
    ]
    for node, answer in reading:
        try:
            read = _answer(answer)
        except NodeAgentError as error:
            way_out = "let the node read there; a path must be the same file system on all nodes"
            yield CheckResult("storage", node.name, str(error), "error", way_out)
        else:
            found = f"wrote {rates[node.name] / 1e6:,.0f} MB/s, read {read / 1e6:,.0f} MB/s"
            yield CheckResult("storage", node.name, found)
