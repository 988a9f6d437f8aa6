"""What a job needs that its cluster lacks: the files that are sent along, and what is installed."""

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

# A job that is stopped gets so long to save before it is killed; Ray reads this where the job runs.
_STOP_SECONDS = 600

# PyTorch and the CUDA libraries are some gigabytes.
_INSTALL_SECONDS = 3600

# What only some commands need, by the word in them that says so.
_EXTRAS = {"mlflow": "mlflow", "wandb": "wandb", "onnx": "export"}

# What the cluster's shell runs: signals reach diptych itself.
ENTRYPOINT = "exec python -m cluster"


@dataclass(frozen=True)
class Staged:
    """A job as its cluster will run it.

    `files` are sent, by their path within the job's folder; `install` are the packages that pip installs
    there, and `why` says what decided on both.
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
        """Bytes of the files."""
        return sum(len(content) for content in self.files.values())

    def write(self, folder: Path) -> None:
        """The files below `folder`."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def environment(self, folder: Path) -> dict[str, Any]:
        """Ray's runtime environment of the job; it holds nothing of this process's environment.

        pip, and not uv: it keeps what the cluster has, such as a PyTorch built for its driver.
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
    """The job of a diptych command on a cluster that has what `probe` has printed.

    TOML files that the command names go along, by their names alone, and the code of an objective of one's
    own. Raises ValueError where two of them
    share one, and where the cluster's Ray or Python will not do.
    """
    _check_versions(there)
    command, files = [], {}
    for token in tokens:
        path = Path(token)
        if path.suffix == ".toml" and path.is_file():
            if path.name in files:
                raise ValueError(f"two files of the command are named {path.name}; rename one")
            files[path.name] = path.read_bytes()
            token = path.name
        command.append(token)
    for objective in filter(is_own, [*_values(command, files, "objective")]):
        files |= dict(_own_code(objective))
    if there["fingerprint"] == installed.fingerprint():
        why = "the cluster has this diptych: nothing is installed"
    else:
        files |= dict(_code())
        has = "another diptych, or a changed one" if there["fingerprint"] else "no diptych"
        why = f"the cluster has {has}: its code goes along"
    install = tuple(_pinned(there["unmet"]))
    if install:
        why += f"; pip installs what is missing there, beside what the cluster has: {', '.join(install)}"
    return Staged(tuple(command), files, install, why)


def requirements(tokens: Iterable[str]) -> list[str]:
    """What diptych needs for this command, with the extras that its trackers and formats are."""
    from packaging.requirements import Requirement

    words: set[str] = set()
    for token in tokens:
        words |= {token, token.partition("=")[2]}
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
    """What the probe has printed, from its job's log; ValueError where it did not get so far."""
    for line in reversed(log.splitlines()):
        if line.startswith('{"python"'):
            return json.loads(line)
    last = (log.strip().splitlines() or ["it printed nothing"])[-1]
    raise ValueError(f"the cluster could not be asked what it has: {last}")


def _check_versions(there: dict[str, Any]) -> None:
    """Raises ValueError where its Python or Ray is not what diptych needs: a job cannot change them."""
    from packaging.specifiers import SpecifierSet

    python = metadata.metadata("diptych")["Requires-Python"]
    if not SpecifierSet(python).contains(there["python"]):
        raise ValueError(f"the cluster has Python {there['python']}; diptych needs {python}")
    for line in there["unmet"]:
        if line.startswith("ray["):
            raise ValueError(f"the cluster has Ray {there['ray']}; diptych needs {line}")


def _values(command: Iterable[str], tomls: Mapping[str, bytes], key: str) -> Iterator[str]:
    """What the command's flags and the training configs in its TOML files set `key` to."""
    for flag, after in pairwise([*command, ""]):
        if flag.partition("=")[0] == f"--{key}":
            yield flag.partition("=")[2] or after
    for content in tomls.values():
        values = tomllib.loads(content.decode())
        yield from (str(table[key]) for table in (values, values.get("train", {})) if key in table)


def _own_code(objective: str) -> Iterator[tuple[str, bytes]]:
    """The Python files of MODULE:CLASS, by their path within the job's folder; none where it is installed."""
    from training.objectives import own_modules  # torch takes seconds to import.

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
    """The requirements at the versions that are installed here, where they are."""
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
