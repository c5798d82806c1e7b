"""Every kernel of every variant, for every architecture, with the NVRTC of CUDA 13 and of CUDA 12.

CUDA 13 compiles all shapes for sm_90a, and for sm_80 and sm_120a those of the modes that have ever
spilled (low latency, between domains). Of all else so many that any two parts of a kernel meet in
one, and by CUDA 12 for these three alone: all of it took a third of the time of `tests/cpu`.
What ptxas reports is held against the launch's budget: no spills, the block's registers and its
shared memory fit the machine. The sources' own `static_assert`s hold the Python side's sizes
against the C++ ones.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from epjit.bench import ceiling, peers
from epjit.kernels import elastic, expert_major, internode, intranode, low_latency
from epjit.runtime import device, nvrtc, nvshmem_device
from epjit.runtime.kernel import KernelConfig, render, unit_sources

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"]
ARCHS_OF_SPILLS = ["sm_80", "sm_90a", "sm_120a"]  # what spills elsewhere does so for one of these
MODES_OF_SPILLS = ("low_latency/", "internode/")
REGISTERS_OF_AN_SM = 65536
INTERPRETERS = {
    "cuda13": Path(sys.executable),
    "cuda12": Path(
        os.environ.get("EPJIT_TEST_CU12_PYTHON", ROOT / ".venv-cu12" / "bin" / "python")
    ),
}


def configs(arch: str) -> list[KernelConfig]:
    """One config of each kernel, variant and shape class that this architecture can run."""
    modes = (intranode, internode, low_latency, expert_major, elastic, ceiling)
    configs = [config for mode in modes for config in mode.example_configs(arch)]
    return [*configs, peers.ChaseConfig()]


def in_pairs(kernels: Sequence[KernelConfig]) -> list[KernelConfig]:
    """Few of them, those for the most ranks first, in which any two parts that meet in one meet.

    What is false or 0 (scales, weights) leaves out a part of the kernel; other numbers are sizes.
    Each row format is a part.
    """
    left = []
    for kernel in sorted(kernels, key=lambda kernel: -getattr(kernel, "num_ranks", 0)):
        parts = [
            (name, value if name == "format" else bool(value))
            for name, value in vars(kernel).items()
            if name not in ("topk_is_int64", "is_f16")
        ]
        kind = type(kernel), kernel.source
        left.append((kernel, {(kind, *pair) for pair in itertools.combinations(parts, 2)} | {kind}))
    found: list[KernelConfig] = []
    seen: set[object] = set()
    while True:
        kernel, pairs = max(left, key=lambda each: len(each[1] - seen))
        if pairs <= seen:
            return found
        found.append(kernel)
        seen |= pairs


def compile_all(
    interpreter: Path, arch: str, kernels: Sequence[KernelConfig]
) -> list[dict[str, str]]:
    """Compiles in as many processes as there are cores; results in the order of the kernels."""
    units = [
        {
            # The other body needs NVSHMEM, and a linker: runtime/test_nvshmem.py.
            "text": render(kernel, "loopback"),
            "sources": unit_sources(kernel, "loopback"),
            "arch": arch,
            "name_expression": kernel.kernel_name,
        }
        for kernel in kernels
    ]
    num_workers = min(len(units), os.cpu_count() or 1)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [interpreter, ROOT / "tests" / "cpu" / "compile_units.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
        )
        for _ in range(num_workers)
    ]
    for index, worker in enumerate(workers):
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(units[index::num_workers]))
        worker.stdin.close()
        worker.stdin = None  # communicate() must not flush it again
    results: list[dict[str, str]] = [{} for _ in units]
    for index, worker in enumerate(workers):
        out, err = worker.communicate(timeout=250)
        assert worker.returncode == 0, err
        results[index::num_workers] = json.loads(out)
    return results


def over_budget(kernel: KernelConfig, arch: str, result: dict[str, str]) -> str:
    """The fault of one compiled kernel, or an empty string."""
    if result["error"]:
        return result["error"]
    registers, spill_bytes = nvrtc.usage(result["log"])
    if registers == 0:
        return f"ptxas reported no registers: {result['log']!r}"
    # The loopback body is for tests; what is linked with NVSHMEM: runtime/test_nvshmem.py.
    if spill_bytes and not kernel.needs_transport:
        return f"{spill_bytes} bytes spilled"
    allocated = -(-registers // 8) * 8 * kernel.threads  # given to a thread in eights
    if allocated > REGISTERS_OF_AN_SM:
        return f"{registers} registers x {kernel.threads} threads = {allocated}"
    if kernel.shared_bytes > device.shared_limit(arch):
        return f"{kernel.shared_bytes} bytes shared, {arch} has {device.shared_limit(arch)}"
    return ""


def test_profiles_find_the_kernels() -> None:
    """DeepEP's `bench_kineto` looks for ``::dispatch`` and ``::combine``, in both modes."""
    exchanges = [each for each in configs("sm_90a") if re.search("dispatch|combine", each.source)]
    names = {"::" + each.kernel_name.rpartition("::")[2] for each in exchanges}
    assert names == {"::dispatch", "::combine"}


@pytest.mark.parametrize(
    ("cuda", "arch"),
    [*(("cuda12", arch) for arch in ARCHS_OF_SPILLS), *(("cuda13", arch) for arch in ARCHS)],
)
def test_every_kernel_compiles_within_budget(cuda: str, arch: str) -> None:
    interpreter = INTERPRETERS[cuda]
    if not interpreter.exists():
        reason = f"no CUDA 12 environment at {interpreter}: make .venv-cu12/.ready"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    kernels = all_of_them = configs(arch)
    if (cuda, arch) != ("cuda13", "sm_90a"):
        kernels = in_pairs(all_of_them)
    if cuda == "cuda13" and arch in ARCHS_OF_SPILLS:
        more = [each for each in all_of_them if each.source.startswith(MODES_OF_SPILLS)]
        kernels = list(dict.fromkeys([*kernels, *more]))
    results = compile_all(interpreter, arch, kernels)
    assert {result["nvrtc"].partition(".")[0] for result in results} == {cuda[-2:]}
    wrong = {
        f"{kernel!r}": problem
        for kernel, result in zip(kernels, results, strict=True)
        if (problem := over_budget(kernel, arch, result))
    }
    assert not wrong, json.dumps(wrong, indent=2)


def test_kernels_that_start_early_wait_before_they_begin() -> None:
    """Before the wait they have but the shared memory of the block."""
    for kernel in configs("sm_90a"):
        text = (ROOT / "epjit" / "cuda_src" / kernel.source).read_text()
        waits = re.search(
            rf"__device__ void {kernel.op}\(const \w+& p\) {{\n"
            r"(  \w+<kCfg>::prepare\(\);\n)?  ptx::griddepcontrol_wait\(\);\n",
            text,
        )
        assert bool(waits) == kernel.starts_early, kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_the_kernels_are_all_there(arch: str) -> None:
    kernels = configs(arch)
    assert len(set(kernels)) == len(kernels)
    assert {"layout", "dispatch", "combine"} <= {kernel.op for kernel in kernels}


def test_exchanges_start_early() -> None:
    """All kernels that meet peers, and layout."""
    early = [each for each in configs("sm_90a") if each.starts_early]
    ops = {each.op for each in early}
    assert {"layout", "notify", "dispatch", "combine", "low_latency_dispatch"} <= ops
    assert all(each.starts_early or each.op not in ops for each in configs("sm_90a"))


@pytest.mark.parametrize("arch", ARCHS)
def test_pairs_leave_out_no_kernel(arch: str) -> None:
    fewer = in_pairs(configs(arch))
    assert {kernel.source for kernel in fewer} == {kernel.source for kernel in configs(arch)}
    assert {type(kernel) for kernel in fewer} == {type(kernel) for kernel in configs(arch)}
    formats = {getattr(kernel, "format", 0) for kernel in configs(arch)}
    assert {getattr(kernel, "format", 0) for kernel in fewer} == formats


@pytest.mark.parametrize("arch", ARCHS)
def test_every_block_of_dispatch_has_warps_that_stage_and_warps_that_pull(arch: str) -> None:
    """Whatever the number of SMs: a block that only stages at first could get stuck."""
    for config in configs(arch):
        if isinstance(config, intranode.DispatchConfig):
            most = config.num_warps - (config.num_ranks > 1)
            assert all(1 <= config.stage_warps(sms) <= most for sms in (1, 2, 12, 24, 132)), config


def test_kernels_with_slots_say_how_large_they_are() -> None:
    """Sizes of slots stand in Python and C++; the units hold the two together."""
    for kernel in configs("sm_90a"):
        text = (ROOT / "epjit" / "cuda_src" / kernel.source).read_text()
        has_slots = f"constexpr int {kernel.op}_slot_bytes(" in text
        assert (kernel.slot_bytes is not None) == has_slots, kernel
        assert ("_slot_bytes(kConfig) == " in render(kernel, "loopback")) == has_slots


def test_example_configs_name_every_source() -> None:
    folder = ROOT / "epjit" / "cuda_src"
    sources = {path.relative_to(folder).as_posix() for path in folder.rglob("*.cu")}
    sources.remove(nvshmem_device.SOURCE)
    assert sources == {kernel.source for arch in ARCHS for kernel in configs(arch)}
