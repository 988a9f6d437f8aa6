"""Which network interface a process group listens on; test_strangers.py looks at a whole run."""

import re
import shutil
import subprocess

import pytest

from training.process_group import interface_of


def test_the_loopback_address_has_an_interface_and_one_of_another_machine_none() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.254") is None
    assert interface_of("2001:db8::1") is None


@pytest.mark.skipif(shutil.which("ip") is None, reason="the command `ip` is the independent source")
def test_each_address_of_the_machine_has_the_interface_that_ip_names() -> None:
    listed = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True, check=True).stdout
    first = [line for line in listed.splitlines() if " secondary " not in line]
    found = re.findall(r"^\d+: (\S+) +inet6? ([^/ ]+)", "\n".join(first), re.MULTILINE)
    assert ("lo", "127.0.0.1") in found
    assert [(interface_of(address), address) for _, address in found] == found
