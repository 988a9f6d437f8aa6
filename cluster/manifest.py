"""Write manifests of Ray clusters on Kubernetes, AWS and Google Cloud from the templates in deploy/."""

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

# Most GPU nodes have this much for a pod.
_CPUS_PER_GPU, _GIB_PER_CPU = 6, 4

_BUILD = "make one with: docker build -f cluster/deploy/Dockerfile -t IMAGE ."

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
class ManifestSettings:
    """Settings of a cluster manifest."""

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)] = "diptych"
    """The cluster's name."""
    image: str | None = None
    """The nodes' container image, made from cluster/deploy/Dockerfile. Unset: Ray's own image, into which
    `diptych submit` installs missing packages for each job and node."""
    workers: Count = 4
    """Largest number of GPU nodes."""
    min_workers: Annotated[int, Field(ge=0)] | None = None
    """Number of GPU nodes at the start, and the smallest; unset: 0, or --workers with --job."""
    gpu_type: str | None = None
    """aws, gcp: t4, l4, a100, h100 and others. kuberay: a node label KEY=VALUE, or just the VALUE of
    nvidia.com/gpu.product; unset: nodes with any GPU."""
    gpus_per_node: Count | None = None
    """GPUs of each node; unset: 1, or the smallest number that machines with this type have."""
    cpus_per_node: Count | None = None
    """kuberay: CPUs of each GPU node's pod, with 4 GiB of memory for each; unset: 6 for each GPU."""
    spot: bool = False
    """Use spot nodes, which cost less and may be taken back at any time; runs continue on the other nodes."""
    region: str | None = None
    """aws: a region such as us-west-2."""
    zone: str | None = None
    """gcp: a zone such as us-central1-a. aws: an availability zone such as us-west-2a; unset: any."""
    project: str | None = None
    """gcp: the project's ID."""
    secret: str | None = None
    """kuberay: a secret whose keys are the storage's variables, such as AWS_ACCESS_KEY_ID. Unset: none, since
    the nodes have access themselves."""
    job: str | None = None
    """kuberay: a diptych command, such as 'train CONFIG --flags', run on a cluster of its own (a RayJob)."""


def render(kind: Kind, settings: ManifestSettings) -> str:
    """Write the manifest. Raises ValueError for a setting that is missing, unknown or without effect."""
    _check(kind, settings)
    return {"kuberay": _kuberay, "aws": _aws, "gcp": _gcp}[kind](settings)


def plain_image() -> str:
    """Ray's own image, of the Ray version installed here."""
    return f"rayproject/ray:{metadata.version('ray')}-py311-cpu"


def fill(template: str, values: dict[str, Any]) -> str:
    """Read a template in deploy/ and replace its $names by their values.

    A value alone on its line takes the line's indentation; if it is empty, the line is removed.
    """
    text = (resources.files("cluster.deploy") / template).read_text()

    def value(found: re.Match[str]) -> str:
        if name := found["inline"]:
            return str(values[name])
        block = str(values[found["block"]])
        return indent(block.rstrip("\n") + "\n", found["indent"]) if block else ""

    return re.sub(r"^(?P<indent> *)\$(?P<block>[a-z_]+)\n|\$(?P<inline>[a-z_]+)", value, text, flags=re.M)


def _check(kind: Kind, settings: ManifestSettings) -> None:
    for field, kinds in _ONLY_FOR.items():
        if getattr(settings, field) is not None and kind not in kinds:
            raise ValueError(f"{_flag(field)} has no effect on {kind}; it is for {' and '.join(kinds)} alone")
    for field, example in _NEEDED.get(kind, {}).items():
        if getattr(settings, field) is None:
            raise ValueError(f"{kind} needs {_flag(field)}, such as {_flag(field)} {example}")
    least = settings.min_workers or 0
    if least > settings.workers:
        raise ValueError(
            f"--min-workers {least} is more than --workers {settings.workers}; try --workers {least}"
        )
    if settings.job is not None and not settings.image:
        raise ValueError(f"--job needs an --image that has diptych; {_BUILD}")
    if settings.spot and kind != "kuberay" and not settings.image:
        raise ValueError(f"--spot needs an --image that has diptych, which watches for the notice; {_BUILD}")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _common(settings: ManifestSettings) -> dict[str, Any]:
    """Values that all kinds share. Text is quoted as in JSON, which is valid YAML."""
    least = settings.min_workers
    if least is None:
        least = settings.workers if settings.job else 0
    return {
        "name": json.dumps(settings.name),
        "image": json.dumps(settings.image or plain_image()),
        "ray": metadata.version("ray"),
        "workers": settings.workers,
        "min_workers": least,
    }


def _kuberay(settings: ManifestSettings) -> str:
    gpus = settings.gpus_per_node or 1
    cpus = settings.cpus_per_node or _CPUS_PER_GPU * gpus
    memory = _GIB_PER_CPU * cpus
    secret = f"envFrom:\n  - secretRef: {{name: {json.dumps(settings.secret)}}}"
    values = _common(settings) | {
        "credentials": secret if settings.secret else "",
        "gpu_nodes": _node_selector(settings.gpu_type) if settings.gpu_type else "",
        "scheduling": fill("kuberay_spot.yaml" if settings.spot else "kuberay_on_demand.yaml", {}),
        "gpus": gpus,
        "cpus": cpus,
        "memory": f"{memory}Gi",
        "shared_memory": f"{memory // 2}Gi",
    }
    values["cluster"] = fill("kuberay_cluster.yaml", values)
    if settings.job is None:
        return fill("raycluster.yaml", values)
    return fill("rayjob.yaml", values | {"entrypoint": json.dumps(_entrypoint(settings.job))})


def _node_selector(gpu_type: str) -> str:
    key, _, value = gpu_type.rpartition("=")
    if not value:
        raise ValueError(f"--gpu-type {gpu_type} has no value; write KEY=VALUE, as in a node's label")
    return f"nodeSelector:\n  {json.dumps(key or 'nvidia.com/gpu.product')}: {json.dumps(value)}"


def _entrypoint(job: str) -> str:
    try:
        words = shlex.split(job)
    except ValueError as error:
        raise ValueError(f"--job {job} is not a command line: {error}") from error
    if files := [word for word in words if word.endswith(".toml")]:
        raise ValueError(
            f"--job: the image has no {files[0]}; use a config that comes with diptych, or leave out --job "
            "and send the file: diptych submit -- train CONFIG.toml"
        )
    return f"{ENTRYPOINT} {shlex.join(words)}"


def _aws(settings: ManifestSettings) -> str:
    region, zone = settings.region or "", settings.zone
    if zone and not zone.startswith(region):
        raise ValueError(f"--zone {zone} is not in --region {region}; try --zone {region}a")
    gpus, machine = machines.machine(machines.AWS, settings.gpu_type or "", settings.gpus_per_node)
    login = ""
    if registry := re.match(r"\d+\.dkr\.ecr\.([-a-z0-9]+)\.amazonaws\.com", settings.image or ""):
        password = f"aws ecr get-login-password --region {registry[1]}"
        login = _login(f"{password} | docker login --username AWS --password-stdin {registry[0]}")
    values = _common(settings) | {
        "region": json.dumps(region),
        "zone": f"availability_zone: {json.dumps(zone)}" if zone else "",
        "gpus": gpus,
        "gpu_type": settings.gpu_type,
        "machine": machine,
        "market": fill("aws_spot.yaml", {}) if settings.spot else "",
        "initialization": login and "initialization_commands:\n" + indent(login, "  "),
        "notice": _notice("aws") if settings.spot else "",
    }
    return fill("aws.yaml", values)


def _gcp(settings: ManifestSettings) -> str:
    zone, project = settings.zone or "", settings.project or ""
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
        raise ValueError(f"--zone {zone} is not a zone of Google Cloud; give one such as us-central1-a")
    gpus, (machine, cpus) = machines.machine(machines.GCP, settings.gpu_type or "", settings.gpus_per_node)
    # Other machine types include their GPUs.
    cards = f"guestAccelerators:\n  - {{acceleratorType: nvidia-tesla-t4, acceleratorCount: {gpus}}}"
    registry = re.match(r"[-a-z0-9]+-docker\.pkg\.dev", settings.image or "")
    values = _common(settings) | {
        "region": json.dumps(zone.rpartition("-")[0]),
        "zone": json.dumps(zone),
        "project": json.dumps(project),
        "gpus": gpus,
        "cpus": cpus,
        "gpu_type": settings.gpu_type,
        "machine": machine,
        "disk_type": json.dumps(f"zones/{zone}/diskTypes/pd-balanced"),
        "accelerators": cards if settings.gpu_type == "t4" else "",
        "scheduling": fill("gcp_spot.yaml" if settings.spot else "gcp_on_demand.yaml", {}),
        "account": json.dumps(f"ray-autoscaler-sa-v1@{project}.iam.gserviceaccount.com"),
        "login": _login(f"gcloud auth configure-docker {registry[0]} --quiet") if registry else "",
        "notice": _notice("gcp") if settings.spot else "",
    }
    return fill("gcp.yaml", values)


def _login(command: str) -> str:
    return f"# Log in to the registry with the node's own permissions.\n- {command}"


def _notice(kind: Kind) -> str:
    watch = f"python -m cluster.deploy.spot_notice {kind}"
    return (
        "# Drains the node when the cloud gives notice: the run saves and continues on the others.\n"
        f"- setsid nohup {watch} > /tmp/spot_notice.log 2>&1 < /dev/null &"
    )
