"""GPUs of this machine: driver, links between them, fabric handles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from epjit.cli.doctor import probe
from epjit.cli.doctor.check import Check, Section, Status
from epjit.remedy import cuda_major, install_command
from epjit.runtime import machine

_GPUS, _PEERS = Section("GPUs"), Section("peers")
_FABRIC = Section("fabric (only for use_fabric=True)")
_NO_DRIVER = (
    "none, so everything runs on the CPU backend; should there be a GPU, install NVIDIA's driver "
    "(in a container: docker run --gpus all)"
)
_SLOW_LINK = 20.0  # GB/s: less than any NVLink
_SLOW = "slower than NVLink; see `nvidia-smi topo -m`"
_NO_ACCESS = (
    "a Buffer needs it between all its GPUs: leave one out with CUDA_VISIBLE_DEVICES, or enable it "
    "(PCIe: ACS off, one root complex)"
)


def check_gpus() -> Iterator[Check]:
    """Driver and GPUs."""
    from epjit.arch import arch_number
    from epjit.runtime import device

    try:
        count = device.count()
    except ImportError as error:
        unknown = _GPUS.wrong("driver", "cannot be asked", str(error))
        yield unknown if probe.has_gpu() else _GPUS.info("driver", _NO_DRIVER)
        return
    except RuntimeError as error:
        if Path("/dev/nvidiactl").exists():
            remedy = (
                "unset CUDA_VISIBLE_DEVICES if it hides the GPU, else install the libraries of "
                "NVIDIA's driver, in the version that is loaded"
            )
            yield _GPUS.warning("driver", f"there is a GPU, but {error}", remedy)
        else:
            yield _GPUS.info("driver", _NO_DRIVER)
        return
    cuda = ".".join(map(str, probe.driver_cuda() or ("not known",)))
    yield _GPUS.ok("driver", f"{_driver_version()}, CUDA {cuda}")
    for index in range(count):
        arch = device.arch_of(index)
        text = f"{device.name(index)}, {arch}, {device.num_sms(index)} SMs"
        if arch_number(arch) >= 80:
            yield _GPUS.ok(f"GPU {index}", text)
        else:
            yield _GPUS.wrong(f"GPU {index}", text, "epjit needs sm_80 (Ampere) or newer")
    yield _torch_sees(count)


def check_peers() -> Iterator[Check]:
    """Every pair of GPUs: access, GB/s of a copy, latency of a load."""
    if probe.num_gpus() < 2:
        return
    try:
        from epjit.bench import peers

        for link in peers.measure():
            name = f"GPU {link.reader} reads GPU {link.owner}"
            if link.accessible:
                speed = link.gigabytes_per_second
                value = f"{speed} GB/s, {link.latency_us} us a load"
                yield _PEERS.expect(name, speed >= _SLOW_LINK, value, remedy=_SLOW)
            else:
                yield _PEERS.wrong(name, "no peer access", _NO_ACCESS)
    except (ImportError, RuntimeError) as error:
        yield _PEERS.wrong("measurement", str(error), "see the lines above")


def check_fabric() -> Iterator[Check]:
    """Needs of `use_fabric=True`."""
    if not probe.num_gpus():
        return
    channels = sorted(Path("/dev/nvidia-caps-imex-channels").glob("channel*"))
    error = _fabric_error()
    none = f"{error}; without use_fabric CUDA IPC is used, within one host"
    name = "allocation with a fabric handle"
    yield _FABRIC.info(name, none) if error else _FABRIC.ok(name, "works")
    found = ", ".join(channel.name for channel in channels)
    none = (
        "none; between hosts of one NVLink domain: start nvidia-imex, then nvidia-modprobe -c 0 -i"
    )
    yield _FABRIC.expect("IMEX channels", channels, found, none, severity=Status.info)


def _torch_sees(count: int) -> Check:
    torch = probe.torch()
    if torch is None:
        return _GPUS.wrong("torch", "not there", install_command("torch"))
    seen = torch.cuda.device_count()
    if seen == count:
        return _GPUS.ok("torch", f"sees {count}")
    remedy = (
        f"it was built for CUDA {torch.version.cuda}: update the driver, or take an older one"
        if torch.version.cuda
        else f"it was built for the CPU: take the one for CUDA {cuda_major()} "
        "(https://pytorch.org/get-started/locally)"
    )
    return _GPUS.wrong("torch", f"{torch.__version__} sees {seen} of {count}", remedy)


def _driver_version() -> str:
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", machine.read("/proc/driver/nvidia/version"))
    return found[1] if found else "version not known"


def _fabric_error() -> str:
    """Tries an allocation (the attribute that says so is not to be trusted); empty: it works."""
    from epjit.runtime.group import Group, ThreadGroup
    from epjit.runtime.symmetric import SymmetricMemory

    try:
        group = Group.from_comm(ThreadGroup.create(1)[0])
        SymmetricMemory(1 << 20, group=group, device=0, fabric=True).close()
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[-1].strip()
    return ""
