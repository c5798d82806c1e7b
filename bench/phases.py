"""When each phase of a low-latency kernel ends, in one block, by the clock of its SM.

The kernels' sources with stamps put in between (`stages.edited`): lane 0 of each warp of one block
writes its clock; what is not edited has none of it. Pairs of calls run in a CUDA graph, so all is
warm; `--cold` flushes the L2 before each call. A line a phase: how many warps went through it, and
when the first and the last of them had done with it, in microseconds since the block began. Of a
phase that a warp goes through several times, the last time counts. With one rank nothing crosses a
link: what is left is the kernel's own.

    python bench/phases.py --tokens 8 128
    python bench/phases.py --tokens 8 --block 5 --cold
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from bench.stages import Edit, edited  # noqa: E402
from epjit.bench import timing  # noqa: E402
from epjit.bench.low_latency import Case  # noqa: E402
from epjit.bench.normal import Settings  # noqa: E402

DISPATCH, COMBINE = "low_latency/dispatch.cu", "low_latency/combine.cu"
REDUCED = "low_latency/combine_reduced.cu"
WARPS, PHASES, CLOCK = 32, 16, "epjit_stamps"
PAIRS, ROUNDS = 10, 5
FIRST = "namespace epjit {\n\nstruct LowLatency"  # in all

# Name of the phase, and the text before which it has ended.
MARKS: dict[str, list[tuple[str, str]]] = {
    DISPATCH: [
        ("begins", "const uint32_t aborted = ptx::ld_relaxed_gpu(p.abort);\n"),
        ("epoch, abort, first draw", "      if (!p.receives) ptx::griddepcontrol_launch"),
        ("selections before counted", "    for (int token = first; token < last; ++token) {\n"),
        ("selections sent", "      const uint32_t readers = shared_readers();\n"),
        ("row cast, before lines", "        send_lines(token, readers);\n"),
        ("lines sent", "        continue;\n      }\n      row.store(kRemote"),
        ("row cast and stored", "      if (threadIdx.x < kRanks && may_send(waiter, threadIdx"),
        ("word released", "    if constexpr (kRemote) put_chunk(first, last);\n"),
        ("nothing left to send", "      if (p.receives && plan.wait_for_counts(tells)) {\n"),
        ("counts are here", "        plan.make(tells);\n"),
        ("planned", "        receive(first.unit());\n"),
        (
            "lines are here",
            "    if (part == 0) store_routes(source, token, placed);\n    const auto",
        ),
        ("lines stored", "      first += kBatch;\n      if (first >= last) break;\n"),
        ("word is here", "    if (static_cast<uint32_t>(word) == 0) {\n"),
        ("row stored", "      if (first >= last) return;\n"),
        ("nothing left", "    if constexpr (kCfg.shrink) {\n"),
    ],
    COMBINE: [
        ("begins", "const uint32_t aborted = ptx::ld_relaxed_gpu(p.abort);\n"),
        ("epoch, abort, first draw", "    if (!p.receives || blockIdx.x != 0) ptx::griddep"),
        ("row of x known", "    copy_rows(copier, src, dst, part);\n"),
        (
            "row stored",
            "      // Rows are written -> copy_group -> release of any lane: cumulative.",
        ),
        ("word released", "      unit = next.unit();\n    }\n  }\n\n  // A part"),
        ("nothing left to push", "      if (p.receives && goes_on()) reduce();\n"),
        ("words are here", "    if (!all_lanes(ok)) return false;\n    if constexpr (kRemote)\n"),
        ("rows in lines are here", "          if (left == next) break;\n"),
        ("sum stored", "    }\n  }\n\n  // draw_on() is called when the warp has nothing"),
        ("nothing left", "    ticket.take(waiter.epoch);\n    if (ticket.is_last())"),
    ],
    REDUCED: [
        ("begins", "const uint32_t aborted = ptx::ld_relaxed_gpu(p.abort);\n"),
        ("epoch, abort, first draw", "    // Who does not stay meets the peers"),
        ("rows of x known", "    add_up<kBatch, true>(row_of_x(row), weight, rows, part, slot("),
        ("sum written", "    // Pieces of all lanes -> __syncwarp -> release: cumulative.\n"),
        ("word released", "      unit = next.unit();\n    }\n    return true;\n"),
        ("own rows known", "    if (own_rows != 0) add_up<kBatch, true>("),
        ("own rows added", "    draw_on();\n    const bool own_comes"),
        ("words are here", "    add_up<kBatch, false>("),
        ("sum stored", "    return true;\n  }\n\n  const LowLatencyReducedCombineParams& p;"),
        ("nothing left", "    ticket.take(waiter.epoch);\n    if (ticket.is_last())"),
    ],
}


def stamped(source: str, block: int) -> tuple[Edit, ...]:
    """Edits that put the stamps of a kernel in.

    Args:
        source: Of the kernel.
        block: Which block writes.
    """
    clock = (
        f'extern "C" {{ __device__ unsigned long long {CLOCK}[{WARPS}][{PHASES}]; }}\n'
        "namespace epjit {\n"
        "__device__ __forceinline__ void phase_ends(int phase) {\n"
        f"  if (blockIdx.x != {block}) return;\n"
        f"  unsigned long long* const stamps = {CLOCK}[threadIdx.x / kWarpSize];\n"
        "  const int lane = threadIdx.x % kWarpSize;\n"
        f"  if (phase == 0 && lane < {PHASES}) stamps[lane] = 0;\n"
        "  if (phase == 0) __syncwarp();\n"
        "  if (lane == 0) stamps[phase] = ptx::clock64();\n"
        "}\n"
        "}  // namespace epjit\n\n"
    )
    marks = enumerate(text for _, text in MARKS[source])
    return (
        Edit(source, FIRST, clock + FIRST),
        *(Edit(source, text, f"phase_ends({phase});\n{text}") for phase, text in marks),
    )


def read_stamps(launch: Any) -> list[list[int]]:
    """Stamps of the kernel of a launch: a row of phases for each warp; 0 = it was not there."""
    from epjit.runtime import driver

    stamps = ((ctypes.c_uint64 * PHASES) * WARPS)()
    pointer, size = driver.call("cuModuleGetGlobal", launch.kernel._module.ptr, CLOCK.encode())
    assert size == ctypes.sizeof(stamps)
    driver.call("cuMemcpyDtoH", ctypes.addressof(stamps), pointer, size)
    return [list(row) for row in stamps]


def show(source: str, stamps: list[list[int]], cycles_a_us: float) -> None:
    """Prints the phases of one launch."""
    begin = min((row[0] for row in stamps if row[0]), default=0)
    for phase, (name, _) in enumerate(MARKS[source]):
        ends = [(row[phase] - begin) / cycles_a_us for row in stamps if row[phase]]
        if ends:
            first, last = min(ends), max(ends)
            print(f"  {name:26} {len(ends):3} warps {first:7.2f} {last:7.2f}", flush=True)


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank: runs the pairs, and rank 0 prints."""
    from epjit import Buffer
    from epjit.runtime import driver

    group = timing.join(rank, args.ranks, port)
    settings = Settings(
        ranks=args.ranks,
        hidden=args.hidden,
        experts=args.experts,
        topk=args.topk,
        tokens=tuple(args.tokens),
    )
    rate = driver.load().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
    kilohertz = driver.call("cuDeviceGetAttribute", rate, rank)
    flush = torch.empty(timing.FLUSH_WORDS, dtype=torch.int32, device="cuda").zero_
    for tokens in args.tokens:
        size = Buffer.get_low_latency_rdma_size_hint(tokens, args.hidden, args.ranks, args.experts)
        buffer = Buffer(group, 0, size, low_latency_mode=True, explicitly_destroy=True)
        case = Case(
            buffer,
            group,
            settings,
            tokens,
            use_fp8=not args.bf16,
            index_dtype=torch.int64,
            weights_sent=args.weights_sent,
        )
        edits = [edit for source in MARKS for edit in stamped(source, args.block)]
        with edited(tuple(edits)):
            case.pair()  # compiles
        torch.cuda.synchronize()
        dist.barrier(group)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(PAIRS):
                case.pair(flush if args.cold else timing.nothing)
        for _ in range(ROUNDS):
            graph.replay()
        torch.cuda.synchronize()
        if rank == 0:
            mode: Any = buffer._low_latency
            for launch in mode._launches.values():
                config: Any = launch.kernel.config
                if config.source not in MARKS:
                    continue
                print(f"{tokens} tokens, block {args.block}: {config}", flush=True)
                show(config.source, read_stamps(launch), kilohertz / 1e3)
        dist.barrier(group)
        buffer.destroy()
    dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--cold", action="store_true", help="flush the L2 before each call")
    parser.add_argument("--bf16", action="store_true", help="rows of BF16 instead of FP8")
    parser.add_argument("--weights-sent", action="store_true", help="and sums before the links")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    args = parser.parse_args()
    if args.ranks < 1:
        sys.exit("no GPU: the phases are those of kernels that run")
    mp.spawn(worker, (args, timing.free_port()), args.ranks)


if __name__ == "__main__":
    main()
