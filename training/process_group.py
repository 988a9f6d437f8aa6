"""Ray Train backend: torch's process group, whose sockets listen on the nodes' own addresses alone."""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

# Linux's request for the IPv4 address of a network interface, and where in its answer that is.
_SIOCGIFADDR, _ADDRESS = 0x8915, slice(20, 24)

_SHUTDOWN_SECONDS = 30.0


@dataclass
class GroupConfig(TorchConfig):
    """As TorchConfig, whose store listens on all addresses of rank 0's machine; one worker has no group."""

    @property
    def backend_cls(self) -> Any:
        return _Group


class _Group(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        ranks = range(len(worker_group))
        if len(ranks) == 1:
            return
        store = worker_group.execute_single(0, _listen)
        settings = (len(ranks), backend_config.backend, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(rank, _join, store, rank, *settings) for rank in ranks])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        with suppress(GetTimeoutError):  # A worker that waits for a lost one; its process ends next.
            ray.get(worker_group.execute_async(_leave), timeout=_SHUTDOWN_SECONDS)


@dataclass(frozen=True)
class _Store:
    """Where rank 0's store will be: address, port, and the descriptor that listens in rank 0's process."""

    address: str
    port: int
    descriptor: int


def _listen() -> _Store:
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family)
    return _Store(address, listening.getsockname()[1], listening.detach())


def _join(at: _Store, rank: int, world_size: int, backend: str, timeout_s: int) -> None:
    _keep_to(ray.util.get_node_ip_address())
    # A collective of NCCL's that times out ends its process.
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
    """Have gloo listen on the network interface of this address, and NCCL where that is the loopback one.

    gloo would take the address that the machine's name stands for; NCCL takes the fast networks by itself.
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
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # It has no address.
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if answer[_ADDRESS] == wanted.packed:
                    return name
    return None


def _interface_of_v6(wanted: str) -> str | None:
    with suppress(FileNotFoundError), open("/proc/net/if_inet6") as table:
        for line in table:
            address, *_, name = line.split()
            if address == wanted:
                return name
    return None
