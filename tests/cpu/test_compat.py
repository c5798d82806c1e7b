"""The drop-in's import behaviour: names, cost, and what happens when a package is missing."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deep_ep
import deep_ep.buffer
import deep_ep.utils
import deep_ep_cpp
import epjit
from deep_ep.utils import envs, gate, math, refs, testing
from epjit.reference import elastic
from tests.harness import launch

ROOT = Path(__file__).resolve().parents[2]

UNION = {  # spec-v1.md part C: what the surveyed frameworks import
    "deep_ep": [
        "Buffer",
        "Config",
        "EPBuffer",
        "EPHandle",
        "ElasticBuffer",
        "EventHandle",
        "EventOverlap",
        "__version__",
        "get_logical_domain_size",
        "get_physical_domain_size",
        "topk_idx_t",
    ],
    "deep_ep.buffer": ["Buffer"],
    "deep_ep.buffers.elastic": ["EPHandle", "ElasticBuffer"],
    "deep_ep.buffers.ep": ["EPBuffer", "EPHandle"],
    "deep_ep.buffers.legacy": ["Buffer"],
    "deep_ep.utils": ["EventHandle", "EventOverlap", "check_nvlink_connections"],
    "deep_ep.utils.envs": [
        "dist_print",
        "get_global_seed",
        "get_local_seed",
        "get_nvlink_gbs",
        "get_rdma_gbs",
        "init_dist",
        "init_seed",
    ],
    "deep_ep.utils.event": ["EventHandle", "EventOverlap"],
    "deep_ep.utils.gate": ["get_unbalanced_scores"],
    "deep_ep.utils.math": [
        "align",
        "calc_diff",
        "ceil_div",
        "count_bytes",
        "create_grouped_scores",
        "hash_tensor",
        "hash_tensors",
        "inplace_unique",
        "per_token_cast_back",
        "per_token_cast_to_fp8",
        "safe_div",
    ],
    "deep_ep.utils.refs": [
        "combine",
        "dispatch",
        "generate_pre_combine_data",
        "ordered_accumulate",
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

MODULES = [
    "deep_ep",
    "deep_ep.utils",
    "deep_ep.buffer",
    "deep_ep.buffers.elastic",
    "deep_ep.buffers.legacy",
    "deep_ep_cpp",
]


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


OF_2 = ["ElasticBuffer", "EPBuffer", "EPHandle", "get_logical_domain_size", "__version__"]


def test_names_of_deepep_2_stand_beside_those_of_v1() -> None:
    assert deep_ep.ElasticBuffer is epjit.ElasticBuffer
    assert deep_ep.EPBuffer is epjit.EPBuffer
    assert deep_ep.__version__ == "2.1.0"
    assert set(OF_2) <= set(dir(deep_ep))
    assert not hasattr(deep_ep, "HybridEPBuffer")


def test_names_of_deepep_2_can_be_hidden() -> None:
    run(
        "import deep_ep\n"
        f"assert not [name for name in {OF_2} if hasattr(deep_ep, name) or name in dir(deep_ep)]\n"
        "import deep_ep.buffers.legacy\n"
        "try:\n    import deep_ep.buffers.elastic\n"
        "except ImportError:\n    pass\nelse:\n    raise AssertionError\n"
        "deep_ep.Buffer",
        EPJIT_DEEP_EP_V1="1",
    )


def test_kernels_are_found_by_the_names_of_deepep_2() -> None:
    spans = [(f"epjit::intranode_r2::dispatch({i})", float(i)) for i in (90, 1, 3)]
    spans += [("epjit::elastic_k6::describe", 5.0), ("epjit::intranode_r2::combine(x)", 7.0)]
    assert testing._seconds(spans, "dispatch_impl", 1, 2) == 2  # 90 is the barrier's
    assert testing._seconds(spans, "::dispatch", 3, None) == [90, 1, 3]
    assert testing._seconds(spans, "combine_impl", 1, 2) == 7
    meeting = [(f"epjit::intranode_r2::notify({i})", float(i)) for i in (90, 1, 3)]
    assert testing._seconds(spans + meeting, "barrier", 1, 2) == 2
    for name in ("dispatch_copy_epilogue_impl", "combine_reduce_epilogue_impl"):
        assert isnan(testing._seconds(spans, name, 1, 2))
    with pytest.raises(RuntimeError, match="0 launches of a kernel named"):
        testing._seconds(spans, "notify", 1, None)


@pytest.mark.parametrize(
    ("num_gpus", "gpu", "backend"), [(1, 0, "gloo"), (2, 1, "gloo"), (4, 3, "nccl")]
)
def test_processes_may_share_a_gpu(
    num_gpus: int, gpu: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth of four: DeepEP's tests run with fewer GPUs than processes."""
    said: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda each: said.update(gpu=each))
    for name in ("set_default_dtype", "set_default_device"):
        monkeypatch.setattr(torch, name, lambda _: None)
    monkeypatch.setattr(
        dist, "init_process_group", lambda kind, **options: said.update(options, kind=kind)
    )
    monkeypatch.setattr(envs, "init_seed", lambda _: None)
    monkeypatch.setattr(dist, "new_group", lambda _: dist.ProcessGroup(3, 4))
    rank, num_ranks, _ = envs.init_dist(3, 4)
    assert (rank, num_ranks, said["gpu"], said["kind"]) == (3, 4, gpu, backend)
    assert said["device_id"] == (torch.device("cuda", gpu) if backend == "nccl" else None)


def test_half_of_another_distribution_is_refused(tmp_path: Path) -> None:
    """As when pip has put sgl-deep-ep and epjit-deep-ep into one folder."""
    shutil.copytree(ROOT / "compat/deep_ep", tmp_path / "deep_ep")
    (tmp_path / "deep_ep/_C.cpython-311-x86_64-linux-gnu.so").touch()
    said = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import deep_ep\nexcept ImportError as error:\n    print(error)\n"
    )
    assert "has _C.cpython-311-x86_64-linux-gnu.so, which is not of epjit-deep-ep" in said
    assert "Uninstall both" in said


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


def test_arithmetic_of_deepep_2() -> None:
    assert (math.align(5, 4), math.ceil_div(5, 4)) == (8, 2)
    assert (math.safe_div(0, 0), math.safe_div(3, 2)) == (0, 1.5)
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert math.count_bytes(x, None, (x, [x])) == 72
    t = torch.arange(4.0)
    assert math.hash_tensors(t, (t, None)) == 0


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_the_first_rank_gets_more_tokens(ratio: float, precise: bool) -> None:
    torch.manual_seed(3)
    scores = gate.get_unbalanced_scores(8000, 64, 8, 4, ratio, precise)
    assert (scores.shape, scores.dtype) == ((8000, 64), torch.float32)
    rank = scores.topk(4, dim=1).indices // 8
    tokens = [int((rank == r).any(dim=1).sum()) for r in range(8)]
    others = sum(tokens[1:]) / 7
    assert tokens[0] / others == pytest.approx(min(ratio, 8000 / others), rel=0.05)


def refs_of_rank(group: dist.ProcessGroup) -> None:
    """DeepEP's references against ours: written apart, they say the same."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(5)
    given = []
    for tokens in (7, 4):
        idx = torch.rand(tokens, 8, generator=generator).argsort(dim=1)[:, :3].contiguous()
        idx[torch.rand(idx.shape, generator=generator) < 0.2] = -1
        x = torch.randn(tokens, 16, generator=generator).to(torch.bfloat16)
        w = torch.rand(tokens, 3, generator=generator)
        given.append(elastic.RankInput(x, None, idx, w))
    own = given[rank]
    rows, idx, weights, number, per_rank = refs.dispatch(
        own.x, own.topk_idx, own.topk_weights, 8, 8
    )
    got = [elastic.dispatch(given, r, num_experts=8, max_tokens=8) for r in range(2)]
    want = got[rank]
    assert torch.equal(rows, want.recv_x)
    assert torch.equal(idx, want.recv_topk_idx)
    assert torch.equal(weights.masked_fill(idx < 0, 0), want.recv_topk_weights)
    assert torch.equal(number, want.handle.recv_src_metadata[:, 0])
    ends = want.handle.psum_num_recv_tokens_per_scaleup_rank
    assert torch.equal(per_rank.cumsum(dim=0).to(torch.int32), ends)

    bias = torch.randn(own.x.shape, generator=generator).to(torch.bfloat16)
    y = refs.generate_pre_combine_data(8 * rank + torch.arange(len(own.x)), 8, 3, 16)
    y[own.topk_idx < 0] = 0
    for multiple in (True, False):
        expanded = [
            elastic.dispatch(given, r, num_experts=8, max_tokens=8, do_expand=True)
            for r in range(2)
        ]
        xs = []
        for each in expanded:
            metadata = each.handle.recv_src_metadata
            made = refs.generate_pre_combine_data(metadata[:, 0], 8, 3, 16)
            x = torch.zeros(len(each.recv_x), 16, dtype=torch.bfloat16)
            place, k = torch.nonzero(metadata[:, 2:] >= 0, as_tuple=True)
            x[metadata[place, 2 + k].long()] = made[place, k]
            xs.append(x)
        handles = [each.handle for each in expanded]
        want_x, _ = elastic.combine(xs, handles, rank, None, bias, multiple_reduction=multiple)
        got_x = refs.combine(y, own.topk_idx, 1, 2, 8, bias, multiple, False)
        assert torch.equal(got_x, want_x)


def test_references_of_deepep_2() -> None:
    launch.run(refs_of_rank, 2)
