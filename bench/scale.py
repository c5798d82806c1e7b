"""Scale on paper: a rank's memory and messages between NVLink domains, in groups nobody here has.

    python bench/scale.py            # the tables of docs/internode.md
    python bench/scale.py --json

Counts of messages follow from the routing alone; `tests/cpu/test_scale.py` compares them with what
the emulated kernels send. Times are those of the link at `LINK`, and nothing else: no latency, no
contention, no limit of the NIC to so many messages a second.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epjit.config import Config, low_latency_size_hint
from epjit.formats import FP8
from epjit.kernels import internode, low_latency
from epjit.kernels.shapes import CombineShape, DispatchShape
from epjit.modes.internode import _Rings
from epjit.modes.low_latency import _Arena
from epjit.runtime.device import shared_limit
from epjit.runtime.transport import DEFAULT_QPS

ARCH = "sm_90a"
LINK = 400e9 / 8  # bytes a second of one NIC, and there is one a rank
HIDDEN, TOPK, EXPERTS, PER_DOMAIN = 7168, 8, 256, 8
TOKENS, LOW_LATENCY_TOKENS = 4096, 128
QP_BYTES = (384 << 10, 137 << 10)  # of NVSHMEM 3.4.5: as it comes, with 32 fetch slots
HEAP_STEP = 1 << 29  # NVSHMEM_CUMEM_GRANULARITY, as epjit sets it


@dataclass(frozen=True)
class Messages:
    """Messages of one rank to other domains in one operation.

    Attributes:
        puts: Bytes, each followed by its signal.
        num_bytes: Of all puts.
        signals: Signals alone, of 8 bytes.
    """

    puts: float
    num_bytes: float
    signals: float

    def __add__(self, other: Messages) -> Messages:
        return Messages(
            self.puts + other.puts, self.num_bytes + other.num_bytes, self.signals + other.signals
        )

    @property
    def seconds(self) -> float:
        """Time of the bytes on the link."""
        return self.num_bytes / LINK

    @property
    def rate(self) -> float:
        """Puts a second that fill the link."""
        return self.puts / self.seconds


# ---- counts: exact ------------------------------------------------------------------------------


def notify(num_domains: int, num_local: int, experts_per_rank: int) -> Messages:
    """The counts to each rail peer; before them two signals: begun, may be written to."""
    others = num_domains - 1
    words = 2 + num_local * (1 + experts_per_rank)
    return Messages(others, others * 4 * math.ceil(words / 4) * 4, 2 * others)


def rings(
    config: internode.InternodeDispatchConfig | internode.InternodeCombineConfig,
    sends: Sequence[float],
    receives: Sequence[float],
    ring_slots: int,
) -> Messages:
    """A dispatch or combine of the normal mode.

    Args:
        config: Of the kernel.
        sends: Tokens to each other domain.
        receives: Tokens from each other domain, for whose windows credits go back.
        ring_slots: Slots of a ring.
    """
    window = ring_slots // 2
    credit = sum(max(0, math.ceil(tokens / window) - 2) for tokens in receives)
    return Messages(
        sum(math.ceil(tokens / config.tokens_per_chunk) for tokens in sends),
        sum(sends) * config.slot_bytes,
        2 * len(sends) + credit,
    )


def low_latency_dispatch(
    config: low_latency.LowLatencyDispatchConfig, num_remote: int, rows: float, num_tokens: int
) -> Messages:
    """The counts to each remote rank, and a put for each token and remote rank that gets it.

    Args:
        config: Of the kernel.
        num_remote: Ranks of other domains.
        rows: Pairs of a token and a remote rank that it goes to.
        num_tokens: Of this rank.
    """
    words = config.num_experts // config.num_ranks + math.ceil(num_tokens / 64)
    counts = 8 * math.ceil(words / 2) * 2
    return Messages(num_remote + rows, num_remote * counts + rows * config.slot_bytes, 0)


def low_latency_combine(
    config: low_latency.LowLatencyCombineConfig, num_remote: int, rows: float
) -> Messages:
    """A put for each row of a remote token; and a signal to each remote rank: begun.

    Args:
        config: Of the kernel.
        num_remote: Ranks of other domains.
        rows: Selections of this rank's experts by tokens of remote ranks.
    """
    return Messages(rows, rows * config.slot_bytes, num_remote)


# ---- a group whose tokens choose experts at random -----------------------------------------------


def chance(part: int, experts: int = EXPERTS, topk: int = TOPK) -> float:
    """Of a token to choose any of `part` experts, when it chooses `topk` of all by chance."""
    return 1 - math.comb(experts - part, topk) / math.comb(experts, topk)


def of_group(num_ranks: int) -> dict[str, Any]:
    """Memory and messages of a rank in a group of so many, in domains of `PER_DOMAIN`."""
    num_domains = num_ranks // PER_DOMAIN
    others, remote = num_domains - 1, num_ranks - PER_DOMAIN
    row = 2 * HIDDEN
    rdma_bytes = Config(20).get_rdma_buffer_size_hint(row, num_ranks, ranks_per_domain=PER_DOMAIN)
    part = _Rings(num_domains, PER_DOMAIN, rdma_bytes).total
    small_bytes = low_latency_size_hint(LOW_LATENCY_TOKENS, HIDDEN, num_ranks, EXPERTS)
    arena = _Arena(num_ranks, small_bytes, remote=True)
    small_rows = small_bytes + 2 * arena.staging_half_bytes
    crossing = [TOKENS * chance(EXPERTS // num_domains)] * others
    ops = {"notify": notify(num_domains, PER_DOMAIN, EXPERTS // num_ranks)}
    shapes: dict[str, DispatchShape | CombineShape] = {
        "dispatch, FP8": DispatchShape(HIDDEN, HIDDEN // 128, TOPK, True),
        "dispatch, BF16": DispatchShape(row, 0, TOPK, True),
        "combine, BF16": CombineShape(row, TOPK, is_f16=False),
    }
    for name, shape in shapes.items():
        config = internode.config_of(shape, num_domains, PER_DOMAIN, ARCH, variant="tma")
        ops[name] = rings(config, crossing, crossing, internode.ring_slots(config, rdma_bytes))
    sends = low_latency.LowLatencyDispatchConfig.choose(
        low_latency.LowLatencyDispatchShape(EXPERTS, HIDDEN, FP8.code, TOPK, True),
        num_ranks=num_ranks,
        remote=True,
    )
    rows = LOW_LATENCY_TOKENS * remote * chance(EXPERTS // num_ranks)
    ops["low-latency dispatch, FP8"] = low_latency_dispatch(sends, remote, rows, LOW_LATENCY_TOKENS)
    back = low_latency.LowLatencyCombineConfig.choose(
        low_latency.LowLatencyCombineShape(EXPERTS, HIDDEN, TOPK, True, False),
        num_ranks=num_ranks,
        variant="tma",
        limit=shared_limit(ARCH),
        remote=True,
    )
    rows = LOW_LATENCY_TOKENS * TOPK * remote / num_ranks
    ops["low-latency combine, BF16"] = low_latency_combine(back, remote, rows)
    return {
        "ranks": num_ranks,
        "domains": num_domains,
        "queue_pairs": DEFAULT_QPS * (num_ranks - 1),
        "heap": {
            "normal": (rdma_bytes, part - rdma_bytes),
            "low-latency": (small_rows, arena.total - small_rows),
        },
        "ops": ops,
    }


# ---- tables --------------------------------------------------------------------------------------


def tables(groups: Sequence[dict[str, Any]]) -> str:
    """The two tables, of what a rank holds and of what it sends, in Markdown."""
    heads = [f"{each['ranks']} ranks" for each in groups]
    lines = [_row(["a rank holds", *heads]), _row(["---"] * (1 + len(groups)))]
    lines += [
        _row(
            [
                f"queue pairs of IBGDA, {DEFAULT_QPS} a peer",
                *(str(g["queue_pairs"]) for g in groups),
            ]
        )
    ]
    for text, size in zip(("as NVSHMEM has it", "with 32 fetch slots"), QP_BYTES, strict=True):
        memory = (_size(each["queue_pairs"] * size) for each in groups)
        lines.append(_row([f"GPU memory of these, {text}", *memory]))
    for mode in groups[0]["heap"]:
        sizes = [each["heap"][mode] for each in groups]
        lines.append(_row([f"{mode} mode: rows", *(_size(rows) for rows, _ in sizes)]))
        signals = (_size(control) for _, control in sizes)
        lines.append(_row([f"{mode} mode: signals, words, counts", *signals]))
        heap = (_size(HEAP_STEP * math.ceil(sum(each) / HEAP_STEP)) for each in sizes)
        lines.append(_row([f"{mode} mode: heap, in steps of {_size(HEAP_STEP)}", *heap]))
    lines += ["", _row(["a rank sends", *heads]), _row(["---"] * (1 + len(groups)))]
    for op in groups[0]["ops"]:
        lines.append(_row([op, *(_words(each["ops"][op]) for each in groups)]))
    return "\n".join(lines)


def _words(sent: Messages) -> str:
    text = f"{sent.puts:.0f} puts, {sent.signals:.0f} signals, {_size(sent.num_bytes)}"
    if sent.seconds < 1e-6:
        return text
    return f"{text}: {sent.seconds * 1e6:.0f} µs, {sent.rate / 1e6:.2f} M puts/s"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GB"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the tables, or JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    groups = [of_group(num_ranks) for num_ranks in args.ranks]
    if args.json:
        for group in groups:
            print(json.dumps(group, default=vars))
    else:
        print(tables(groups))


if __name__ == "__main__":
    main()
