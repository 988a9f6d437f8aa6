"""diptych cluster manifest: KubeRay and Ray take what it writes, and the commands of its pages exist."""

import gzip
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.cli.main import app, main
from cluster.deploy import machines, spot_notice
from cluster.manifest import plain_image, render
from pipelines.storage.filesystems import IN_A_JOB

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
DOCS = [ROOT / "docs" / f"{kind}.md" for kind in ("kuberay", "aws", "gcp")]

IMAGE = ["--image", "registry.example/diptych:1"]
JOB = "train simclr-imagenet-resnet50 --data.train 's3://bucket/my images' --output s3://bucket/runs"
AWS = ["aws", "--region", "us-west-2", "--gpu-type", "a10g"]
GCP = ["gcp", "--project", "my-project", "--zone", "us-central1-a", "--gpu-type", "l4"]
ECR = "123456789012.dkr.ecr.us-west-2.amazonaws.com/diptych:1"

KUBERAY_MANIFESTS = [
    ["kuberay"],
    ["kuberay", *IMAGE, "--workers", "8", "--min-workers", "2", "--gpus-per-node", "4", "--spot"],
    ["kuberay", "--secret", "storage", "--gpu-type", "cloud.google.com/gke-accelerator=nvidia-l4"],
    ["kuberay", *IMAGE, "--job", JOB, "--secret", "storage", "--spot", "--gpu-type", "NVIDIA-L4"],
]
LAUNCHER_MANIFESTS = [
    AWS,
    [*AWS, "--image", ECR, "--spot", "--zone", "us-west-2b", "--workers", "8", "--min-workers", "2"],
    GCP,
    [
        *GCP[:-1],
        "t4",
        "--image",
        "us-central1-docker.pkg.dev/p/d/diptych:1",
        "--spot",
        "--gpus-per-node",
        "2",
    ],
]
MANIFESTS = KUBERAY_MANIFESTS + LAUNCHER_MANIFESTS


def written(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(["cluster", "manifest", *arguments])
    return capsys.readouterr().out


# KubeRay's schema

# Later than the schema that is kept: authOptions since KubeRay 1.5.1 (its API reference, AuthOptions),
# backoffLimit since 1.2 (RayJobSpec, an int32).
_LATER_IN_CLUSTER = {
    "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}}
}
_LATER_IN_JOB = {"backoffLimit": {"type": "integer"}}


def strict(schema: Any) -> Any:
    """The schema as a strict API server reads it: an object has no fields but those that it names."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {**schema, "type": ["integer", "string"]}
    read = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        read["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        read.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return read


@pytest.fixture(scope="module")
def kuberay() -> dict[str, Any]:
    """A strict validator of each kind of resource."""
    schemas = json.loads(gzip.decompress((SCHEMAS / "kuberay.json.gz").read_bytes()))
    job = schemas["RayJob"]["properties"]["spec"]["properties"]
    job |= _LATER_IN_JOB
    job["rayClusterSpec"]["properties"] |= _LATER_IN_CLUSTER
    schemas["RayCluster"]["properties"]["spec"]["properties"] |= _LATER_IN_CLUSTER
    return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in strict(schemas).items()}


@pytest.mark.parametrize("arguments", KUBERAY_MANIFESTS)
def test_kuberay_takes_it(
    arguments: list[str], kuberay: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    resource = yaml.safe_load(written(arguments, capsys))
    assert resource["apiVersion"] == "ray.io/v1"
    assert resource["kind"] == ("RayJob" if "--job" in arguments else "RayCluster")
    kuberay[resource["kind"]].validate(resource)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("maxReplicas:", "maxReplica:"),
        ("maxReplicas: 4", "maxReplicas: four"),
        ("headGroupSpec:", "headgroupSpec:"),
        ("mode: token", "mode: tokens"),
        ("terminationGracePeriodSeconds:", "terminationGracePeriod:"),
        ("mountPath:", "path:"),
        ("medium: Memory", "medium: [Memory]"),
        ("operator: Exists", "operators: Exists"),
        ("memory: 8Gi", "memory: 8 GiB"),
    ],
)
def test_kuberay_s_schema_refuses_what_is_misspelt(
    right: str, wrong: str, kuberay: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(["kuberay"], capsys)
    assert right in text
    with pytest.raises(jsonschema.ValidationError):
        kuberay["RayCluster"].validate(yaml.safe_load(text.replace(right, wrong)))


# Ray's schema


def ray_config(text: str) -> dict[str, Any]:
    """The file as `ray up` reads it, with Ray's defaults; what Ray's own checks refuse is raised."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


@pytest.mark.parametrize("arguments", LAUNCHER_MANIFESTS)
def test_ray_up_takes_it(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = ray_config(written(arguments, capsys))
    assert config["provider"]["type"] == arguments[0]
    assert config["docker"]["image"]
    # Nothing of Ray's defaults is left that would install another Ray.
    assert config["setup_commands"] == config["worker_setup_commands"] == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("max_workers: 4", "max_worker: 4"),
        ("head_node_type: head", "head_node_type: heads"),
        ("file_mounts:", "file_mount:"),
        ("cache_stopped_nodes: false", "cache_stopped_nodes: never"),
        ("worker_run_options:", "worker_options:"),
        ("min_workers: 0", "min_workers: 9"),
    ],
)
@pytest.mark.parametrize("arguments", [AWS, GCP], ids=["aws", "gcp"])
def test_ray_s_schema_refuses_what_is_misspelt(
    arguments: list[str], right: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(arguments, capsys)
    assert right in text
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        ray_config(text.replace(right, wrong))


# What must hold of every cluster


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    return resource["spec"].get("rayClusterSpec", resource["spec"])


@pytest.mark.parametrize("arguments", KUBERAY_MANIFESTS)
def test_pods_have_memory_time_to_go_and_a_token(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    spec = cluster_spec(yaml.safe_load(written(arguments, capsys)))
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] <= group["maxReplicas"]
    pods = [spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert "cpu" in resources["requests"]
        (mount,) = container["volumeMounts"]
        (volume,) = pod["volumes"]
        assert mount["mountPath"] == "/dev/shm"
        assert volume["name"] == mount["name"]
        assert volume["emptyDir"]["medium"] == "Memory"
    environment = {entry["name"]: entry["value"] for entry in pods[1]["containers"][0]["env"]}
    drained = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 60 < drained < pods[1]["terminationGracePeriodSeconds"]


def test_ray_knows_the_variable_that_has_it_drain_before_it_ends() -> None:
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")


@pytest.mark.parametrize("arguments", LAUNCHER_MANIFESTS)
def test_nothing_runs_on_the_head_and_nobody_gets_in_without_ssh_and_token(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(written(arguments, capsys))
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    starts = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert ["--dashboard-host=127.0.0.1" in line for line in starts] == [True]
    gpu = config["available_node_types"]["gpu"]
    assert 0 <= gpu["min_workers"] <= gpu["max_workers"] == config["max_workers"]


@pytest.mark.parametrize("arguments", MANIFESTS)
def test_no_credential_of_this_machine_is_in_it(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = "wJalrXUtnFEMIplanted"
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AZURE_STORAGE_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "RAY_AUTH_TOKEN",
    ):
        monkeypatch.setenv(name, planted)
    text = written(arguments, capsys)
    assert planted not in text
    assert not re.search(r"(secret_?access_?key|password|account_?key) *[:=]", text, re.I)


def test_settings_are_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--workers", "8", "--min-workers", "2", "--name", "mine", "--gpus-per-node", "4", *IMAGE]
    resource = yaml.safe_load(
        written(["kuberay", *settings, "--cpus-per-node", "40", "--secret", "s"], capsys)
    )
    (group,) = resource["spec"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert resource["metadata"]["name"] == "mine"
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 8)
    assert worker["image"] == IMAGE[1]
    assert worker["resources"]["limits"] == {"memory": "160Gi", "nvidia.com/gpu": 4}
    assert worker["resources"]["requests"] == {"cpu": 40, "memory": "160Gi", "nvidia.com/gpu": 4}
    assert worker["envFrom"] == [{"secretRef": {"name": "s"}}]
    for kind in (AWS, GCP):
        config = yaml.safe_load(written([*kind, *settings], capsys))
        gpu = config["available_node_types"]["gpu"]
        assert (config["cluster_name"], config["docker"]["image"]) == ("mine", IMAGE[1])
        assert (gpu["min_workers"], gpu["max_workers"]) == (2, 8)
        named = gpu["node_config"].get("InstanceType") or gpu["node_config"]["machineType"]
        assert named == {"aws": "g5.12xlarge", "gcp": "g2-standard-48"}[kind[0]]


@pytest.mark.parametrize("arguments", [["kuberay"], AWS, GCP], ids=["kuberay", "aws", "gcp"])
def test_spot_nodes_are_asked_for_where_they_are_wanted_and_only_there(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = {
        "kuberay": ["karpenter.sh/capacity-type", "cloud.google.com/gke-spot"],
        "aws": ["MarketType: spot", "cluster.deploy.spot_notice aws"],
        "gcp": ["provisioningModel: SPOT", "cluster.deploy.spot_notice gcp"],
    }[arguments[0]]
    spot = written([*arguments, *IMAGE, "--spot"], capsys)
    for flag in ([], ["--no-spot"]):
        usual = written([*arguments, *IMAGE, *flag], capsys)
        assert [(words in spot, words in usual) for words in said] == [(True, False)] * 2


def test_a_job_has_its_cluster_from_the_start_and_runs_what_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    resource = yaml.safe_load(written(["kuberay", *IMAGE, "--workers", "3", "--job", JOB], capsys))
    spec = resource["spec"]
    assert spec["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"] == 3
    words = shlex.split(spec["entrypoint"])
    assert words[:4] == ["exec", "python", "-m", "cluster"]
    assert words[4:] == shlex.split(JOB)
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"][IN_A_JOB] == "1"
    assert spec["shutdownAfterJobFinishes"] is True


def test_an_output_file_is_what_would_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = written(["kuberay"], capsys)
    said = written(["kuberay", "--output", str(tmp_path / "cluster.yaml")], capsys)
    assert said == f"{tmp_path}/cluster.yaml; next: kubectl apply -f {tmp_path}/cluster.yaml\n"
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"]
    assert (tmp_path / "cluster.yaml").read_text() == printed


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["cluster", "manifest", "kuberay", "--output", str(tmp_path)])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"diptych: cannot write {tmp_path}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kuberay", "--region", "us-west-2"], "--region has no effect on kuberay; it is for aws"),
        (["kuberay", "--zone", "us-west-2a"], "--zone has no effect on kuberay; it is for aws and gcp"),
        ([*GCP, "--region", "us-central1"], "--region has no effect on gcp; it is for aws"),
        ([*AWS, "--project", "mine"], "--project has no effect on aws; it is for gcp"),
        ([*AWS, "--secret", "storage"], "--secret has no effect on aws; it is for kuberay"),
        ([*GCP, "--job", "train"], "--job has no effect on gcp; it is for kuberay"),
        ([*GCP, "--cpus-per-node", "9"], "--cpus-per-node has no effect on gcp; it is for kuberay"),
        (["aws", "--gpu-type", "l4"], "aws needs --region, such as --region us-west-2"),
        (["aws", "--region", "us-west-2"], "aws needs --gpu-type, such as --gpu-type a10g"),
        (["gcp", "--project", "p"], "gcp needs --zone, such as --zone us-central1-a"),
        (
            [*AWS[:-1], "v100"],
            "--gpu-type v100 is unknown here; choose one of t4, a10g, l4, l40s, a100, a100-80gb",
        ),
        ([*GCP[:-1], "a10g"], "--gpu-type a10g is unknown here; choose one of t4, l4, a100"),
        ([*AWS, "--gpus-per-node", "3"], "--gpus-per-node 3: no machine has that many a10g; try 1 or 4 or 8"),
        ([*AWS, "--zone", "eu-west-1a"], "--zone eu-west-1a is not in --region us-west-2"),
        ([*AWS, "--spot"], "--spot needs an --image that has diptych"),
        (["kuberay", "--workers", "0"], "workers=0: Input should be greater than or equal to 1"),
        (["kuberay", "--workers", "2", "--min-workers", "3"], "--min-workers 3 is more than --workers 2"),
        (["kuberay", "--name", "Mine"], "name=Mine is not a valid name; use lowercase letters"),
        (["kuberay", "--gpu-type", "a="], "--gpu-type a= has no value; write KEY=VALUE"),
        (["kuberay", "--job", JOB], "--job needs an --image that has diptych"),
        (
            ["kuberay", *IMAGE, "--job", "train 'a"],
            "--job train 'a is not a command line: No closing quotation",
        ),
        (["kuberay", *IMAGE, "--job", "train mine.toml"], "--job: the image has no mine.toml"),
        (["kuberay", *IMAGE, "--job", f"{JOB} --epoch 3"], "Unknown option: --epoch"),
        (
            ["kuberay", *IMAGE, "--job", JOB.rpartition(" --output")[0]],
            "runs is a path in the job's own folder",
        ),
        ([*GCP[:3], "--zone", "uscentral", *GCP[5:]], "--zone uscentral is not a zone of Google Cloud"),
        (["azure"], 'Invalid value "azure" for KIND'),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["cluster", "manifest", *arguments, "--output", str(tmp_path / "none.yaml")])
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_every_machine_fills_a_manifest_that_ray_up_takes() -> None:
    for kind, table in (("aws", machines.AWS), ("gcp", machines.GCP)):
        start = {"aws": AWS[:3], "gcp": GCP[:5]}[kind]
        for gpu_type, counts in table.items():
            for gpus in counts:
                words = [*start, "--gpu-type", gpu_type, "--gpus-per-node", str(gpus)]
                bound = app.parse_args(
                    ["cluster", "manifest", *words], print_error=False, exit_on_error=False
                )[1]
                config = ray_config(render(*bound.args, **bound.kwargs))
                if kind == "gcp":
                    assert config["available_node_types"]["gpu"]["resources"]["GPU"] == gpus


# The image


def test_the_image_is_made_from_what_is_here_and_has_the_manifests_ray() -> None:
    from importlib.metadata import version

    lines = (ROOT / "cluster/deploy/Dockerfile").read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert base == plain_image() == f"rayproject/ray:{version('ray')}-py311-cpu"
    assert f"\nray=={version('ray')} " in (ROOT / "requirements.lock").read_text().replace("[", " ")
    sources = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    kept = (ROOT / "cluster/deploy/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source


def test_a_wheel_has_the_templates() -> None:
    from hatchling.builders.wheel import WheelBuilder

    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "cluster/deploy").glob("*.*")}
    assert there
    assert there <= packed


# Commands that manifests and pages name


def check_command(words: list[str]) -> None:
    """Fail unless the program, its command and its flags exist, as far as they are ours or Ray's."""
    program = words[0]
    if words[:3] == ["python", "-m", "cluster"]:
        program, words = "diptych", words[2:]
    if program == "diptych":
        _, bound, *_ = app.parse_args(words[1:], print_error=False, exit_on_error=False)
        if words[1] == "submit":
            check_command(["diptych", *words[words.index("--") + 1 :]])
        if words[1:3] == ["cluster", "manifest"]:
            kind, *_ = bound.args
            yaml.safe_load(render(kind, bound.kwargs["settings"]))
    elif program == "ray":
        from ray.scripts.scripts import cli

        command = cli.commands[words[1]]
        command.make_context(words[1], list(words[2:]))
    elif program == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words
        assert words[3] in spot_notice.CLOUDS
    else:
        assert program in {
            "aws", "docker", "export", "gcloud", "helm", "kubectl", "pip", "python", "setsid", "ulimit",
            "umask", "for", "done",
        }, words  # fmt: skip


def commands_of(line: str) -> Iterator[list[str]]:
    """The commands of a shell line, each as its words; what only starts them is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";|&"):
            if words and words != ["!"]:
                yield words
            words = []
        elif word not in ("setsid", "nohup", "!", "do"):
            words.append(word)


def test_the_check_of_commands_can_fail() -> None:
    from click import ClickException
    from cyclopts import CycloptsError

    for wrong in (
        "ray start --heads",
        "ray stat",
        "diptych trian",
        "diptych submit -- train --epoch 3",
        "rya up",
    ):
        (words,) = commands_of(wrong)
        with pytest.raises((ClickException, CycloptsError, KeyError, AssertionError)):
            check_command(words)


@pytest.mark.parametrize("arguments", MANIFESTS)
def test_the_commands_of_a_manifest_exist(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    manifest = yaml.safe_load(written(arguments, capsys))
    lines = [line for key, lines in manifest.items() if key.endswith("start_ray_commands") for line in lines]
    if manifest.get("kind") == "RayJob":
        lines = [manifest["spec"]["entrypoint"].removeprefix("exec ")]
    checked = 0
    for line in lines:
        for words in commands_of(re.sub(r"(2>&1|[<>] *\S+)", "", line)):
            check_command(words)
            checked += 1
    assert checked or manifest.get("kind") == "RayCluster"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_the_commands_and_files_of_a_page_exist(page: Path) -> None:
    from ray.scripts.scripts import cli

    text = page.read_text()
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    seen = set()
    for line in lines:
        line = re.sub(r"\$\(.*?\)(?=[\s.]|$)", "VALUE", line)
        for words in commands_of(re.sub(r"(2>&1|[<>] *\S+)", "", line)):
            check_command(words)
            seen.add(" ".join(words[:2]))
    assert {"diptych cluster", "diptych submit", "diptych jobs", "docker build"} <= seen
    for inline in re.findall(r"`((?:diptych|ray) [^`]+)`", text):
        # Not whole commands: which flags they need is no matter.
        for program, *words in commands_of(inline):
            if program == "diptych":
                app.parse_args(words, print_error=False, exit_on_error=False)
            else:
                assert words[0] in cli.commands, inline
    for named in re.findall(r"\b(?:cluster|docs|training)/[\w/.-]*\w", text):
        assert (ROOT / named).exists(), named
