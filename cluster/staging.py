"""Files that a job needs and its cluster lacks: those sent along, and what is installed."""

import hashlib
import json
import os
import platform
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from itertools import pairwise
from pathlib import Path
from typing import Any

from cluster import staging
from cluster.cli.app import read_toml
from pipelines.storage.filesystems import IN_A_JOB
from training.config.objective import Option, is_own
from training.objectives import Objective, find_own, source_of

PACKAGES = ("pipelines", "training", "tuning", "cluster")


def main() -> None:
    """Print what this machine has, as one line of JSON; the arguments are diptych's requirements."""
    there = {
        "python": platform.python_version(),
        "ray": metadata.version("ray"),
        "fingerprint": fingerprint(),
        "unmet": list(dict.fromkeys(unmet(sys.argv[1:]))),
    }
    print(json.dumps(there))


def fingerprint() -> str | None:
    """Of the code of diptych that is installed here; None where none is."""
    try:
        metadata.version("diptych")
    except metadata.PackageNotFoundError:
        return None
    digest = hashlib.sha256()
    for name, path in code_files():
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def code_files() -> Iterator[tuple[str, Path]]:
    """The files that diptych consists of, each with its path from the folder of the packages on, in order."""
    for package in PACKAGES:
        spec = util.find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else None
        if folder is None:
            continue
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(folder)}", path


def unmet(requirements: Iterable[str], extra: str = "") -> Iterator[str]:
    """Those of the requirements, and of what their extras require, that no installed version meets."""
    from packaging.requirements import Requirement  # Wherever Ray is, this is.

    for line in requirements:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        wanted.marker = None
        try:
            has = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            has = None
        if has is None or not wanted.specifier.contains(has, prereleases=True):
            yield str(wanted)
            continue
        for inner in wanted.extras:
            optional = [one for one in metadata.requires(wanted.name) or () if "extra ==" in one]
            yield from unmet(optional, inner)


if __name__ == "__main__":
    main()


def own_modules(objective: str, options: Mapping[str, Option] | None = None) -> list[Path]:
    """The file or package of MODULE:CLASS, where it is not installed; none for other objectives.

    It is looked for in the folder at hand too. Raises ValueError where it will not do, or does not take the
    options, where they are known.
    """
    if not is_own(objective):
        return []
    if (here := os.getcwd()) not in sys.path:  # As `python -m` has it.
        sys.path.insert(0, here)
    if options is not None:
        find_own(Objective, objective, options)
    source = source_of(objective)
    return [source] if source else []


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
    if there["fingerprint"] == staging.fingerprint():
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
    from cluster.staging import own_modules  # torch takes seconds to import.

    for source in own_modules(objective):
        for path in source.rglob("*.py") if source.is_dir() else [source]:
            yield str(path.relative_to(source.parent)), path.read_bytes()


def _code() -> Iterator[tuple[str, bytes]]:
    for name, path in staging.code_files():
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
