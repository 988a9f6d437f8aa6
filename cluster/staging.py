"""Determine which files to send with a job, and which packages to install for it."""

import json
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster import installed
from cluster.config_file import read_toml
from pipelines.storage.filesystems import IN_A_JOB
from training.config.objective import is_own

# A stopped job has this long to save before it is killed; Ray reads this where the job runs.
_STOP_SECONDS = 600

# PyTorch and the CUDA libraries are some gigabytes.
_INSTALL_SECONDS = 3600

# Extras of diptych that some commands need, by the word in the command that shows it.
_EXTRAS = {"mlflow": "mlflow", "wandb": "wandb", "onnx": "export"}

# Start of the cluster's shell command; with exec, signals reach diptych itself.
ENTRYPOINT = "exec python -m cluster"


@dataclass(frozen=True)
class Staged:
    """A job as the cluster will run it.

    `files` to send, by their path within the job's folder; `install`, the packages that pip installs there;
    `why`, the reason for both.
    """

    command: tuple[str, ...]
    files: dict[str, bytes]
    install: tuple[str, ...]
    why: str

    @property
    def entrypoint(self) -> str:
        """The command for the cluster's shell."""
        return f"{ENTRYPOINT} {shlex.join(self.command)}"

    @property
    def size(self) -> int:
        """Size of the files in bytes."""
        return sum(len(content) for content in self.files.values())

    def write(self, folder: Path) -> None:
        """Write the files below `folder`."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def environment(self, folder: Path) -> dict[str, Any]:
        """The job's runtime environment for Ray; nothing of this process's environment is in it.

        pip instead of uv, because pip keeps what the cluster has, such as a PyTorch built for its driver.
        """
        environment: dict[str, Any] = {
            "env_vars": {IN_A_JOB: "1", "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)},
            "config": {"setup_timeout_seconds": _INSTALL_SECONDS},
        }
        if self.files:
            environment["working_dir"] = str(folder)
        if self.install:
            environment["pip"] = {"packages": list(self.install), "pip_check": False}
        return environment


def stage(tokens: Iterable[str], there: dict[str, Any]) -> Staged:
    """Prepare the job of a diptych command for a cluster whose probe returned `there`.

    TOML files in the command are sent under their base names, and so is the code of a custom objective.
    Raises ValueError if two files share a name, or if the cluster's Ray or Python does not fit.
    """
    _check_versions(there)
    command, files = [], {}
    for token in tokens:
        path = Path(token)
        if path.suffix == ".toml" and path.is_file():
            if path.name in files:
                raise ValueError(f"two files in the command are named {path.name}; rename one")
            files[path.name] = path.read_bytes()
            token = path.name
        command.append(token)
    for objective in filter(is_own, [*_values(command, files, "objective")]):
        files |= dict(_own_code(objective))
    if there["fingerprint"] == installed.fingerprint():
        why = "the cluster has this diptych: nothing is installed"
    else:
        files |= dict(_code())
        has = "different diptych code" if there["fingerprint"] else "no diptych"
        why = f"the cluster has {has}: the code is sent"
    install = tuple(_pinned(there["unmet"]))
    if install:
        why += f"; pip adds what is missing there: {', '.join(install)}"
    return Staged(tuple(command), files, install, why)


def requirements(tokens: Iterable[str]) -> list[str]:
    """diptych's requirements for a command, with the extras of its trackers and export formats."""
    from packaging.requirements import Requirement

    words: set[str] = set()
    for token in tokens:
        # diptych export takes the format from the ending of its file.
        words |= {token, token.partition("=")[2], Path(token).suffix.removeprefix(".")}
        if (path := Path(token)).suffix == ".toml" and path.is_file():
            values = read_toml(path)
            words |= {*values.get("trackers", ()), *values.get("train", {}).get("trackers", ())}
    extras = [extra for word, extra in _EXTRAS.items() if word in words]
    needed = []
    for line in metadata.requires("diptych") or ():
        wanted = Requirement(line)
        if wanted.marker and any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            wanted.marker = None
        needed.append(str(wanted))
    return needed


def read_probe(log: str) -> dict[str, Any]:
    """Find the probe's result in its job's log. Raises ValueError if there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith('{"python"'):
            return json.loads(line)
    last = (log.strip().splitlines() or ["it printed nothing"])[-1]
    raise ValueError(f"the probe of the cluster failed: {last}")


def _check_versions(there: dict[str, Any]) -> None:
    """Raises ValueError if diptych cannot use the cluster's Python or Ray; a job cannot change them."""
    from packaging.specifiers import SpecifierSet

    python = metadata.metadata("diptych")["Requires-Python"]
    if not SpecifierSet(python).contains(there["python"]):
        raise ValueError(f"the cluster has Python {there['python']}; diptych needs {python}")
    for line in there["unmet"]:
        if line.startswith("ray["):
            raise ValueError(f"the cluster has Ray {there['ray']}; diptych needs {line}")


def _values(command: Iterable[str], tomls: Mapping[str, bytes], key: str) -> Iterator[str]:
    """Values of `key` in the command's flags and in the training configs of its TOML files."""
    for flag, after in pairwise([*command, ""]):
        if flag.partition("=")[0] == f"--{key}":
            yield flag.partition("=")[2] or after
    for content in tomls.values():
        values = tomllib.loads(content.decode())
        yield from (str(table[key]) for table in (values, values.get("train", {})) if key in table)


def _own_code(objective: str) -> Iterator[tuple[str, bytes]]:
    """The Python files of MODULE:CLASS, by their path within the job's folder; none if it is installed."""
    from training.own_objective import own_modules  # torch takes seconds to import.

    for source in own_modules(objective):
        for path in source.rglob("*.py") if source.is_dir() else [source]:
            yield str(path.relative_to(source.parent)), path.read_bytes()


def _code() -> Iterator[tuple[str, bytes]]:
    for name, path in installed.code_files():
        yield name, path.read_bytes()
    version = metadata.version("diptych")
    yield (
        f"diptych-{version}.dist-info/METADATA",
        f"Metadata-Version: 2.1\nName: diptych\nVersion: {version}\n".encode(),
    )


def _pinned(unmet: Iterable[str]) -> Iterator[str]:
    """The requirements, pinned to the version installed here if there is one."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    for line in unmet:
        wanted = Requirement(line)
        try:
            version = Version(metadata.version(wanted.name)).public
        except metadata.PackageNotFoundError:
            yield line
            continue
        extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
        yield f"{wanted.name}{extras}=={version}"
