"""What a machine has of diptych and of what diptych needs; a cluster without diptych runs this file alone."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata, util
from pathlib import Path

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
