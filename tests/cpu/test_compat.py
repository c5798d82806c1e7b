"""The drop-in's import behaviour: names, cost, and what happens when a package is missing."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deep_ep
import deep_ep.buffer
import deep_ep.utils
import deep_ep_cpp
import epjit
from deep_ep.utils import math

ROOT = Path(__file__).resolve().parents[2]

UNION = {  # spec-v1.md part C: what the surveyed frameworks import
    "deep_ep": ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"],
    "deep_ep.buffer": ["Buffer"],
    "deep_ep.utils": ["EventHandle", "EventOverlap", "check_nvlink_connections"],
    "deep_ep.utils.envs": ["init_dist"],
    "deep_ep.utils.math": [
        "calc_diff",
        "create_grouped_scores",
        "hash_tensor",
        "inplace_unique",
        "per_token_cast_back",
        "per_token_cast_to_fp8",
    ],
    "deep_ep.utils.testing": ["bench", "bench_kineto"],
    "deep_ep_cpp": [
        "Buffer",
        "Config",
        "EventHandle",
        "get_low_latency_rdma_size_hint",
        "is_sm90_compiled",
        "topk_idx_t",
    ],
}

MODULES = ["deep_ep", "deep_ep.utils", "deep_ep.buffer", "deep_ep_cpp"]


def run(code: str, **environment: str) -> str:
    """Runs code in a fresh interpreter that sees the working tree and compat/."""
    env = {**os.environ, **environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'compat'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocked(*packages: str) -> str:
    """Code that makes packages look as if they were not installed."""
    return f"""
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def test_modules_export_what_frameworks_import() -> None:
    for module, names in UNION.items():
        found = importlib.import_module(module)
        assert not [name for name in names if not hasattr(found, name)], module


def test_names_are_those_of_epjit() -> None:
    assert deep_ep.Buffer is epjit.Buffer is deep_ep.buffer.Buffer
    assert deep_ep.Config is epjit.Config is deep_ep_cpp.Config
    assert deep_ep.EventHandle is deep_ep_cpp.EventHandle is deep_ep.utils.EventHandle
    assert deep_ep.EventOverlap is deep_ep.utils.EventOverlap
    hint = deep_ep_cpp.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=256
    )
    assert hint == epjit.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)


def test_names_of_deepep_2_are_absent() -> None:
    for name in ("ElasticBuffer", "EPBuffer", "HybridEPBuffer", "EPHandle"):
        assert not hasattr(deep_ep, name), name


def test_find_spec_sees_real_modules() -> None:
    run(
        "import importlib, importlib.util\n"
        f"for name in {MODULES}:\n"
        "    assert importlib.util.find_spec(name).origin.endswith('.py')\n"
        "    importlib.import_module(name)\n"
        "    assert importlib.util.find_spec(name).origin.endswith('.py')\n"
    )


@pytest.mark.parametrize("package", ["torch", "numpy", "cupy", "cuda"])
def test_missing_package_is_an_import_error_or_no_matter(package: str) -> None:
    code = blocked(package) + (
        "import importlib\n"
        f"for name in {MODULES}:\n"
        "    try:\n        importlib.import_module(name)\n        print('imported')\n"
        "    except ImportError as error:\n        print(error)\n"
    )
    said = run(code).splitlines()
    assert len(said) == len(MODULES)
    if package == "torch":
        assert all("is not installed: pip install -e " in line for line in said)
    elif package in ("cupy", "cuda"):
        assert set(said) == {"imported"}  # the CPU backend needs neither


def test_import_touches_neither_cupy_nor_cuda() -> None:
    run(
        "import sys, torch\n"
        "before = set(sys.modules)  # torch looks at cuda.bindings itself\n"
        "import deep_ep, deep_ep.utils, deep_ep.buffer, deep_ep_cpp\n"
        "assert not torch.cuda.is_initialized()\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not loaded & {'cupy', 'cuda', 'triton'}, loaded\n"
    )


@pytest.mark.parametrize(("bits", "dtype"), [("32", "torch.int32"), ("64", "torch.int64")])
def test_topk_idx_t_follows_the_build_switch(bits: str, dtype: str) -> None:
    assert run("import deep_ep; print(deep_ep.topk_idx_t)", TOPK_IDX_BITS=bits).strip() == dtype


@pytest.mark.parametrize(("tokens", "hidden"), [(0, 256), (0, 100), (5, 100), (5, 300), (5, 0)])
def test_cast_of_any_number_of_rows_and_columns(tokens: int, hidden: int) -> None:
    """As if the rows were filled up with zeros, which are left out again."""
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    num_scales = -(-hidden // 128)
    padded = torch.zeros(tokens, 128 * num_scales, dtype=torch.bfloat16)
    padded[:, :hidden] = x
    values, scales = math.per_token_cast_to_fp8(x)
    assert (values.shape, scales.shape) == ((tokens, hidden), (tokens, num_scales))
    assert (values.is_contiguous(), values.dtype) == (True, torch.float8_e4m3fn)
    want, want_scales = math.per_token_cast_to_fp8(padded)
    assert torch.equal(values.view(torch.uint8), want[:, :hidden].contiguous().view(torch.uint8))
    assert torch.equal(scales, want_scales)
    back = math.per_token_cast_back(values, scales)
    assert (back.shape, back.dtype) == ((tokens, hidden), torch.bfloat16)
    assert torch.equal(back, math.per_token_cast_back(want, want_scales)[:, :hidden])


def test_helpers_of_the_test_scripts() -> None:
    x = torch.randn(7, 256, dtype=torch.bfloat16)
    values, scales = math.per_token_cast_to_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scales.shape == (7, 2)
    assert math.calc_diff(math.per_token_cast_back(values, scales), x) < 1e-3
    assert math.calc_diff(x, x) == 0
    ids = torch.tensor([[3, 3, -1, 0], [-1, -1, -1, -1], [1, 2, 3, 3]])
    math.inplace_unique(ids, 4)
    assert ids.tolist() == [[3, 0, -1, -1], [-1] * 4, [3, 2, 1, -1]]
    scores = math.create_grouped_scores(torch.ones(1, 4), torch.tensor([[1]]), 2)
    assert scores.tolist() == [[0, 0, 1, 1]]
    t = torch.arange(12.0)
    assert math.hash_tensor(t) == math.hash_tensor(t.view(6, 2).flip(0))
