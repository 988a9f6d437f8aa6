"""Which network interface a process group listens on; test_strangers.py looks at a whole run."""

import re
import shutil
import socket
import subprocess
import sys

import pytest

from training.ray_train.process_group import interface_of, listening_at


def test_the_loopback_address_has_an_interface_and_one_of_another_machine_none() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.254") is None
    assert interface_of("2001:db8::1") is None


@pytest.mark.skipif(shutil.which("ip") is None, reason="the command `ip` is the independent source")
def test_each_address_of_the_machine_has_the_interface_that_ip_names() -> None:
    listed = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\d+: (\S+) +inet6? ([^/ ]+)", listed, re.MULTILINE)
    assert ("lo", "127.0.0.1") in found
    assert [(interface_of(address), address) for _, address in found] == found


_SECOND = """
ip link set lo up
ip addr add 127.0.0.2/8 dev lo
ip addr add 192.0.2.7/24 dev lo label lo:1
exec "$0" -c "from training.ray_train.process_group import interface_of, listening_at
print(*map(interface_of, ('127.0.0.1', '127.0.0.2', '192.0.2.7')))"
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare command")
def test_an_interface_s_second_address_has_its_name_or_the_address_s_own() -> None:
    namespace = ["unshare", "--net", "sh", "-ec"]
    if (tried := subprocess.run([*namespace, "ip link"], capture_output=True, check=False)).returncode:
        pytest.skip(f"a network of one's own needs root: {tried.stderr}")
    done = subprocess.run([*namespace, _SECOND, sys.executable], capture_output=True, text=True, check=False)
    assert done.stdout == "lo lo lo:1\n", done.stderr


def test_an_address_that_no_interface_has_is_one_line_with_those_that_do() -> None:
    here = re.escape(socket.gethostname())
    with pytest.raises(
        ValueError,
        match=rf"^no network interface of {here} has the address 198\.51\.100\.1 of its Ray node; start Ray "
        r"there with --node-ip-address set to one of: .*127\.0\.0\.1",
    ):
        listening_at("198.51.100.1")
    with listening_at("127.0.0.1") as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
