"""How long the first calls take in a new process: with an empty cache, then with what that left.

One GPU, one rank: compiling and loading do not depend on peers. Prints JSON lines.

    python bench/first_call.py [--profile]

With --profile, the functions that take a first Buffer's time, with the cache that it left.
"""

from __future__ import annotations

import cProfile
import gc
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time


def measure() -> dict[str, float]:
    """Milliseconds of the imports, of two Buffers, and of the first dispatch and combine."""
    start = time.perf_counter()
    import cupy  # noqa: F401  (Buffer loads it otherwise)
    import torch

    from epjit import Buffer
    from epjit.runtime.group import ThreadGroup

    torch.zeros(1, device="cuda")
    marks = {"imports_and_context": time.perf_counter() - start}
    # A pass over all that torch and CuPy have made is due by now, 90 ms: else it falls into what
    # comes next, the first Buffer.
    gc.collect()
    marks["collector"] = time.perf_counter() - start - marks["imports_and_context"]

    def mark(name: str, since: float) -> float:
        torch.cuda.synchronize()
        marks[name] = (now := time.perf_counter()) - since
        return now

    x = torch.randn(4096, 7168, device="cuda", dtype=torch.bfloat16)
    idx = torch.randint(256, (4096, 8), device="cuda")
    weights = torch.rand(4096, 8, device="cuda")
    torch.cuda.synchronize()
    now = time.perf_counter()
    buffer = Buffer(None, 256 << 20, comm=ThreadGroup.create(1)[0])
    now = mark("buffer", now)
    other = Buffer(None, 256 << 20, comm=ThreadGroup.create(1)[0])
    now = mark("second_buffer", now)
    del other
    now = mark("its_end", now)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 256)
    recv_x, _, recv_weights, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
    )
    now = mark("layout_and_dispatch", now)
    assert isinstance(recv_x, torch.Tensor)
    assert handle is not None
    buffer.combine(recv_x, handle, topk_weights=recv_weights)
    mark("combine", now)
    return {name: round(seconds * 1e3, 1) for name, seconds in marks.items()}


def profile() -> None:
    """Prints where a Buffer's time goes."""
    import cupy  # noqa: F401
    import torch

    from epjit import Buffer
    from epjit.runtime.group import ThreadGroup

    torch.zeros(1, device="cuda")
    gc.collect()
    with cProfile.Profile() as found:
        Buffer(None, 256 << 20, comm=ThreadGroup.create(1)[0])
    pstats.Stats(found).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    if sys.argv[1:] == ["--profile"]:
        profile()
    elif sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
    else:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                command = [sys.executable, __file__, "--measure"]
                environment = {**os.environ, "EPJIT_CACHE_DIR": folder}
                run = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                print(json.dumps({"cache": cache, "ms": json.loads(run.stdout)}))
