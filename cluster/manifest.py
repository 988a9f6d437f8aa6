"""Manifests of Ray clusters on Kubernetes, AWS and Google Cloud, from the templates in deploy/."""

import json
import re
import shlex
from importlib import metadata, resources
from textwrap import indent
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cluster.deploy import machines
from cluster.staging import ENTRYPOINT
from pipelines.config import STRICT

Kind = Literal["kuberay", "aws", "gcp"]
Count = Annotated[int, Field(ge=1)]

# What most nodes with a GPU can give a pod.
_CPUS_PER_GPU, _GIB_PER_CPU = 6, 4

_BUILD = "docker build -f cluster/deploy/Dockerfile -t IMAGE . makes one"

_ONLY_FOR: dict[str, tuple[Kind, ...]] = {
    "region": ("aws",),
    "zone": ("aws", "gcp"),
    "project": ("gcp",),
    "cpus_per_node": ("kuberay",),
    "secret": ("kuberay",),
    "job": ("kuberay",),
}
_NEEDED = {
    "aws": {"region": "us-west-2", "gpu_type": "a10g"},
    "gcp": {"project": "my-project", "zone": "us-central1-a", "gpu_type": "l4"},
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Wishes:
    """What a cluster shall be like."""

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)] = "diptych"
    """The cluster's name."""
    image: str | None = None
    """The nodes' container image, made from cluster/deploy/Dockerfile; unset: Ray's own, where what is
    missing is installed by `diptych submit`, for each job and node."""
    workers: Count = 4
    """GPU nodes at most."""
    min_workers: Annotated[int, Field(ge=0)] | None = None
    """GPU nodes at least, from the start; unset: 0, or all of --workers with --job."""
    gpu_type: str | None = None
    """aws, gcp: t4, l4, a100, h100 and others. kuberay: a node label KEY=VALUE, or the VALUE alone of
    nvidia.com/gpu.product; unset: nodes with any GPU."""
    gpus_per_node: Count | None = None
    """GPUs of each node; unset: 1, or the fewest that there are with this type."""
    cpus_per_node: Count | None = None
    """kuberay: CPUs of each GPU node's pod, with 4 GiB of memory for each; unset: 6 for each GPU."""
    spot: bool = False
    """GPU nodes that cost less and may be taken back at any time; runs then go on on the others."""
    region: str | None = None
    """aws: as us-west-2."""
    zone: str | None = None
    """gcp: as us-central1-a. aws: an availability zone, as us-west-2a; unset: any."""
    project: str | None = None
    """gcp: the project's ID."""
    secret: str | None = None
    """kuberay: the secret whose keys are the storage's variables, AWS_ACCESS_KEY_ID and so on; unset: none,
    the nodes have access themselves."""
    job: str | None = None
    """kuberay: a diptych command, as 'train CONFIG --flags', that gets a cluster of its own (a RayJob)."""


def render(kind: Kind, wishes: Wishes) -> str:
    """The manifest. Raises ValueError for a wish that is missing, unknown, or without effect on this kind."""
    _check(kind, wishes)
    return {"kuberay": _kuberay, "aws": _aws, "gcp": _gcp}[kind](wishes)


def plain_image() -> str:
    """Ray's own image, with the Ray that is installed here."""
    return f"rayproject/ray:{metadata.version('ray')}-py311-cpu"


def fill(template: str, values: dict[str, Any]) -> str:
    """The file of that name in deploy/ with the values of its $names.

    A value that is alone on its line takes on the line's indentation; where it is empty, the line goes.
    """
    text = (resources.files("cluster.deploy") / template).read_text()

    def value(found: re.Match[str]) -> str:
        if name := found["inline"]:
            return str(values[name])
        block = str(values[found["block"]])
        return indent(block.rstrip("\n") + "\n", found["indent"]) if block else ""

    return re.sub(r"^(?P<indent> *)\$(?P<block>[a-z_]+)\n|\$(?P<inline>[a-z_]+)", value, text, flags=re.M)


def _check(kind: Kind, wishes: Wishes) -> None:
    for field, kinds in _ONLY_FOR.items():
        if getattr(wishes, field) is not None and kind not in kinds:
            raise ValueError(f"{_flag(field)} has no effect on {kind}; it is for {' and '.join(kinds)}")
    for field, example in _NEEDED.get(kind, {}).items():
        if getattr(wishes, field) is None:
            raise ValueError(f"{kind} needs {_flag(field)}, as {_flag(field)} {example}")
    least = wishes.min_workers or 0
    if least > wishes.workers:
        raise ValueError(
            f"--min-workers {least} is more than --workers {wishes.workers}; try --workers {least}"
        )
    if wishes.job is not None and not wishes.image:
        raise ValueError(f"--job needs an --image that has diptych; {_BUILD}")
    if wishes.spot and kind != "kuberay" and not wishes.image:
        raise ValueError(f"--spot needs an --image that has diptych, which looks for the notice; {_BUILD}")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _common(wishes: Wishes) -> dict[str, Any]:
    """The values of all kinds. Text is quoted as JSON does, which YAML takes as it is."""
    least = wishes.min_workers
    if least is None:
        least = wishes.workers if wishes.job else 0
    return {
        "name": json.dumps(wishes.name),
        "image": json.dumps(wishes.image or plain_image()),
        "ray": metadata.version("ray"),
        "workers": wishes.workers,
        "min_workers": least,
    }


def _kuberay(wishes: Wishes) -> str:
    gpus = wishes.gpus_per_node or 1
    cpus = wishes.cpus_per_node or _CPUS_PER_GPU * gpus
    memory = _GIB_PER_CPU * cpus
    secret = f"envFrom:\n  - secretRef: {{name: {json.dumps(wishes.secret)}}}"
    values = _common(wishes) | {
        "credentials": secret if wishes.secret else "",
        "gpu_nodes": _node_selector(wishes.gpu_type) if wishes.gpu_type else "",
        "scheduling": fill("kuberay_spot.yaml" if wishes.spot else "kuberay_on_demand.yaml", {}),
        "gpus": gpus,
        "cpus": cpus,
        "memory": f"{memory}Gi",
        "shared_memory": f"{memory // 2}Gi",
    }
    values["cluster"] = fill("kuberay_cluster.yaml", values)
    if wishes.job is None:
        return fill("raycluster.yaml", values)
    return fill("rayjob.yaml", values | {"entrypoint": json.dumps(_entrypoint(wishes.job))})


def _node_selector(gpu_type: str) -> str:
    key, _, value = gpu_type.rpartition("=")
    if not value:
        raise ValueError(f"--gpu-type {gpu_type} has no value; write KEY=VALUE, as a node's label has it")
    return f"nodeSelector:\n  {json.dumps(key or 'nvidia.com/gpu.product')}: {json.dumps(value)}"


def _entrypoint(job: str) -> str:
    try:
        words = shlex.split(job)
    except ValueError as error:
        raise ValueError(f"--job {job} is no command line: {error}") from error
    if files := [word for word in words if word.endswith(".toml")]:
        raise ValueError(
            f"--job: the image has no {files[0]}; name a config that comes with diptych, or leave out --job "
            "and send the file along: diptych submit -- train CONFIG.toml"
        )
    return f"{ENTRYPOINT} {shlex.join(words)}"


def _aws(wishes: Wishes) -> str:
    region, zone = wishes.region or "", wishes.zone
    if zone and not zone.startswith(region):
        raise ValueError(f"--zone {zone} is not in --region {region}; try --zone {region}a")
    gpus, machine = machines.machine(machines.AWS, wishes.gpu_type or "", wishes.gpus_per_node)
    login = ""
    if registry := re.match(r"\d+\.dkr\.ecr\.([-a-z0-9]+)\.amazonaws\.com", wishes.image or ""):
        password = f"aws ecr get-login-password --region {registry[1]}"
        login = _login(f"{password} | docker login --username AWS --password-stdin {registry[0]}")
    values = _common(wishes) | {
        "region": json.dumps(region),
        "zone": f"availability_zone: {json.dumps(zone)}" if zone else "",
        "gpus": gpus,
        "gpu_type": wishes.gpu_type,
        "machine": machine,
        "market": fill("aws_spot.yaml", {}) if wishes.spot else "",
        "initialization": login and "initialization_commands:\n" + indent(login, "  "),
        "notice": _notice("aws") if wishes.spot else "",
    }
    return fill("aws.yaml", values)


def _gcp(wishes: Wishes) -> str:
    zone, project = wishes.zone or "", wishes.project or ""
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
        raise ValueError(f"--zone {zone} is no zone of Google Cloud; as --zone us-central1-a")
    gpus, (machine, cpus) = machines.machine(machines.GCP, wishes.gpu_type or "", wishes.gpus_per_node)
    # The other machines come with their GPUs.
    cards = f"guestAccelerators:\n  - {{acceleratorType: nvidia-tesla-t4, acceleratorCount: {gpus}}}"
    registry = re.match(r"[-a-z0-9]+-docker\.pkg\.dev", wishes.image or "")
    values = _common(wishes) | {
        "region": json.dumps(zone.rpartition("-")[0]),
        "zone": json.dumps(zone),
        "project": json.dumps(project),
        "gpus": gpus,
        "cpus": cpus,
        "gpu_type": wishes.gpu_type,
        "machine": machine,
        "disk_type": json.dumps(f"zones/{zone}/diskTypes/pd-balanced"),
        "accelerators": cards if wishes.gpu_type == "t4" else "",
        "scheduling": fill("gcp_spot.yaml" if wishes.spot else "gcp_on_demand.yaml", {}),
        "account": json.dumps(f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"),
        "login": _login(f"gcloud auth configure-docker {registry[0]} --quiet") if registry else "",
        "notice": _notice("gcp") if wishes.spot else "",
    }
    return fill("gcp.yaml", values)


def _login(command: str) -> str:
    return f"# The nodes' own rights let them in to the registry.\n- {command}"


def _notice(kind: Kind) -> str:
    watch = f"python -m cluster.deploy.spot_notice {kind}"
    return (
        "# Has Ray drain the node once the cloud gives notice: the run saves and goes on on the others.\n"
        f"- setsid nohup {watch} > /tmp/spot_notice.log 2>&1 < /dev/null &"
    )
