"""Probe which of diptych's requirements a machine has. A cluster without diptych runs this file by itself."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from pathlib import Path

PACKAGES = ("pipelines", "training", "tuning", "cluster")


def main() -> None:
    """Print this machine's versions and unmet requirements as a line of JSON; arguments are requirements."""
    there = {
        "python": platform.python_version(),
        "ray": metadata.version("ray"),
        "fingerprint": fingerprint(),
        "unmet": list(dict.fromkeys(unmet(sys.argv[1:]))),
    }
    print(json.dumps(there))


def fingerprint() -> str | None:
    """Hash of the diptych code that is installed here; None if there is none."""
    try:
        metadata.version("diptych")
    except metadata.PackageNotFoundError:
        return None
    digest = hashlib.sha256()
    for name, path in code_files():
        digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def code_files() -> Iterator[tuple[str, Path]]:
    """diptych's files in order, each with its path relative to the folder of the packages."""
    for package in PACKAGES:
        spec = util.find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else None
        if folder is None:
            continue
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(folder)}", path


def unmet(requirements: Iterable[str], extra: str = "") -> Iterator[str]:
    """The requirements, and those of their extras, that no installed version meets."""
    from packaging.requirements import Requirement  # Ray depends on it.

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
