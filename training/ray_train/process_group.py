"""Ray Train backend for torch's process group that listens only on the nodes' own addresses."""

import errno
import fcntl
import os
import socket
import struct
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

# Linux's request for the IPv4 addresses of all network interfaces, and the layout of an entry in its answer:
# a name of 16 bytes, then a socket address.
_SIOCGIFCONF, _ENTRY, _MOST = 0x8912, struct.Struct("16s4x4s16x"), 1024

_SHUTDOWN_SECONDS = 30.0


@dataclass
class GroupConfig(TorchConfig):
    """TorchConfig, but its store listens on one address alone, and a single worker has no process group."""

    @property
    def backend_cls(self) -> Any:
        return _Group


class _Group(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        ranks = range(len(worker_group))
        worker_group.execute(_set_environment)
        if len(ranks) == 1:
            return
        store = worker_group.execute_single(0, _listen)
        settings = (len(ranks), backend_config.backend, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, _join, store, rank, *settings) for rank in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        with suppress(GetTimeoutError):  # A worker that waits for a lost one; Ray ends its process.
            ray.get(worker_group.execute_async(_leave), timeout=_SHUTDOWN_SECONDS)


def _set_environment() -> None:
    """Set the environment variables of ranks that torchrun and Ray's TorchConfig set."""
    context = ray.train.get_context()
    os.environ |= {
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }


@dataclass(frozen=True)
class _Store:
    """Location of rank 0's store: address, port, and the listening file descriptor in its process."""

    address: str
    port: int
    descriptor: int


def _listen() -> _Store:
    address = ray.util.get_node_ip_address()
    listening = listening_at(address)
    return _Store(address, listening.getsockname()[1], listening.detach())


def listening_at(address: str) -> socket.socket:
    """A socket listening on the address; ValueError if no network interface of this machine has it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        known = ", ".join(sorted({socket.inet_ntoa(has) for _, has in _v4_addresses()}))
        raise ValueError(
            f"no network interface of {socket.gethostname()} has the address {address} of its Ray node; "
            f"start Ray there with --node-ip-address set to one of: {known}"
        ) from error


def _join(at: _Store, rank: int, world_size: int, backend: str, timeout_s: int) -> None:
    _keep_to(ray.util.get_node_ip_address())
    # End the process if an NCCL collective times out.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    timeout, leads = timedelta(seconds=timeout_s), rank == 0
    store = dist.TCPStore(
        at.address, at.port, world_size, leads, timeout, master_listen_fd=at.descriptor if leads else None
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _keep_to(address: str) -> None:
    """Make gloo use the network interface of this address, and NCCL if that is the loopback interface.

    By default gloo uses the address of the host name. NCCL finds fast networks itself.
    """
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if ip_address(address).is_loopback:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IPv4 or IPv6 address, such as eth0."""
    wanted = ip_address(address)
    if wanted.version == 6:
        return _interface_of_v6(wanted.packed.hex())
    return next((name for name, has in _v4_addresses() if has == wanted.packed), None)


def _v4_addresses() -> Iterator[tuple[str, bytes]]:
    """The name and address of each network interface, once per address."""
    answer = array("B", bytes(_MOST * _ENTRY.size))
    request = struct.pack("iP", len(answer), answer.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        length, _ = struct.unpack("iP", fcntl.ioctl(asking, _SIOCGIFCONF, request))
    for name, address in _ENTRY.iter_unpack(answer[:length]):
        yield name.partition(b"\0")[0].decode(), address


def _interface_of_v6(wanted: str) -> str | None:
    with suppress(FileNotFoundError), open("/proc/net/if_inet6") as table:
        for line in table:
            address, *_, name = line.split()
            if address == wanted:
                return name
    return None
