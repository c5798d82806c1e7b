"""The time of a kernel with a stage left out, on all GPUs of this machine: what holds it.

Each case is the kernel's source with an edit, compiled and timed as `python -m epjit bench` does.
Results of an edited kernel are wrong by design and are not looked at; those of the whole one are
what the tests and the bench check.

    python bench/stages.py --sms 24 12
    EPJIT_DISPATCH_VARIANT=push python bench/stages.py --only dispatch
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from epjit.bench import timing

DISPATCH, COMBINE = "intranode/dispatch.cu", "intranode/combine.cu"


class Edit(NamedTuple):
    """Text of a source, and what replaces it."""

    source: str
    old: str
    new: str


NO_PULL = Edit(DISPATCH, "if constexpr (kRanks > 1) pull();", ";")
NO_LOADS = Edit(
    DISPATCH,
    "const bool goes = chunk.readers != 0 || chunk.own_row >= 0;",
    "const bool goes = false;",
)
NO_STORES = Edit(
    DISPATCH,
    "first < chunk.num_rows; first += kRows) {",
    "first < 0; first += kRows) {",
)
NO_SUMS = Edit(COMBINE, "(kByExpert ? first - lane : first) < last;", "first < 0;")

CASES: dict[str, dict[str, tuple[Edit, ...]]] = {
    "dispatch": {
        "all of it": (),
        "staging, no pulls": (NO_PULL,),
        "words and pulls, no rows staged": (NO_LOADS, NO_STORES),
        "words alone": (NO_LOADS, NO_STORES, NO_PULL),
    },
    "combine": {
        "all of it": (),
        "pushes, nothing waited for": (Edit(COMBINE, "if (ok) reduce();", ";"),),
        "pushes and waits, no sums": (NO_SUMS,),
    },
}


@contextmanager
def edited(edits: tuple[Edit, ...]) -> Iterator[None]:
    """Compiles from a copy of the sources with these edits.

    Raises:
        ValueError: A source does not hold the text that an edit replaces.
    """
    from epjit.runtime import sources

    with tempfile.TemporaryDirectory(prefix="epjit-stages-") as folder:
        root = Path(folder) / "cuda_src"
        shutil.copytree(str(sources.root()), root)
        for edit in edits:
            text = (root / edit.source).read_text()
            if edit.old not in text:
                raise ValueError(
                    f"{edit.source} holds no {edit.old!r}; bench/stages.py is behind it"
                )
            (root / edit.source).write_text(text.replace(edit.old, edit.new))
        before, sources.ROOT = sources.ROOT, root
        try:
            yield
        finally:
            sources.ROOT = before


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    """One rank: times the cases, and rank 0 prints."""
    from epjit import Buffer, Config

    group = timing.join(rank, args.ranks, port)
    torch.manual_seed(rank)
    x = torch.randn(args.tokens, args.hidden, device="cuda", dtype=torch.bfloat16)
    scores = torch.randn(args.tokens, args.experts, device="cuda")
    topk_idx = scores.topk(args.topk, dim=1).indices
    whole = Buffer(group, args.nvl_bytes, explicitly_destroy=True)
    per_rank, _, per_expert, in_rank, _ = whole.get_dispatch_layout(topk_idx, args.experts)
    rows, _, _, _, handle, _ = whole.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )
    assert isinstance(rows, torch.Tensor)
    assert handle is not None
    for op in args.only:
        for name, edits in CASES[op].items():
            with edited(edits):
                buffer = Buffer(group, args.nvl_bytes, explicitly_destroy=True)
                for sms in args.sms:
                    config = Config(sms)
                    if op == "dispatch":
                        us, _ = timing.timed(
                            lambda: buffer.dispatch(x, handle=handle, config=config),  # noqa: B023
                            group,
                        )
                    else:
                        us, _ = timing.timed(
                            lambda: buffer.combine(rows, handle, config=config),  # noqa: B023
                            group,
                        )
                    if rank == 0:
                        print(f"{op:9} {sms:3} SMs  {us:7.1f} us  {name}", flush=True)
                torch.cuda.synchronize()
                dist.barrier(group)
                buffer.destroy()
    whole.destroy()
    dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--sms", type=int, nargs="+", default=[24, 12])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--nvl-bytes", type=int, default=10**9)
    args = parser.parse_args()
    if args.ranks < 2:
        sys.exit(f"{args.ranks} GPUs: a stage between ranks needs two")
    mp.spawn(worker, (args, timing.free_port()), args.ranks)


if __name__ == "__main__":
    main()
