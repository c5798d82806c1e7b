"""Scenarios of a rank with a framework's own files, which import DeepEP's names from compat/.

Each takes tokens through the framework's dispatch and combine with experts that multiply by
`1 + expert`, and compares with the sum over the choices. Sums of small integers are exact.
"""

from __future__ import annotations

import enum
import importlib
import itertools
import logging
import runpy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tests.frameworks.fetch import FOLDER
from tests.frameworks.island import Island
from tests.scenarios.moe import device_of

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, EXPERTS_A_RANK, TOPK, TOKENS = 256, 2, 2, 12


class ToCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), options: Any = None
    ) -> Any:
        options = dict(options or {})
        if str(options.get("device")).startswith("cuda"):
            options["device"] = "cpu"
        return function(*args, **options)


def deepep_2(group: Any, test: str, options: list[str]) -> None:
    """DeepEP 2: its own test_ep.py, unmodified, in the place of one of its processes."""
    sys.path.insert(0, str(ROOT / "compat"))
    device = device_of(group)
    from deep_ep.utils import envs

    def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> Any:
        assert (local_rank, num_local_ranks) == (group.rank(), group.size())
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device(device)
        envs.init_seed(seed)
        return group.rank(), group.size(), group

    def spawn(body: Callable[..., None], args: tuple[Any, ...], nprocs: int) -> None:
        assert nprocs == group.size()
        body(group.rank(), *args)

    sizes = "--num-tokens 24 --hidden 512 --num-experts 16 --num-topk 4 --num-sms 12".split()
    ranks = ["--num-processes", str(group.size())]
    argv = ["test_ep.py", *ranks, *sizes, *options]
    with ExitStack() as patched:
        for target, name, value in (
            (envs, "init_dist", init_dist),
            (torch.multiprocessing, "spawn", spawn),
            (torch.distributed, "destroy_process_group", lambda: None),
            (sys, "argv", argv),
        ):
            patched.enter_context(mock.patch.object(target, name, value))
        if device.type == "cpu":
            patched.enter_context(mock.patch.object(torch.cuda, "synchronize"))
            patched.enter_context(ToCpu())
        runpy.run_path(str(FOLDER / test), run_name="__main__")


class Case:
    """Tokens of one rank with integer values and weights that are powers of two."""

    def __init__(self, group: Any) -> None:
        sys.path.insert(0, str(ROOT / "compat"))
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.num_experts = EXPERTS_A_RANK * self.size
        device = device_of(group)
        torch.set_default_device(device)  # also for what the frameworks make
        cpu = {"generator": torch.Generator("cpu").manual_seed(self.rank), "device": "cpu"}
        self.x = torch.randint(-4, 5, (TOKENS, HIDDEN), **cpu).bfloat16().to(device)
        scores = torch.rand(TOKENS, self.num_experts, **cpu)
        self.topk_idx = scores.topk(TOPK, dim=1).indices.to(device)
        self.weights = (0.5 ** torch.randint(0, 3, (TOKENS, TOPK), **cpu).float()).to(device)

    @property
    def wanted(self) -> Tensor:
        """The weighted sum over the choices."""
        factor = (self.weights * (1 + self.topk_idx)).sum(1, keepdim=True)
        return (self.x.float() * factor).bfloat16()

    def experts(self, rows: Tensor, local_idx: Tensor, weights: Tensor) -> Tensor:
        """This rank's experts on received rows; an index of -1 is not mine."""
        factor = torch.where(local_idx >= 0, 1 + local_idx + self.rank * EXPERTS_A_RANK, 0)
        return (rows.float() * (factor * weights).sum(1, keepdim=True)).bfloat16()

    def slab_experts(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """This rank's experts on the slabs of a low-latency dispatch."""
        values = rows.float()
        if scales is not None:
            blocks = values.view(*values.shape[:2], -1, 128) * scales[..., None]
            values = blocks.view(values.shape)
        factor = 1 + self.rank * EXPERTS_A_RANK + torch.arange(EXPERTS_A_RANK)
        return (values * factor[:, None, None]).bfloat16()

    def only_powers_of_two(self, hidden: int) -> None:
        """Tokens that FP8 with a scale of amax / 448 holds exactly, with `hidden` columns."""
        self.x = (self.x.sign() * 2 ** (self.x.abs() // 2)).repeat(1, hidden // HIDDEN)

    def check(self, out: Tensor) -> None:
        """Compares a result, all of it."""
        assert torch.equal(out, self.wanted)

    def check_gradients(self, out: Tensor, x: Tensor, weights: Tensor) -> None:
        """Compares those of the sum of a result."""
        out.float().sum().backward()
        factor = (self.weights * (1 + self.topk_idx)).sum(1, keepdim=True)
        assert x.grad is not None
        assert torch.equal(x.grad, factor.expand_as(self.x).bfloat16())
        assert weights.grad is not None
        wanted = (1 + self.topk_idx) * self.x.float().sum(1, keepdim=True)
        assert torch.allclose(weights.grad, wanted, rtol=2**-7, atol=1.0)


def quantised(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Rows as the frameworks' own kernels give them: FP8, a scale a 128 columns, exact here."""
    blocks = x.float().view(x.shape[0], -1, 128)
    scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(2).clamp(1.0) / 448)))
    values = (blocks / scales[:, :, None]).to(torch.float8_e4m3fn)
    return values.view(x.shape), scales


def dequantised(values: Tensor, scales: Tensor) -> Tensor:
    """The rows again."""
    blocks = values.float().view(values.shape[0], -1, 128) * scales[:, :, None]
    return blocks.view(values.shape).bfloat16()


def megatron(folder: str, name: str) -> Any:
    """A module of Megatron-LM's experts, with those that move tokens."""
    core, moe = "megatron.core", "megatron.core.transformer.moe"
    real = tuple(f"{moe}.{each}" for each in ("token_dispatcher", "fused_a2a", "moe_utils"))
    real += (f"{core}.fusions.fused_indices_converter",)
    sizes = {"get_pg_size": lambda group: group.size(), "get_pg_rank": lambda group: group.rank()}
    given = {f"{core}.utils": sizes}
    with Island(FOLDER / folder, "megatron", real=real, given=given):
        return importlib.import_module(f"{moe}.{name}")


def megatron_fused_a2a(group: Any) -> None:
    """Megatron-LM: fused_dispatch and fused_combine, forward and backward."""
    case = Case(group)
    fused = megatron("megatron-core", "fused_a2a")
    assert fused.HAVE_DEEP_EP
    fused.set_deepep_num_sms(20)
    for async_finish in (False, True):
        x = case.x.clone().requires_grad_()
        weights = case.weights.clone().requires_grad_()
        rows, idx, probs, counts, handle = fused.fused_dispatch(
            x, case.topk_idx, weights, case.num_experts, group, async_finish, async_finish
        )
        assert counts.tolist() == [int((idx == e).sum()) for e in range(EXPERTS_A_RANK)]
        y = case.experts(rows, idx, probs)
        out, _ = fused.fused_combine(y, group, handle, async_finish, async_finish)
        case.check(out)
        case.check_gradients(out, x, weights)


def megatron_flex_dispatcher(group: Any) -> None:
    """Megatron-LM: the flex token dispatcher with its DeepEP manager, all six steps."""
    _megatron_flex_dispatcher(Case(group), "megatron-core", "deepep", async_finish=True)


def megatron_elastic(group: Any) -> None:
    """Megatron-LM, branch dev: the same with its manager of DeepEP 2, and with that of V1."""
    case = Case(group)
    for backend in ("deepepv2", "deepep"):
        for async_finish in (False, True):
            _megatron_flex_dispatcher(case, "megatron-dev", backend, async_finish=async_finish)


def _megatron_flex_dispatcher(case: Case, folder: str, backend: str, *, async_finish: bool) -> None:
    """A layer of experts on the dispatcher, forward and backward."""
    module = megatron(folder, "token_dispatcher")
    config = SimpleNamespace(
        moe_flex_dispatcher_backend=backend,
        moe_router_topk=TOPK,
        num_moe_experts=case.num_experts,
        moe_router_dtype="fp32",
        moe_expert_capacity_factor=None,
        moe_permute_fusion=False,
        moe_router_padding_for_quantization=False,
        use_transformer_engine_op_fuser=False,
        fp8=None,
        fp4=None,
        moe_flex_dispatcher_num_sms=20,
        moe_shared_expert_overlap=False,
    )
    alone = [torch.distributed.new_group([rank]) for rank in range(case.size)][case.rank]
    groups = SimpleNamespace(ep=case.group, expt_tp=alone, tp_ep=case.group)
    first = case.rank * EXPERTS_A_RANK
    dispatcher = module.MoEFlexTokenDispatcher(
        EXPERTS_A_RANK,
        list(range(first, first + EXPERTS_A_RANK)),
        config,
        groups,
    )
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    probs = torch.zeros(TOKENS, case.num_experts).scatter(1, case.topk_idx, weights)
    hidden, token_probs = dispatcher.dispatch_preprocess(x, probs > 0, probs)
    flags = (async_finish, async_finish)
    rows, dispatched_probs = dispatcher.token_dispatch(hidden, token_probs, *flags)
    rows, counts, row_probs = dispatcher.dispatch_postprocess(rows, dispatched_probs)
    expert = torch.repeat_interleave(torch.arange(EXPERTS_A_RANK) + first, counts)
    y = (rows.float() * (row_probs * (1 + expert))[:, None]).bfloat16()
    y = dispatcher.combine_preprocess(y)
    out = dispatcher.combine_postprocess(dispatcher.token_combine(y, *flags))
    case.check(out)
    case.check_gradients(out, x, weights)


def automodel_flex_dispatcher(group: Any) -> None:
    """NeMo Automodel: its flex token dispatcher on V1, twice along one routing (a recompute)."""
    case = Case(group)
    megatron = "nemo_automodel.components.moe.megatron"
    names = ("token_dispatcher", "fused_a2a", "fused_indices_converter", "moe_utils")
    real = tuple(f"{megatron}.{name}" for name in names)
    given = {"nemo_automodel.shared.import_utils": {"safe_import_te": lambda: (False, None)}}
    with Island(FOLDER / "nemo-automodel", "nemo_automodel", real=real, given=given):
        module = importlib.import_module(real[0])
        fused = importlib.import_module(real[1])
    assert fused.HAVE_DEEP_EP
    config = module.TokenDispatcherConfig(
        moe_flex_dispatcher_backend="deepep",
        moe_router_topk=TOPK,
        num_moe_experts=case.num_experts,
        moe_router_dtype="fp32",
        moe_permute_fusion=False,
    )
    first = case.rank * EXPERTS_A_RANK
    local = list(range(first, first + EXPERTS_A_RANK))
    dispatcher = module.MoEFlexTokenDispatcher(EXPERTS_A_RANK, local, config, group)
    recorder = fused.DispatchReplayRecorder()
    for mode in ("record", "replay"):
        x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
        with fused.dispatch_replay_scope(recorder, mode):
            rows, counts, row_probs = dispatcher.token_permutation2(
                x, TOKENS, weights, case.topk_idx
            )
        expert = torch.repeat_interleave(torch.arange(EXPERTS_A_RANK) + first, counts)
        y = (rows.float() * (row_probs * (1 + expert))[:, None]).bfloat16()
        out = dispatcher.token_unpermutation(y)
        case.check(out)
        if mode == "record":  # weights of a replay are the recorded ones
            case.check_gradients(out, x, weights)
    assert not recorder.replay_misses
    fused.free_buffer()


def deepspeed_elastic(group: Any) -> None:
    """DeepSpeed: its exchange on DeepEP 2, by expert, with gradients and a recompute."""
    case = Case(group)
    target = "deepspeed.module_inject.auto_ep_comm"
    given = {"deepspeed.utils": {"logger": logging.getLogger("deepspeed")}}
    with Island(FOLDER / "deepspeed", "deepspeed", real=(target,), given=given):
        module = importlib.import_module(target)
    scope, sizes = module.new_exchange_scope(), (case.num_experts, TOPK, HIDDEN, TOKENS)
    exchange = module.shared_exchange(scope, group, *sizes)
    assert module.shared_exchange(scope, group, *sizes) is exchange
    replay = module.DeepEPCheckpointReplay()
    first = case.rank * EXPERTS_A_RANK

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        rows, row_weights, _ = module.deepep_dispatch(exchange, x, case.topk_idx, weights, replay)
        handle = exchange.last_handle
        counts = torch.tensor(handle.num_recv_tokens_per_expert_list)
        expert = torch.repeat_interleave(torch.arange(EXPERTS_A_RANK) + first, counts)
        y = (rows.float() * (row_weights * (1 + expert))[:, None]).bfloat16()
        out: Tensor = module.deepep_combine(exchange, y, handle)
        return out

    for reentrant in (None, True, False):
        x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
        if reentrant is None:
            out = layer(x, weights)
        else:
            out = checkpoint(layer, x, weights, use_reentrant=reentrant)
        assert out is not None
        case.check(out)
        case.check_gradients(out, x, weights)
    exchange.release()
    exchange.release()
    assert exchange.destroyed


def vllm_high_throughput(group: Any) -> None:
    """vLLM: DeepEPHTPrepareAndFinalize, plain and in two phases, bfloat16 and block FP8."""
    case = Case(group)
    layers = "vllm.model_executor.layers.fused_moe"
    target = f"{layers}.prepare_finalize.deepep_ht"
    real = (target, f"{layers}.modular_kernel", f"{layers}.topk_weight_and_reduce")
    real += ("vllm.v1.worker.ubatching", "vllm.utils.math_utils")
    given = {
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
        f"{layers}.utils": {"moe_kernel_quantize_input": quantised},
    }
    with Island(FOLDER / "vllm", "vllm", real=real, given=given):
        module = importlib.import_module(target)
        reduce = importlib.import_module(f"{layers}.topk_weight_and_reduce")
    import deep_ep

    buffer = deep_ep.Buffer(
        group, 1 << 20, 0, low_latency_mode=False, num_qps_per_rank=1, explicitly_destroy=True
    )
    deep_ep.Buffer.set_num_sms(20)
    offset = case.rank * EXPERTS_A_RANK
    both = module.DeepEPHTPrepareAndFinalize(
        buffer, num_dispatchers=case.size, dp_size=case.size, rank_expert_offset=offset
    )
    quant = SimpleNamespace(
        is_block_quantized=False,
        quant_dtype=None,
        a1_scale=None,
        a1_gscale=None,
        per_act_token_quant=False,
        block_shape=None,
        is_scale_swizzled=False,
    )
    start = (case.x, case.weights, case.topk_idx, case.num_experts, None, False, quant)
    for is_async, is_fp8 in ((False, False), (True, False), (False, True), (True, True)):
        quant.is_block_quantized = is_fp8
        defer = not is_fp8
        received = both.prepare_async(*start, defer)() if is_async else both.prepare(*start, defer)
        rows, scales, meta, ids, weights = received
        assert rows.dtype == (torch.float8_e4m3fn if is_fp8 else torch.bfloat16)
        if is_fp8:
            rows = dequantised(rows, scales)
        local = torch.where((weights > 0), ids - offset, -1)
        assert int(meta.expert_num_tokens.sum()) == int((local >= 0).sum())
        y = case.experts(rows, local, weights)
        out = torch.empty_like(case.x)
        end = (out, y, weights, ids, False, reduce.TopKWeightAndReduceNoOP())
        if is_async:
            both.finalize_async(*end)()
        else:
            both.finalize(*end)
        case.check(out)
    assert both.topk_indices_dtype() == torch.int64
    buffer.destroy()


def vllm_elastic(group: Any) -> None:
    """vLLM: DeepEPV2PrepareAndFinalize, prefill by expert and decoding, bfloat16 and block FP8."""
    case = Case(group)
    layers = "vllm.model_executor.layers.fused_moe"
    target = f"{layers}.prepare_finalize.deepep_v2"
    real = (target, f"{layers}.modular_kernel", f"{layers}.topk_weight_and_reduce")
    real += ("vllm.v1.worker.ubatching", "vllm.utils.math_utils")
    given = {
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
        "vllm.forward_context": {"get_forward_context": lambda: SimpleNamespace(dp_metadata=None)},
        f"{layers}.utils": {"moe_kernel_quantize_input": quantised},
    }
    with Island(FOLDER / "vllm", "vllm", real=real, given=given):
        module = importlib.import_module(target)
        reduce = importlib.import_module(f"{layers}.topk_weight_and_reduce")
    import deep_ep

    def global_ids(idx: Tensor, ends: Tensor, offset: int, num_experts: int) -> Tensor:
        """As vLLM's Triton kernel, in place as well."""
        arrived = torch.arange(len(idx))[:, None] < ends[-1]
        valid = (idx >= 0) & (idx + offset < num_experts) & arrived
        return idx.copy_(torch.where(valid, idx + offset, -1))

    module._globalize_recv_topk_idx = global_ids
    buffer = deep_ep.ElasticBuffer(
        group,
        num_max_tokens_per_rank=64,
        hidden=HIDDEN,
        num_topk=TOPK,
        num_gpu_timeout_secs=1800,
        num_cpu_timeout_secs=1800,
        explicitly_destroy=True,
    )
    offset = case.rank * EXPERTS_A_RANK
    quant = SimpleNamespace(
        is_block_quantized=False,
        quant_dtype=None,
        a1_scale=None,
        a1_gscale=None,
        per_act_token_quant=False,
        block_shape=None,
        is_scale_swizzled=False,
        mx_alignment=0,
    )
    start = (case.x, case.weights, case.topk_idx, case.num_experts, None, False, quant)
    for is_decode, is_async, is_fp8 in itertools.product((False, True), repeat=3):
        both = module.DeepEPV2PrepareAndFinalize(
            buffer,
            num_dispatchers=case.size,
            dp_size=case.size,
            rank_expert_offset=offset,
            num_experts=case.num_experts,
            num_topk=TOPK,
            use_cudagraph=is_decode,
        )
        quant.is_block_quantized = is_fp8
        received = both.prepare_async(*start, not is_fp8)()
        rows, scales, _, ids, weights = received
        if is_fp8:
            rows = dequantised(rows, scales)
        local = torch.where(ids >= 0, ids - offset, -1)
        y = case.experts(rows, local, weights.masked_fill(local < 0, 0))
        out = torch.empty_like(case.x)
        end = (out, y, weights, ids, False, reduce.TopKWeightAndReduceNoOP())
        if is_async:
            both.finalize_async(*end)()
        else:
            both.finalize(*end)
        case.check(out)
    buffer.destroy()


class SGLang:
    """SGLang's deepep.py, and what it asks the rest of SGLang for.

    Attributes:
        module: The file.
        dtype: Of rows that arrive: "bf16" or "fp8".
        is_extend: Whether the batch is one of prefill.
    """

    class Mode(enum.Enum):
        """As SGLang has it."""

        NORMAL = "normal"
        LOW_LATENCY = "low_latency"
        AUTO = "auto"

        def enable_normal(self) -> bool:
            return self is not SGLang.Mode.LOW_LATENCY

        def enable_low_latency(self) -> bool:
            return self is not SGLang.Mode.NORMAL

        def resolve(self, is_extend: bool) -> SGLang.Mode:
            if self is not SGLang.Mode.AUTO:
                return self
            return SGLang.Mode.NORMAL if is_extend else SGLang.Mode.LOW_LATENCY

    def __init__(self, case: Case) -> None:
        self.case, self.dtype, self.is_extend = case, "bf16", True
        base = "sglang.srt.layers.moe.token_dispatcher"
        kinds = {name: name.lower() for name in ("BF16", "FP8", "INT8", "NVFP4", "MXFP4", "MXFP8")}
        resources = SimpleNamespace(buffers={})
        given = {
            "sglang.kernels.ops.quantization.fp8_kernel": {
                "sglang_per_token_group_quant_fp8": quantised
            },
            "sglang.srt.layers.dp_attention": {"get_is_extend_in_batch": lambda: self.is_extend},
            "sglang.srt.layers.moe.utils": {
                "DeepEPMode": SGLang.Mode,
                "DispatcherOutputDtype": SimpleNamespace(**kinds),
                "get_deepep_output_dtype": lambda _: self.dtype,
                "get_deepep_config": lambda: "",
            },
            "sglang.srt.layers.deep_gemm_wrapper": {
                "ENABLE_JIT_DEEPGEMM": True,
                "DEEPGEMM_BLACKWELL": False,
            },
            "sglang.srt.runtime_context": {"get_resources": lambda: resources},
            "sglang.srt.utils": {"get_cuda_version": lambda: (13, 0)},
        }
        if case.x.device.type == "cpu":
            properties = SimpleNamespace(multi_processor_count=132)
            torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore
        real = (f"{base}.deepep", f"{base}.base", "sglang.srt.environ")
        with Island(FOLDER / "sglang", "sglang", real=real, given=given):
            self.module = importlib.import_module(f"{base}.deepep")
            assert self.module.use_deepep, self.module._deepep_import_error

    def dispatcher(self, kind: str, *, mode: SGLang.Mode, **options: Any) -> Any:
        """One of the file's classes, for rows of `dtype`."""
        return getattr(self.module, kind)(
            group=self.case.group,
            router_topk=TOPK,
            permute_fusion=True,
            num_experts=self.case.num_experts,
            num_local_experts=EXPERTS_A_RANK,
            hidden_size=self.case.x.shape[1],
            params_dtype=torch.bfloat16,
            deepep_mode=mode,
            **options,
        )

    @property
    def topk(self) -> Any:
        """The choices of the router."""
        return SimpleNamespace(topk_weights=self.case.weights, topk_ids=self.case.topk_idx.int())


def sglang_normal(group: Any) -> None:
    """SGLang: the normal-mode dispatcher, dispatch_a/b and combine_a/b, bfloat16 and FP8."""
    case = Case(group)
    sglang = SGLang(case)
    for async_finish, sglang.dtype in itertools.product((False, True), ("bf16", "fp8")):
        dispatcher = sglang.dispatcher(
            "_DeepEPDispatcherImplNormal", mode=SGLang.Mode.NORMAL, async_finish=async_finish
        )
        got = dispatcher.dispatch_b(*dispatcher.dispatch_a(case.x, sglang.topk))
        aligned = [-(-int((got.topk_ids == e).sum()) // 128) * 128 for e in range(2)]
        assert got.num_recv_tokens_per_expert == aligned
        rows, scales = got.hidden_states, got.hidden_states_scale
        assert (scales is not None) == (sglang.dtype == "fp8")
        rows = rows if scales is None else dequantised(rows, scales)
        y = case.experts(rows, got.topk_ids, got.topk_weights)
        out = dispatcher.combine_b(*dispatcher.combine_a(y, got.topk_ids, got.topk_weights))
        case.check(out)


def sglang_auto(group: Any) -> None:
    """SGLang: DeepEPDispatcher that takes turns of prefill and decoding on one buffer."""
    case = Case(group)
    case.only_powers_of_two(2048)
    sglang = SGLang(case)
    for with_hook, sglang.dtype in itertools.product((False, True), ("bf16", "fp8")):
        dispatcher = sglang.dispatcher(
            "DeepEPDispatcher", mode=SGLang.Mode.AUTO, return_recv_hook=with_hook
        )
        for sglang.is_extend in (False, True, False, False):
            got = dispatcher.dispatch(case.x, sglang.topk)
            rows, scales = got.hidden_states, got.hidden_states_scale
            assert (scales is not None) == (sglang.dtype == "fp8")
            if sglang.is_extend:
                rows = rows if scales is None else dequantised(rows, scales)
                y = case.experts(rows, got.topk_ids, got.topk_weights)
            else:
                assert got.masked_m.shape == (EXPERTS_A_RANK,)
                y = case.slab_experts(rows, scales)
            case.check(dispatcher.combine((y, got.topk_ids, got.topk_weights)))


def sglang_elastic(group: Any) -> None:
    """SGLang: DeepEPv2Dispatcher, prefill in both orders of rows and decoding, an idle rank."""
    case = Case(group)
    case.only_powers_of_two(HIDDEN)
    is_extend, expands_prefill = True, False

    def setting(value: Callable[[], Any]) -> Any:
        return SimpleNamespace(get=value)

    def cast(x: Tensor, _: int, *, column_major_scales: bool, **__: Any) -> tuple[Tensor, Tensor]:
        values, scales = quantised(x)
        return values, scales.t().contiguous().t() if column_major_scales else scales

    buffers: dict[str, Any] = {}
    moe = "sglang.srt.layers.moe"
    target, formats = f"{moe}.token_dispatcher.deepep_v2", SimpleNamespace(DEEPEP_V2="deepep_v2")
    given: dict[str, dict[str, Any]] = {
        "sglang.srt.environ": {
            "envs": SimpleNamespace(
                SGLANG_DEEPEP_V2_NUM_SMS=setting(lambda: 4),
                SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK=setting(lambda: 16),
                SGLANG_DEEPEP_V2_ENABLE_PREFILL_EXPAND=setting(lambda: expands_prefill),
            )
        },
        "sglang.srt.layers.dp_attention": {"get_is_extend_in_batch": lambda: is_extend},
        f"{moe}.token_dispatcher.base": {
            "BaseDispatcher": object,
            "CombineInput": type,
            "CombineInputFormat": formats,
            "DispatchOutput": type,
            "DispatchOutputFormat": formats,
            "RoutewiseLayout": object,
        },
        f"{moe}.utils": {
            "get_deepep_v2_fp8_scale_format": lambda: SimpleNamespace(ue8m0=False, tma_aligned=True)
        },
        "sglang.srt.runtime_context": {
            "get_exec": lambda: SimpleNamespace(moe=SimpleNamespace(deepep_v2_mode="direct")),
            "get_parallel": lambda: SimpleNamespace(attn_dp_size=2),
            "get_resources": lambda: SimpleNamespace(buffers=buffers),
        },
        "sglang.kernels.ops.quantization.fp8_kernel": {"sglang_per_token_group_quant_fp8": cast},
    }
    with Island(FOLDER / "sglang", "sglang", real=(target,), given=given):
        module = importlib.import_module(target)
    assert module.use_deepep_v2
    sizes = (group, TOPK, case.num_experts, EXPERTS_A_RANK, HIDDEN, torch.bfloat16)
    for use_fp8, mode in itertools.product(
        (False, True), ("compact", "expanded", "decode", "idle")
    ):
        is_extend, expands_prefill = mode != "decode", mode == "expanded"
        dispatcher = module.DeepEPv2Dispatcher(*sizes, use_fp8)
        num_tokens = 0 if mode == "idle" and case.rank else TOKENS
        topk = SimpleNamespace(
            topk_ids=case.topk_idx[:num_tokens], topk_weights=case.weights[:num_tokens]
        )
        got = dispatcher.dispatch(case.x[:num_tokens], topk)
        rows = got.hidden_states
        if use_fp8:
            rows = dequantised(rows, got.hidden_states_scale)
        if got.is_expanded:
            expert, end = torch.zeros(len(rows), dtype=torch.int64), 0
            for each, last in enumerate(got.psum_num_recv_tokens_per_expert.tolist()):
                expert[end:last] = each
                end = -(-last // 128) * 128
            factor = (1 + expert + case.rank * EXPERTS_A_RANK) * got.topk_weights
            y = (rows.float() * factor[:, None]).bfloat16()
        else:
            y = case.experts(rows, got.topk_ids, got.topk_weights)
        out = dispatcher.combine(module.DeepEPv2CombineInput(y, None))
        assert torch.equal(out, case.wanted[:num_tokens])


def lmdeploy() -> Any:
    """LMDeploy's token_dispatcher.py."""
    target = "lmdeploy.pytorch.backends.cuda.token_dispatcher"
    backends = "lmdeploy.pytorch.backends"
    real = (target, f"{backends}.default.token_dispatcher", f"{backends}.token_dispatcher")
    real += ("lmdeploy.pytorch.envs",)
    with Island(FOLDER / "lmdeploy", "lmdeploy", real=real):
        module = importlib.import_module(target)
    assert module.use_deepep
    return module


def lmdeploy_normal(group: Any) -> None:
    """LMDeploy: DeepEPTokenDispatcher, to expert-major rows and back, and its async calls."""
    case = Case(group)
    module = lmdeploy()
    dispatcher = module.DeepEPTokenDispatcher(
        group, case.num_experts, EXPERTS_A_RANK, HIDDEN, torch.bfloat16
    )
    rows, _, _, counts = dispatcher.dispatch(case.x, case.topk_idx, case.weights)
    expert = torch.repeat_interleave(
        torch.arange(EXPERTS_A_RANK) + case.rank * EXPERTS_A_RANK, counts
    )
    assert rows.shape[0] == int(counts.sum())
    out = dispatcher.combine((rows.float() * (1 + expert)[:, None]).bfloat16())
    case.check(out)
    # Captured before each call: an event of before is no promise about what was queued since.
    for capture in (lambda: None, module.Buffer.capture):
        rows, idx, weights, _, handle, done = dispatcher.dispatch_normal_async(
            case.x, case.topk_idx, case.weights, previous_event=capture()
        )
        done.current_stream_wait()
        y = case.experts(rows, idx, weights)
        out, done = dispatcher.combine_normal_async(y, handle, previous_event=capture())
        done.current_stream_wait()
        case.check(out)


def lmdeploy_low_latency(group: Any) -> None:
    """LMDeploy: DeepEPTokenDispatcherLowLatency, with and without hooks, and its async calls."""
    case = Case(group)
    case.only_powers_of_two(2048)
    module = lmdeploy()
    for with_hook in (False, True):
        dispatcher = module.DeepEPTokenDispatcherLowLatency(
            group,
            case.num_experts,
            EXPERTS_A_RANK,
            case.x.shape[1],
            torch.bfloat16,
            return_recv_hook=with_hook,
        )
        (rows, scales), idx, weights, counts, _ = dispatcher.dispatch(
            case.x, case.topk_idx, case.weights, case.num_experts
        )
        assert counts.shape == (EXPERTS_A_RANK,)
        y = case.slab_experts(rows.value, scales.value)
        case.check(dispatcher.combine(y, idx, weights))
        (rows, scales), _, handle, event, hook = dispatcher.dispatch_async(
            case.x, case.topk_idx, async_finish=not with_hook
        )
        hook() if with_hook else event.current_stream_wait()
        y = case.slab_experts(rows.value, scales.value)
        out, event, hook = dispatcher.combine_async(
            y, case.topk_idx, case.weights, handle, async_finish=not with_hook
        )
        hook() if with_hook else event.current_stream_wait()
        case.check(out)


def xtuner_op(group: Any) -> None:
    """xtuner: its autograd op over DeepEP, forward and backward."""
    case = Case(group)
    target = "xtuner.v1.ops.comm.deepep_op"
    with Island(FOLDER / "xtuner", "xtuner", real=(target,)):
        module = importlib.import_module(target)
    x = case.x.clone().requires_grad_()
    rows, idx, weights, counts, handle, event = module.DeepEPDispatch.apply(
        x, case.topk_idx, case.weights, case.num_experts, group, module.buffer_capture()
    )
    event.current_stream_wait()
    assert counts == [int((idx == e).sum()) for e in range(EXPERTS_A_RANK)]
    y = case.experts(rows, idx, weights)
    out, event = module.DeepEPCombine.apply(
        y, case.num_experts, handle, group, module.buffer_capture()
    )
    event.current_stream_wait()
    case.check(out)
    out.float().sum().backward()
    factor = (case.weights * (1 + case.topk_idx)).sum(1, keepdim=True)
    assert x.grad is not None
    assert torch.equal(x.grad, factor.expand_as(case.x).bfloat16())


def torchtitan_elastic(group: Any) -> None:
    """torchtitan: its custom ops over DeepEP 2, training with gradients and inference."""
    case = Case(group)
    target = "torchtitan.distributed.deepep.deepep"
    with Island(FOLDER / "torchtitan", "torchtitan", real=(target,)):
        module = importlib.import_module(target)
    if case.x.device.type == "cpu":
        for op in ("dispatch", "combine"):
            torch.library.impl(module._lib, op, "CPU")(getattr(module, f"_{op}_op_impl"))
    module.get_buffer(group, hidden=HIDDEN, num_max_tokens_per_rank=TOKENS, num_topk=TOPK)
    first = case.rank * EXPERTS_A_RANK

    def layer(x: Tensor, weights: Tensor, *, cudagraphable: bool) -> Tensor:
        rows, counts, state = module.dispatch_tokens(
            x,
            case.topk_idx,
            weights,
            EXPERTS_A_RANK,
            case.num_experts,
            num_tokens_per_rank=TOKENS,
            cudagraphable=cudagraphable,
        )
        factor = (1 + first + torch.arange(EXPERTS_A_RANK)).repeat_interleave(counts)
        y = rows[: len(factor)] * factor[:, None].bfloat16()
        if len(y) < len(rows):  # by expert, with room for more rows
            y = torch.cat([y, torch.full_like(rows[len(y) :], float("nan"))])
        out = module.combine_tokens(y, state)
        module.sync_combine()
        return out

    with torch.no_grad():
        case.check(layer(case.x, case.weights, cudagraphable=True))
    x, weights = case.x.clone().requires_grad_(), case.weights.clone().requires_grad_()
    out = layer(x, weights, cudagraphable=True)  # compact where gradients are recorded
    case.check(out)
    case.check_gradients(out, x, weights)


def lightllm_elastic(group: Any) -> None:
    """LightLLM: prefill on DeepEP 2, whose metadata it rewrites, beside V1's low-latency buffer."""
    case = Case(group)
    import deep_ep

    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(16, HIDDEN, case.size, case.num_experts)
    low_latency = deep_ep.Buffer(group, 0, size, low_latency_mode=True)
    buffer = deep_ep.ElasticBuffer(
        group, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK, use_fp8_dispatch=True
    )
    case.only_powers_of_two(HIDDEN)

    def forward(
        *,
        num_unaligned_recv_tokens_per_expert: Tensor,
        recv_x: Any,
        recv_topk_weights: Tensor,
        recv_src_metadata: Tensor,
        **_: Any,
    ) -> Tensor:
        """The products of LightLLM: by expert, then summed a token, whose row they leave first."""
        values, scales = recv_x
        assert scales.stride() == (1, -(-len(scales) // 4) * 4)
        rows = dequantised(values, scales)
        local = torch.zeros(len(rows), dtype=torch.int64)
        ends = 0
        for expert, count in enumerate(num_unaligned_recv_tokens_per_expert.tolist()):
            local[ends : ends + count] = expert
            ends = -(-(ends + count) // 128) * 128
        factor = (1 + local + case.rank * EXPERTS_A_RANK) * recv_topk_weights
        made = rows.float() * factor[:, None]
        columns = recv_src_metadata[:, 2:]
        taken = made[columns.clamp(min=0).long()] * (columns >= 0)[:, :, None]
        columns.fill_(-1)
        columns[:, 0] = torch.arange(len(columns), dtype=torch.int32)
        return taken.sum(dim=1).bfloat16()

    moe = "lightllm.common.basemodel"
    target = f"{moe}.layer_weights.meta_weights.fused_moe.impl.deepgemm_impl"
    given = {
        "lightllm.distributed": {
            "dist_group_manager": SimpleNamespace(
                ep_buffer=buffer,
                ep_low_latency_buffer=low_latency,
                get_deep_ep_prefill_moe_workspace=lambda _: None,
            )
        },
        "lightllm.utils.envs_utils": {
            "get_deepep_num_max_dispatch_tokens_per_rank_prefill": lambda: TOKENS,
            "get_deepep_num_max_dispatch_tokens_per_rank_decode": lambda: TOKENS,
        },
        f"{moe}.triton_kernel.fused_moe.grouped_fused_moe_ep": {
            "get_ep_num_sms": lambda: 4,
            "chunked_expanded_moe_forward": forward,
        },
    }
    with Island(FOLDER / "lightllm", "lightllm", real=(target,), given=given):
        module = importlib.import_module(target)
    layer = module.FuseMoeDeepGEMM
    own = SimpleNamespace(
        total_expert_num_contain_redundancy=case.num_experts,
        quant_method=SimpleNamespace(block_size=128),
    )
    weight = SimpleNamespace(weight=torch.empty(1, HIDDEN), weight_scale=None)
    for _ in range(2):
        rows, idx, weights, counts, handle, hook = layer.dispatch(
            own, quantised(case.x), case.topk_idx, case.weights, deep_ep.ElasticBuffer.capture()
        )
        hook()
        gathered = layer.prefilled_group_gemm(
            own,
            counts,
            handle.num_unaligned_recv_tokens_per_expert,
            handle.recv_src_metadata,
            rows,
            idx,
            weights,
            weight,
            weight,
        )
        out, hook = layer.combine(own, gathered, handle, deep_ep.ElasticBuffer.capture())
        hook()
        case.check(out)
        # Decoding stays on V1's mode, in the same process.
        packed, _, low, _, _ = low_latency.low_latency_dispatch(
            case.x, case.topk_idx, 16, case.num_experts, use_fp8=False
        )
        y = case.slab_experts(packed, None)
        out, hook = layer.low_latency_combine(own, y, case.topk_idx, case.weights, low)
        hook()
        case.check(out)


def vllm_low_latency(group: Any) -> None:
    """vLLM: DeepEPLLPrepareAndFinalize with hooks, bfloat16 and FP8 of the dispatch kernel."""
    case = Case(group)
    layers = "vllm.model_executor.layers.fused_moe"
    target = f"{layers}.prepare_finalize.deepep_ll"
    real = (target, f"{layers}.modular_kernel", f"{layers}.topk_weight_and_reduce")
    real += ("vllm.v1.worker.ubatching", "vllm.utils.math_utils")
    given = {
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
        f"{layers}.utils": {"moe_kernel_quantize_input": lambda x, *_: (x, None)},
    }
    with Island(FOLDER / "vllm", "vllm", real=real, given=given):
        module = importlib.import_module(target)
        reduce = importlib.import_module(f"{layers}.topk_weight_and_reduce")
    import deep_ep

    max_tokens, hidden = 16, 2048
    case.only_powers_of_two(hidden)
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=max_tokens,
        hidden=hidden,
        num_ranks=case.size,
        num_experts=case.num_experts,
    )
    buffer = deep_ep.Buffer(
        group,
        num_rdma_bytes=size,
        low_latency_mode=True,
        num_qps_per_rank=EXPERTS_A_RANK,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
    )
    quant = SimpleNamespace(
        quant_dtype=None,
        a1_scale=None,
        a2_scale=None,
        a1_gscale=None,
        per_act_token_quant=False,
        block_shape=[128, 128],
    )
    for is_async, is_fp8 in itertools.product((False, True), (False, True)):
        both = module.DeepEPLLPrepareAndFinalize(
            buffer, max_tokens, case.size, use_fp8_dispatch=is_fp8
        )
        start = (case.x, case.weights, case.topk_idx, case.num_experts, None, False, quant)
        if is_async:
            hook, receiver = both.prepare_async(*start)
            hook()
            rows, scales, meta, _, _ = receiver()
        else:
            rows, scales, meta, _, _ = both.prepare(*start)
        assert meta.expert_num_tokens.shape == (EXPERTS_A_RANK,)
        y = case.slab_experts(rows, scales if is_fp8 else None)
        out = torch.empty_like(case.x)
        end = (out, y, case.weights, case.topk_idx, False, reduce.TopKWeightAndReduceDelegate())
        if is_async:
            hook, receiver = both.finalize_async(*end)
            hook()
            receiver()
        else:
            both.finalize(*end)
        case.check(out)
    buffer.destroy()
