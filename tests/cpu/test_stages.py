"""bench/stages.py edits the kernels' text: every edit must still apply and compile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from epjit.kernels import intranode
from epjit.runtime.kernel import KernelConfig, compile_kernel

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

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


def test_edit_that_no_longer_applies_says_so() -> None:
    edit = stages.Edit(stages.DISPATCH, "no such text", "")
    with pytest.raises(ValueError, match="no such text"), stages.edited((edit,)):
        pass
