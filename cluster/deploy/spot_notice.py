"""Drain this node when the cloud gives notice that its spot machine will be taken back."""

import subprocess
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

_POLL_SECONDS, _ANSWER_SECONDS = 2.0, 2.0

# A busy head may need more than one call.
_TRIES = 10

_OPENER = build_opener(ProxyHandler({}))


@dataclass(frozen=True)
class Cloud:
    """A cloud's metadata service, and the seconds from its notice to the end, less those for draining."""

    address: str
    seconds: int


CLOUDS = {"aws": Cloud("http://169.254.169.254", 110), "gcp": Cloud("http://metadata.google.internal", 25)}


def main(cloud: str) -> None:
    """Wait for the notice, then drain the node; manifests start this on each spot node."""
    there = CLOUDS[cloud]
    while not noticed(cloud, there.address):
        time.sleep(_POLL_SECONDS)
    print(f"{cloud} takes this machine back in about {there.seconds} seconds", flush=True)
    drain(node_id(Path("/proc")), there.seconds)


def noticed(cloud: str, address: str) -> bool:
    """Whether the metadata service at `address` has given notice; False if it does not answer."""
    if cloud == "gcp":
        place = f"{address}/computeMetadata/v1/instance/preempted"
        return _answer(Request(place, headers={"Metadata-Flavor": "Google"})) == "TRUE"
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    session = _answer(Request(f"{address}/latest/api/token", headers=lifetime, method="PUT"))
    place = f"{address}/latest/meta-data/spot/instance-action"
    return bool(session and _answer(Request(place, headers={"X-aws-ec2-metadata-token": session})))


def node_id(processes: Path) -> str:
    """ID of this machine's Ray node, from its raylet's command line. Raises LookupError without one."""
    for command in processes.glob("[0-9]*/cmdline"):
        try:
            program, *arguments = command.read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):  # It has ended, or is not Ray's.
            continue
        named = [argument for argument in arguments if argument.startswith("--node_id=")]
        if named and Path(program).name == "raylet":
            return named[0].partition("=")[2]
    raise LookupError("no raylet runs on this machine")


def drain(node: str, seconds: int) -> None:
    """Tell Ray that the node will be gone in `seconds`: runs save and continue on the others."""
    command = ["ray", "drain-node", "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "spot machine taken back", "--deadline-remaining-seconds", str(seconds)]
    for _ in range(_TRIES):
        if subprocess.run(command).returncode == 0:
            return
        time.sleep(1.0)


def _answer(request: Request) -> str | None:
    """The metadata service's answer; None if it refuses or does not answer."""
    try:
        with _OPENER.open(request, timeout=_ANSWER_SECONDS) as response:
            return response.read().decode().strip()
    except (OSError, HTTPException):
        return None


if __name__ == "__main__":
    main(sys.argv[1])
