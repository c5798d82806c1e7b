"""The kernel that says what DeepEP 2's handles hold: its config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from epjit.config import MAX_TOPK
from epjit.runtime.kernel import KernelConfig


@dataclass(frozen=True)
class DescribeConfig(KernelConfig, source="elastic/describe.cu", tag="elastic_k{0.num_topk}"):
    """Config of the describe kernel."""

    threads: ClassVar[int] = 256
    shared_bytes: ClassVar[int] = 0

    num_topk: int
    topk_is_int64: bool


def example_configs(arch: str) -> Iterator[KernelConfig]:
    """Kernels over shapes that differ in kind, on any architecture."""
    del arch
    for num_topk, wide in ((1, True), (8, True), (8, False), (MAX_TOPK, True)):
        yield DescribeConfig(num_topk, wide)
