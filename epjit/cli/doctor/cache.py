"""The folder of compiled kernels, and what was tuned."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from epjit.cli import show
from epjit.cli.doctor.check import Check, Section

_CACHE = Section("cache")


def check_cache() -> Iterator[Check]:
    """Whether kernels can be kept, and there is room."""
    from epjit import tuned
    from epjit.runtime.cache import CubinCache

    cache = CubinCache()
    try:
        cache.prepare()
    except OSError as error:
        remedy = "set EPJIT_CACHE_DIR to a folder of your own that can be written"
        yield _CACHE.wrong("folder", str(error), remedy)
        return
    stored = cache.stored()
    total = sum(each.num_bytes for each in stored)
    free = shutil.disk_usage(cache.directory).free
    yield _CACHE.expect(
        "folder",
        free > 1 << 30,
        f"{cache.directory}: {len(stored)} kernels, {show.size(total)}; {show.size(free)} free",
        remedy="make room, or set EPJIT_CACHE_DIR to another disk",
    )
    damaged = sum(each.entry is None for each in stored)
    if damaged:
        remedy = "they are compiled again when needed; python -m epjit cache clear removes them"
        yield _CACHE.warning("damaged entries", str(damaged), remedy)
    shapes = sorted({(each.gpu, each.num_ranks) for each in tuned.load()})
    groups = "; ".join(f"{gpu} x {ranks}" for gpu, ranks in shapes)
    yield _CACHE.ok("tuned", groups or "nothing: V1's default configs")
