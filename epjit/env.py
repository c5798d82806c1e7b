"""Every environment variable that epjit reads, in one typed table.

Each variable is a module-level object: ``env.timeout_seconds()`` reads and checks it at the time
of the call, never at import. ``VARIABLES`` lists all of them, for documentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from epjit.arch import arch_name
from epjit.numbers import MOST_SECONDS

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable; calling it returns its checked value.

    Attributes:
        name: Name in the environment.
        kind: Description of valid values, as in the error message ("a number", ...).
        default: Value when the variable is unset or empty.
        description: One line for the documentation.
        parse: Text to value; raises ValueError for text that is not `kind`.
    """

    name: str
    kind: str
    default: T
    description: str
    parse: Callable[[str], T]

    def __call__(self) -> T:
        """Reads the variable now.

        Raises:
            ValueError: The text is malformed; names the variable, its value and what is allowed.
        """
        text = self.text()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise ValueError(f"{self.name}={text!r} is not {self.kind}") from None

    def text(self) -> str:
        """The text in the environment, unchecked; empty when it is unset."""
        return os.environ.get(self.name, "").strip()


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError


def _shared_flag(text: str) -> bool:
    """A flag that NVSHMEM reads, too, by its first letter: without the word that is on for it."""
    if text.lower() == "off":
        raise ValueError
    return _flag(text)


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number <= MOST_SECONDS:
        raise ValueError
    return number


def _positive_int(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise ValueError
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such home folder
        raise ValueError from None


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError
        return text

    return parse


def _index_bits(text: str) -> int:
    if text not in ("32", "64"):
        raise ValueError
    return int(text)


# What TORCH_CUDA_ARCH_LIST may hold besides numbers: torch's names and, of CMake's, those that mean
# the GPU of this machine, for which kernels are compiled anyway. The longer of two comes first.
_NAMED_ARCHS = {
    "native": "",
    "Auto": "",
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Common": "8.0;8.6;8.9;9.0;10.0;12.0",
    "All": "8.0;8.6;8.7;8.9;9.0;10.0;10.3;11.0;12.0;12.1",
}


def _arch_list(text: str) -> tuple[str, ...]:
    archs = []
    for name, numbers in _NAMED_ARCHS.items():
        text = text.replace(name, numbers)
    for item in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(?:\+PTX)?", item)
        if match is None:
            raise ValueError
        arch = (int(match[1]), int(match[2]))
        if arch >= (8, 0):  # lists made for torch may hold older ones, which epjit does not support
            archs.append(arch_name(*arch))
    return tuple(dict.fromkeys(archs))


_FLAG = "a flag: 1, true, yes, on or 0, false, no, off"
_VARIANT = "the name of a variant, such as 'tma' or 'ldst', or 'auto'"

cache_dir: Variable[Path | None] = Variable(
    "EPJIT_CACHE_DIR",
    "a path",
    None,
    "Folder of compiled kernels; by default `epjit` in the user's cache folder.",
    _path,
)
timeout_seconds: Variable[float] = Variable(
    "EPJIT_TIMEOUT_SECONDS",
    "a number greater than 0, at most 1e9",
    100.0,
    "Seconds that a wait for a peer lasts before it raises CommunicationError.",
    _seconds,
)
assert_compile: Variable[bool] = Variable(
    "EPJIT_ASSERT_COMPILE",
    _FLAG,
    False,
    "Compiling a kernel that is not in the cache is an error.",
    _flag,
)
dump: Variable[Path | None] = Variable(
    "EPJIT_DUMP",
    "a path",
    None,
    "Folder that receives the generated unit, the cubin and the compiler's log of every kernel.",
    _path,
)
check_values: Variable[bool] = Variable(
    "EPJIT_CHECK",
    _FLAG,
    False,
    "Looks at the values of each call's arguments before anything is launched (experts in range, a "
    "layout that fits the choices, finite rows and weights, handles as they were returned); the "
    "host waits for the stream, so for debugging. Read when a Buffer is made.",
    _flag,
)
backend: Variable[str] = Variable(
    "EPJIT_BACKEND",
    "'auto', 'cuda' or 'cpu'",
    "auto",
    "What runs the operations; auto takes the GPU where there is one.",
    _choice("auto", "cuda", "cpu"),
)
dispatch_variant: Variable[str] = Variable(
    "EPJIT_DISPATCH_VARIANT",
    _VARIANT,
    "auto",
    "Implementation of dispatch: auto, push, tma, ldst or direct.",
    str,
)
direct_bytes: Variable[int] = Variable(
    "EPJIT_DIRECT_BYTES",
    "a whole number, 0 or more",
    1 << 30,
    "Bytes for outputs that peers write, of a Buffer made with EPJIT_DISPATCH_VARIANT=direct; the "
    "same on all ranks.",
    _natural,
)
combine_variant: Variable[str] = Variable(
    "EPJIT_COMBINE_VARIANT", _VARIANT, "auto", "Implementation of combine: auto, tma or ldst.", str
)
permute_variant: Variable[str] = Variable(
    "EPJIT_PERMUTE_VARIANT", _VARIANT, "auto", "Implementation of permute: auto, tma or ldst.", str
)
low_latency_dispatch_variant: Variable[str] = Variable(
    "EPJIT_LOW_LATENCY_DISPATCH_VARIANT",
    _VARIANT,
    "auto",
    "Implementation of the low-latency dispatch: auto, words or lines.",
    str,
)
low_latency_combine_variant: Variable[str] = Variable(
    "EPJIT_LOW_LATENCY_COMBINE_VARIANT",
    _VARIANT,
    "auto",
    "Implementation of the low-latency combine: auto, ldst, tma, reduced or lines.",
    str,
)
low_latency_num_sms: Variable[int] = Variable(
    "EPJIT_LOW_LATENCY_NUM_SMS",
    "a whole number, 0 or more",
    0,
    "Most SMs (blocks) of a low-latency kernel; 0 means all that the GPU has. While a peer is late "
    "most of them are free for other kernels.",
    _natural,
)
disable_sm90_features: Variable[bool] = Variable(
    "DISABLE_SM90_FEATURES",
    _FLAG,
    False,
    "Leaves out every variant that needs Hopper (bulk copies), as in DeepEP, and the early start.",
    _flag,
)
disable_aggressive_ptx_instrs: Variable[bool] = Variable(
    "DISABLE_AGGRESSIVE_PTX_INSTRS",
    _FLAG,
    False,
    "Accepted for DeepEP's sake; epjit uses no load that is undefined on data of peers.",
    _flag,
)
topk_idx_bits: Variable[int] = Variable(
    "TOPK_IDX_BITS",
    "'64' or '32'",
    64,
    "Width of an expert index; decides what `epjit.topk_idx_t` is.",
    _index_bits,
)
deep_ep_v1: Variable[bool] = Variable(
    "EPJIT_DEEP_EP_V1",
    _FLAG,
    False,
    "Hides the names of DeepEP 2 in the drop-in package `deep_ep`, so that frameworks which look "
    "for them take V1's.",
    _flag,
)
transport: Variable[str] = Variable(
    "EPJIT_TRANSPORT",
    "'auto', 'nvshmem' or 'loopback'",
    "auto",
    "What carries bytes between NVLink domains; auto takes loopback (loads and stores, for tests) "
    "when all ranks are threads of one process, else NVSHMEM.",
    _choice("auto", "nvshmem", "loopback"),
)
nvlink_domain: Variable[int] = Variable(
    "EPJIT_NVLINK_DOMAIN",
    "a whole number, 0 or more",
    0,
    "Cuts each NVLink domain that is found into pieces of so many ranks; 0 means no cut.",
    _natural,
)
loopback_seed: Variable[int] = Variable(
    "EPJIT_LOOPBACK_SEED",
    "a whole number, 0 or more",
    0,
    "Draws the delays and the order of the loopback transport; 0 means no delays.",
    _natural,
)
nvshmem_dir: Variable[Path | None] = Variable(
    "NVSHMEM_DIR",
    "a path",
    None,
    "Root of an NVSHMEM installation; by default that of the installed package.",
    _path,
)
nvshmem_ib_enable_ibgda: Variable[bool] = Variable(
    "NVSHMEM_IB_ENABLE_IBGDA",
    "a flag: 1, true, yes, on or 0, false, no (NVSHMEM takes 'off' for on)",
    False,
    "NVSHMEM's own: the GPU drives the NIC itself; kernels are then linked with NVSHMEM's device "
    "library. Without it, the first Buffer between hosts sets 1 where every rank can.",
    _shared_flag,
)
nvshmem_qp_depth: Variable[int] = Variable(
    "NVSHMEM_QP_DEPTH",
    "a whole number greater than 0",
    1024,
    "NVSHMEM's own: entries that a queue pair of IBGDA holds; a put with its signal takes 4, and "
    "waits for room where there is none.",
    _positive_int,
)
nvshmem_num_qps: Variable[int] = Variable(
    "NVSHMEM_IBGDA_NUM_RC_PER_PE",
    "a whole number greater than 0",
    2,
    "NVSHMEM's own: queue pairs of IBGDA to each rank; without it, the first Buffer sets its "
    "num_qps_per_rank.",
    _positive_int,
)
torch_cuda_arch_list: Variable[tuple[str, ...]] = Variable(
    "TORCH_CUDA_ARCH_LIST",
    "a list such as '9.0;8.0+PTX' or 'Hopper;Ampere', separated by ';' or spaces",
    (),
    "Architectures to compile for ahead of time; those before 8.0 are left out.",
    _arch_list,
)

VARIABLES: tuple[Variable[object], ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Variable)
)


def set_default(name: str, value: str) -> None:
    """Sets a variable of another library for this process, unless the user has set it.

    An empty one is unset, as for `Variable`.
    """
    if not foreign(name):
        set_variable(name, value)


def set_variable(name: str, value: str) -> None:
    """Sets a variable of another library for this process."""
    os.environ[name] = value


def foreign(name: str) -> str | None:
    """Text of a variable of another library; None when it is unset."""
    return os.environ.get(name)


def nvshmem_flag(name: str, default: bool) -> bool:
    """A flag of NVSHMEM's, as NVSHMEM reads it: by its first letter, so that `off` is on."""
    text = foreign(name)
    return default if text is None else text[:1] not in tuple("0nNfF")
