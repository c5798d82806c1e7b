"""Properties of GPUs, which are numbered as in torch. Nothing is asked at import."""

from __future__ import annotations

import functools
from typing import Any

from epjit.arch import arch_name, arch_number
from epjit.runtime import driver

_SHARED_LIMITS = {  # bytes of dynamic shared memory that one block may opt in to
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    110: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
}


def shared_limit(arch: str) -> int:
    """Bytes of dynamic shared memory that one block may have, without asking a GPU.

    Raises:
        ValueError: The architecture is not known.
    """
    number = arch_number(arch)
    if number not in _SHARED_LIMITS:
        known = ", ".join(f"sm_{known}" for known in _SHARED_LIMITS)
        raise ValueError(f"the shared memory of {arch} is not known; known are {known}")
    return _SHARED_LIMITS[number]


def arch_of(device: int) -> str:
    """Architecture to compile for, such as ``"sm_90a"``."""
    return arch_name(
        _attribute(device, "COMPUTE_CAPABILITY_MAJOR"),
        _attribute(device, "COMPUTE_CAPABILITY_MINOR"),
    )


def count() -> int:
    """GPUs that this process can use."""
    return int(driver.call("cuDeviceGetCount"))


@functools.cache
def num_sms(device: int) -> int:
    """Streaming multiprocessors."""
    return _attribute(device, "MULTIPROCESSOR_COUNT")


def shared_bytes_per_block(device: int) -> int:
    """Bytes of dynamic shared memory that one block may opt in to."""
    return _attribute(device, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")


def name(device: int) -> str:
    """Product name, such as ``"NVIDIA H200"``."""
    text: bytes = driver.call("cuDeviceGetName", 256, _handle(device))
    return text.split(b"\0")[0].decode()


def uuid(device: int) -> bytes:
    """16 bytes that name the GPU, the same in every process."""
    return bytes(driver.call("cuDeviceGetUuid", _handle(device)).bytes)


def rdma_ordering(device: int) -> int:
    """Who reads what a NIC has written in order: 0 nobody, 100 this GPU, 200 other GPUs as well."""
    return _attribute(device, "GPU_DIRECT_RDMA_WRITES_ORDERING")


def rdma_flushes(device: int) -> int:
    """Ways to flush what a NIC has written, as bits: 1 by the host, 2 by operations on memory."""
    return _attribute(device, "GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS")


def can_access_peer(device: int, peer_device: int) -> bool:
    """Whether `device` can load from and store to the memory of `peer_device`."""
    if device == peer_device:
        return True
    return bool(driver.call("cuDeviceCanAccessPeer", _handle(device), _handle(peer_device)))


def _handle(device: int) -> Any:
    return driver.call("cuDeviceGet", device)


def _attribute(device: int, attribute: str) -> int:
    key = getattr(driver.load().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
    return int(driver.call("cuDeviceGetAttribute", key, _handle(device)))
