"""bench/stages.py and phases.py edit the kernels' text: every edit must still apply and compile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from epjit.kernels import intranode, low_latency
from epjit.runtime.kernel import KernelConfig, compile_kernel

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import phases
import stages

ARCH = "sm_90a"


def config_of(op: str) -> KernelConfig:
    """The kernel of two ranks."""
    return next(
        config
        for config in intranode.example_configs(ARCH)
        if config.op == op and getattr(config, "num_ranks", 1) == 2
    )


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, cases in stages.CASES.items() for name in cases]
)
def test_edit_applies_and_compiles(op: str, name: str) -> None:
    whole = compile_kernel(config_of(op), arch=ARCH)
    with stages.edited(stages.CASES[op][name]):
        edited = compile_kernel(config_of(op), arch=ARCH)
    assert (edited.cubin == whole.cubin) == (not stages.CASES[op][name])


@pytest.mark.parametrize("source", phases.MARKS)
def test_stamps_apply_and_compile(source: str) -> None:
    config = next(each for each in low_latency.example_configs(ARCH) if each.source == source)
    whole = compile_kernel(config, arch=ARCH)
    with stages.edited(phases.stamped(source, 1)):
        stamped = compile_kernel(config, arch=ARCH)
    assert phases.CLOCK.encode() in stamped.cubin
    assert phases.CLOCK.encode() not in whole.cubin
    assert len(phases.MARKS[source]) <= phases.PHASES


def test_edit_that_no_longer_applies_says_so() -> None:
    edit = stages.Edit(stages.DISPATCH, "no such text", "")
    with pytest.raises(ValueError, match="no such text"), stages.edited((edit,)):
        pass
