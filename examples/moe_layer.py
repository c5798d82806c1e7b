"""A mixture-of-experts layer over N processes, forward and backward, checked against a dense one.

    python examples/moe_layer.py --ranks 4

Every rank holds its own tokens, a copy of the router and `experts / ranks` SwiGLU experts. Tokens
travel to the experts with `Buffer.dispatch` and come back summed with `Buffer.combine`; the two
are each other's gradient, which `Dispatch` and `Combine` below tell autograd. At the end rank 0
computes the same layer with all experts on one device in float32 and compares the output and every
gradient. The exit code is 1 if a check fails. With fewer GPUs than ranks all of it runs on the CPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import epjit

# Relative error allowed for a row: its distance from the dense row over the length of that row, or
# of a typical row if that is longer. bfloat16 has 8 significant bits, so one rounding errs by up to
# 2**-9. The parallel layer rounds about six times on the way to the output and twice as often on
# the way to a gradient (three matrix products, activation, a rank's sum, combine, accumulation),
# the dense one never: 12 independent errors add up to sqrt(12) * 2**-9, under 2**-7. Four times
# that is allowed. A row that went astray errs by about 1, a token that lost one of its four choices
# by about 0.3.
TOLERANCE = 2.0**-5


@dataclass(frozen=True)
class Layer:
    """Sizes of the layer and of the run."""

    num_tokens: int  # a rank
    hidden: int
    intermediate: int
    num_experts: int
    num_topk: int
    num_steps: int


class Dispatch(torch.autograd.Function):
    """Tokens to the ranks of their experts; the gradient comes back by a combine."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_idx: Tensor,
        num_experts: int,
        buffer: epjit.Buffer,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the received rows, their local experts and weights, and the handle."""
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv_x, recv_topk_idx, recv_topk_weights, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        ctx.mark_non_differentiable(recv_topk_idx)
        return recv_x, recv_topk_idx, recv_topk_weights, handle

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None, None, None]:
        """A token that was sent to several ranks gets the sum of the gradients of its copies."""
        grad_x, _, grad_weights, _ = grads
        x_grad, weights_grad, _ = ctx.buffer.combine(
            grad_x.contiguous(),
            ctx.saved_tensors,
            topk_weights=grad_weights.float().contiguous(),
        )
        return x_grad, weights_grad, None, None, None


class Combine(torch.autograd.Function):
    """Rows back to the ranks of their tokens, summed; the gradient travels by a cached dispatch."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: tuple[Tensor, ...], buffer: epjit.Buffer) -> Tensor:
        """Return one row for each token of this rank."""
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        combined, _, _ = buffer.combine(y, handle)
        return combined

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        """Every row that was added gets the gradient of the sum."""
        recv, *_ = ctx.buffer.dispatch(grads[0].contiguous(), handle=ctx.saved_tensors)
        return recv, None, None


class Expert(nn.Module):
    """SwiGLU: `(silu(x @ gate) * (x @ up)) @ down`, the same on every rank for the same index."""

    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def __init__(self, index: int, layer: Layer, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        shapes = {
            "gate": (layer.hidden, layer.intermediate),
            "up": (layer.hidden, layer.intermediate),
            "down": (layer.intermediate, layer.hidden),
        }
        for place, (name, shape) in enumerate(shapes.items()):
            values = normal(shape, seed=1000 + 3 * index + place) * shape[0] ** -0.5
            # Rounded to bfloat16 first, so that the dense float32 layer has the same weights.
            weight = values.to(torch.bfloat16).to(device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, hidden]` to `[n, hidden]`."""
        return (F.silu(x @ self.gate) * (x @ self.up)) @ self.down


def normal(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Float32 on the CPU, the same on every rank."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def tokens_of(rank: int, step: int, layer: Layer) -> Tensor:
    """A rank's bfloat16 tokens `[T, H]` in one step."""
    shape = (layer.num_tokens, layer.hidden)
    return normal(shape, seed=7 + 2 * (rank + 1000 * step)).to(torch.bfloat16)


def output_grad_of(rank: int, step: int, layer: Layer) -> Tensor:
    """The gradient `[T, H]` that arrives at a rank's output in one step."""
    shape = (layer.num_tokens, layer.hidden)
    return normal(shape, seed=8 + 2 * (rank + 1000 * step)).to(torch.bfloat16)


def router_of(layer: Layer, device: str) -> Tensor:
    """The router's float32 weights `[E, H]`."""
    weights = normal((layer.num_experts, layer.hidden), seed=3) * layer.hidden**-0.5
    return weights.to(device).requires_grad_()


def route(x: Tensor, router: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
    """The experts of each token and their float32 weights, the probabilities as they are."""
    probabilities = torch.softmax(x.float() @ router.t(), dim=1)
    topk_weights, topk_idx = probabilities.topk(num_topk, dim=1)
    return topk_idx, topk_weights


def run_experts(
    experts: list[Expert], x: Tensor, expert_idx: Tensor, expert_weights: Tensor
) -> Tensor:
    """Weighted sum over the experts at hand: float32 `[n, H]`; an index of -1 adds nothing."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for index, expert in enumerate(experts):
        rows, columns = torch.nonzero(expert_idx == index, as_tuple=True)
        weighted = expert(x[rows]).float() * expert_weights[rows, columns, None]
        y = y.index_add(0, rows, weighted)
    return y


def parallel_forward(
    x: Tensor, router: Tensor, experts: list[Expert], layer: Layer, buffer: epjit.Buffer
) -> tuple[Tensor, Tensor]:
    """The layer over all ranks: output `[T, H]` and the choices `[T, K]` of this rank's tokens."""
    topk_idx, topk_weights = route(x, router, layer.num_topk)
    recv_x, recv_idx, recv_weights, handle = Dispatch.apply(
        x, topk_weights, topk_idx, layer.num_experts, buffer
    )
    y = run_experts(experts, recv_x, recv_idx, recv_weights).to(x.dtype)
    return Combine.apply(y, handle, buffer), topk_idx


def dense_layer(
    layer: Layer, step: int, topk_idx: Tensor, num_ranks: int, device: str
) -> dict[str, Tensor]:
    """Output and gradients with all experts and all tokens in one place, in float32.

    Args:
        layer: Sizes.
        step: Which tokens.
        topk_idx: `[R * T, K]`, the choices the ranks made: a tie may fall either way.
        num_ranks: `R`.
        device: Where to compute.

    Returns:
        By the names that `rank_main` reports; rows of all ranks and experts one after the other.
    """
    ranks = range(num_ranks)
    x = torch.cat([tokens_of(rank, step, layer) for rank in ranks]).float().to(device)
    x.requires_grad_()
    router = router_of(layer, device)
    experts = [
        Expert(index, layer, dtype=torch.float32, device=device)
        for index in range(layer.num_experts)
    ]
    topk_weights = torch.softmax(x @ router.t(), dim=1).gather(1, topk_idx)
    out = run_experts(experts, x, topk_idx, topk_weights)
    out.backward(torch.cat([output_grad_of(rank, step, layer) for rank in ranks]).to(out))
    return {
        "output": out.detach(),
        "grad of tokens": grad_of(x),
        "grad of router": grad_of(router),
        **expert_grads(experts),
    }


def grad_of(tensor: Tensor) -> Tensor:
    """The gradient; zeros where nothing arrived (an expert that no token chose)."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def expert_grads(experts: list[Expert]) -> dict[str, Tensor]:
    """Gradients of the experts' matrices, rows one expert after the other."""
    return {
        f"grad of {name}": torch.cat([grad_of(expert.get_parameter(name)) for expert in experts])
        for name in ("gate", "up", "down")
    }


def row_error(got: Tensor, want: Tensor) -> float:
    """Largest error of a row, as `TOLERANCE` defines it."""
    want = want.cpu().float()
    length = want.norm(dim=1)
    typical_length = float(length.square().mean().sqrt()) or 1.0  # one expert: no router gradient
    distance = (got.cpu().float() - want).norm(dim=1)
    return float((distance / length.clamp(min=typical_length)).max())


class Timer:
    """Milliseconds of the named parts; the median over the steps after the first."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.samples: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body, the device's work included."""
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.samples.setdefault(name, []).append((time.perf_counter() - start) * 1e3)

    def median_ms(self, name: str) -> float:
        """The first step compiles and warms up, so it counts only when it is the only one."""
        samples = self.samples[name]
        return statistics.median(samples[1:] or samples)

    def _synchronize(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def roundtrip_error(
    buffer: epjit.Buffer, x: Tensor, topk_idx: Tensor, num_experts: int, timer: Timer
) -> float:
    """Experts that do nothing: each token must come back times the number of its ranks, exactly."""
    with timer("round trip"):
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv_x, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        combined, _, _ = buffer.combine(recv_x, handle)
    want = (x.float() * in_rank.sum(dim=1, keepdim=True)).to(x.dtype)
    return float((combined.float() - want.float()).abs().max())


@contextmanager
def progress(rank: int, total: int) -> Iterator[Callable[[str], None]]:
    """A function that says what comes next: a bar of rank 0 on a terminal, else lines of text."""
    if rank != 0:
        yield lambda text: None
    elif sys.stderr.isatty() and _has_rich():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bars:
            bar = bars.add_task("starting", total=total)

            def advance(text: str) -> None:
                bars.update(bar, advance=1, description=text)

            yield advance
    else:
        start = time.perf_counter()
        yield lambda text: print(
            f"[{time.perf_counter() - start:6.1f} s] {text}", file=sys.stderr, flush=True
        )


def _has_rich() -> bool:
    """A GPU machine may have torch and CuPy and not rich."""
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True


def show_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table, with rich where there is rich."""
    if _has_rich():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index < 2 else "right")
        for row in rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 100).print(table)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    print(title)
    for row in [header, *rows]:
        cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def rank_main(rank: int, num_ranks: int, use_gpu: bool, rendezvous: str, layer: Layer) -> None:
    """One rank of the layer; exits with 1 on every rank when a check failed."""
    device = "cpu"
    if use_gpu:
        device = f"cuda:{rank % torch.cuda.device_count()}"  # where there are fewer, ranks share
        torch.cuda.set_device(device)
    else:
        os.environ["EPJIT_BACKEND"] = "cpu"  # also where there are GPUs
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    try:
        with progress(rank, layer.num_steps + 3) as say:
            say("creating the buffer")
            num_nvl_bytes = max(
                config.get_nvl_buffer_size_hint(layer.hidden * 2, num_ranks)
                for config in (
                    epjit.Buffer.get_dispatch_config(num_ranks),
                    epjit.Buffer.get_combine_config(num_ranks),
                )
            )
            buffer = epjit.Buffer(group, num_nvl_bytes, explicitly_destroy=True)
            results, timer = train(buffer, rank, num_ranks, device, layer, say)
            buffer.destroy()  # collective, so not after an error: the peers would not come
            say("dense layer on rank 0")
            gathered: list[Any] | None = [None] * num_ranks if rank == 0 else None
            dist.gather_object(results, gathered, dst=0)
            verdict = [True]
            errors: dict[str, float] = {}
            if gathered is not None:
                errors = compare(gathered, layer, device)
                verdict = [all(error <= limit_of(name) for name, error in errors.items())]
            dist.broadcast_object_list(verdict, src=0)
        if rank == 0:
            report(errors, results, timer, layer, num_ranks, device)
    finally:
        dist.destroy_process_group()
    if not verdict[0]:
        sys.exit(1)


def train(
    buffer: epjit.Buffer,
    rank: int,
    num_ranks: int,
    device: str,
    layer: Layer,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], Timer]:
    """Run the steps; return what the last one computed, and the times."""
    num_local = layer.num_experts // num_ranks
    router = router_of(layer, device)
    experts = [
        Expert(index, layer, dtype=torch.bfloat16, device=device)
        for index in range(rank * num_local, (rank + 1) * num_local)
    ]
    timer = Timer(device)
    results: dict[str, Any] = {}
    for step in range(layer.num_steps):
        say(f"step {step + 1} of {layer.num_steps}: forward and backward")
        x = tokens_of(rank, step, layer).to(device).requires_grad_()
        output_grad = output_grad_of(rank, step, layer).to(device)
        for parameter in (router, *(each for expert in experts for each in expert.parameters())):
            parameter.grad = None
        with timer("output"):
            out, topk_idx = parallel_forward(x, router, experts, layer, buffer)
        with timer("grad of tokens"):
            out.backward(output_grad)
        router_grad = grad_of(router).cpu()
        dist.all_reduce(router_grad)  # each rank has seen its own tokens only
        results = {
            "output": out.detach(),
            "grad of tokens": grad_of(x),
            "grad of router": router_grad,
            **expert_grads(experts),
            "topk_idx": topk_idx,
        }
    say("round trip")
    x, topk_idx = x.detach(), results["topk_idx"]
    results["round trip"] = max(
        roundtrip_error(buffer, x, topk_idx, layer.num_experts, timer)
        for _ in range(layer.num_steps)
    )
    return {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in results.items()
    }, timer


def compare(gathered: list[dict[str, Any]], layer: Layer, device: str) -> dict[str, float]:
    """Errors by name, of all ranks together."""
    topk_idx = torch.cat([each["topk_idx"] for each in gathered]).to(device)
    dense = dense_layer(layer, layer.num_steps - 1, topk_idx, len(gathered), device)
    errors = {"round trip": max(each["round trip"] for each in gathered)}
    for name, want in dense.items():
        parts = [each[name] for each in gathered]
        got = parts[0] if name == "grad of router" else torch.cat(parts)
        errors[name] = row_error(got, want)
    return errors


def limit_of(name: str) -> float:
    """Rows that only travel keep every bit."""
    return 0.0 if name == "round trip" else TOLERANCE


def report(
    errors: dict[str, float],
    results: dict[str, Any],
    timer: Timer,
    layer: Layer,
    num_ranks: int,
    device: str,
) -> None:
    """Print the table of rank 0."""
    token_shape = f"{num_ranks} x [{layer.num_tokens}, {layer.hidden}]"
    shapes = {
        "round trip": token_shape,
        "output": token_shape,
        "grad of tokens": token_shape,
        "grad of router": str(list(results["grad of router"].shape)),
        "grad of gate": f"{layer.num_experts} x [{layer.hidden}, {layer.intermediate}]",
        "grad of up": f"{layer.num_experts} x [{layer.hidden}, {layer.intermediate}]",
        "grad of down": f"{layer.num_experts} x [{layer.intermediate}, {layer.hidden}]",
    }
    labels = {"round trip": "dispatch + combine", "output": "forward: output"}
    rows = [
        (
            labels.get(name, f"backward: {name.removeprefix('grad of ')}"),
            shapes[name],
            f"{error:.1e}",
            f"{limit_of(name):.1e}",
            f"{timer.median_ms(name):.2f} ms" if name in timer.samples else "",
            "ok" if error <= limit_of(name) else "WRONG",
        )
        for name, error in errors.items()
    ]
    where = "CPU"
    if device != "cpu":
        where = f"{min(num_ranks, torch.cuda.device_count())} x {torch.cuda.get_device_name()}"
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    show_table(
        f"MoE layer on {ranks} ({where}), {layer.num_experts} experts, top-{layer.num_topk}, "
        "bfloat16",
        ("what", "shape", "max error", "limit", "time", ""),
        rows,
    )


def parse_arguments() -> tuple[int, bool, Layer]:
    """Number of ranks, whether they run on GPUs, and the sizes."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    ranks_default = num_gpus if num_gpus >= 2 else 4
    parser.add_argument("--ranks", type=int, default=ranks_default, help="number of processes")
    parser.add_argument("--cpu", action="store_true", help="leave the GPUs alone")
    parser.add_argument("--tokens", type=int, help="of one rank (GPU 2048, CPU 128)")
    parser.add_argument("--hidden", type=int, help="(GPU 2048, CPU 512)")
    parser.add_argument("--intermediate", type=int, help="of an expert (GPU 768, CPU 256)")
    parser.add_argument("--experts", type=int, help="of all ranks (4 a rank)")
    parser.add_argument("--topk", type=int, default=4, help="experts of a token")
    parser.add_argument("--steps", type=int, default=4, help="forward and backward passes")
    args = parser.parse_args()

    use_gpu = not args.cpu and num_gpus > 0
    layer = Layer(
        num_tokens=(2048 if use_gpu else 128) if args.tokens is None else args.tokens,
        hidden=args.hidden or (2048 if use_gpu else 512),
        intermediate=args.intermediate or (768 if use_gpu else 256),
        num_experts=args.experts or 4 * args.ranks,
        num_topk=args.topk,
        num_steps=args.steps,
    )
    if args.ranks < 1 or layer.num_experts % args.ranks or layer.num_steps < 1:
        parser.error(
            f"need at least one rank and one step, and experts ({layer.num_experts}) that are a "
            f"multiple of ranks ({args.ranks})"
        )
    if not 1 <= layer.num_topk <= layer.num_experts:
        parser.error(f"--topk {layer.num_topk} is not within 1 and {layer.num_experts} experts")
    if layer.num_tokens < 1:
        parser.error(f"--tokens {layer.num_tokens}: the errors are relative, so at least one")
    return args.ranks, use_gpu, layer


def main() -> NoReturn:
    """Start the ranks and wait for them."""
    num_ranks, use_gpu, layer = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="epjit-moe-") as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        arguments = (num_ranks, use_gpu, rendezvous, layer)
        try:
            mp.spawn(rank_main, args=arguments, nprocs=num_ranks)
        except mp.ProcessRaisedException as error:
            sys.exit(f"a rank failed:\n{error}")
        except mp.ProcessExitedException as error:
            if error.exit_code == 1:
                sys.exit("an error exceeds its limit")
            sys.exit(f"a rank died: {error}")
    sys.exit(0)


if __name__ == "__main__":
    main()
