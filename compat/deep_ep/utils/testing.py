"""Timing for DeepEP's own test scripts."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

__all__ = ["bench", "bench_kineto"]

_FLUSH_BYTES = 256 << 20  # several times the largest L2
# DeepEP 2's tests ask for its kernels. What its epilogues do, ours do while rows travel; in a
# barrier it is notify that waits for all ranks.
_NAMES = {"dispatch_impl": "::dispatch", "combine_impl": "::combine", "barrier": "::notify"}
_EPILOGUES = ("dispatch_copy_epilogue_impl", "combine_reduce_epilogue_impl")


def bench(
    fn: Callable[[], Any],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], Any] | None = None,
) -> tuple[float, float, float]:
    """Times calls on the current stream by events, the L2 flushed once before them.

    Args:
        fn: what is timed.
        num_warmups: calls before the first timed one.
        num_tests: timed calls; the first is dropped.
        post_fn: called after each timed call, outside its time.

    Returns:
        Mean, least and greatest seconds a call.
    """
    for _ in range(num_warmups):
        fn()
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    spans = []
    for _ in range(num_tests):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        spans.append((start, end))
        if post_fn is not None:
            post_fn()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in spans][1:]
    return statistics.fmean(seconds), min(seconds), max(seconds)


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], Any] | None = None,
) -> Any:
    """Times kernels by name with torch's profiler.

    Args:
        fn: launches the kernels.
        kernel_names: one part of a kernel's name, or several; DeepEP 2's are known too.
        num_tests: profiled calls.
        suppress_kineto_output: accepted; nothing is printed here.
        trace_path: where to write a Chrome trace.
        flush_l2: overwrite the L2 before each call.
        barrier_comm_profiling: line the ranks up by a long kernel and an all-reduce first.
        num_kernels_per_period: launches of one name a call; above 1 their times stay apart.
        barrier: meets the ranks instead of the all-reduce.

    Returns:
        Mean seconds of the kernel, or a list of `num_kernels_per_period` means; for several names
        a tuple of these. NaN of DeepEP 2's epilogues, which are no kernels here.

    Raises:
        RuntimeError: a name matches no kernel, or launches that fill no whole period.
    """
    flushed = torch.empty(_FLUSH_BYTES if flush_l2 else 0, dtype=torch.int8, device="cuda")
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        if barrier_comm_profiling:
            torch.cuda._sleep(int(2e7))
            if barrier is not None:
                barrier()
            else:
                dist.all_reduce(torch.ones(1, dtype=torch.float32, device="cuda"))
        for _ in range(num_tests):
            flushed.zero_()
            fn()
        torch.cuda.synchronize()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    kernels = sorted(
        (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA),
        key=lambda event: event.time_range.start,
    )

    spans = [(event.name, event.time_range.elapsed_us() / 1e6) for event in kernels]
    most = None if barrier is None else num_tests * num_kernels_per_period
    names = (kernel_names,) if isinstance(kernel_names, str) else kernel_names
    means = tuple(_seconds(spans, name, num_kernels_per_period, most) for name in names)
    return means[0] if isinstance(kernel_names, str) else means


def _seconds(spans: list[tuple[str, float]], name: str, period: int, most: int | None) -> Any:
    """Result of `bench_kineto` for one name.

    Args:
        spans: names and seconds of all kernels, in their order.
        name: part of a name.
        period: launches a call.
        most: of so many launches, the last ones: a barrier is a dispatch too. None = all.
    """
    if name in _EPILOGUES:
        return math.nan
    name = _NAMES.get(name, name)
    found = [seconds for kernel, seconds in spans if name in kernel]
    if most is not None:
        found = found[-most:]
    if not found or len(found) % period:
        raise RuntimeError(
            f"{len(found)} launches of a kernel named *{name}*, expected a positive multiple "
            f"of {period}"
        )
    if period == 1:
        return statistics.fmean(found)
    return [statistics.fmean(found[first::period]) for first in range(period)]
