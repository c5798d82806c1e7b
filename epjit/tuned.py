"""What `python -m epjit tune` found: the fastest settings for a GPU, a group size and a shape.

One JSON file in the cache folder, written under a lock. It is read once a process, when a config
or a variant is first asked for; without the file nothing else happens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from epjit.runtime.cache import cache_folder, lock

CPU = "CPU backend"
"""What stands for the product name where there is no GPU."""

_FORMAT = 1
_LOCK_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The winner for one operation and shape.

    Attributes:
        gpu: Product name, such as ``"NVIDIA H200"``.
        op: ``"dispatch"`` or ``"combine"``.
        num_ranks: Size of the group.
        hidden_bytes: Bytes of one row.
        num_tokens: Tokens of each rank.
        num_sms: SMs of the winner.
        variant: Its implementation.
        us: What it took, in microseconds.
        version: epjit that measured it.
    """

    gpu: str
    op: str
    num_ranks: int
    hidden_bytes: int
    num_tokens: int
    num_sms: int
    variant: str
    us: float
    version: str

    @property
    def shape(self) -> tuple[str, str, int, int, int]:
        """What there is one winner for."""
        return self.gpu, self.op, self.num_ranks, self.hidden_bytes, self.num_tokens


def path() -> Path:
    """The file."""
    return cache_folder() / "tuned.json"


@functools.cache
def load() -> tuple[Tuned, ...]:
    """All winners; empty, with a warning, when the file cannot be read."""
    try:
        return _read(path())
    except FileNotFoundError:  # or there is no home folder to have one
        return ()
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path()} cannot be used ({error}), so the default configs are; remove it, and run "
            "`python -m epjit tune` again",
            stacklevel=2,
        )
        return ()


def store(winners: Iterable[Tuned]) -> Path:
    """Adds winners to the file; those of the same shape are replaced.

    Returns:
        The file.

    Raises:
        OSError: The cache folder cannot be written.
    """
    file = path()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock(file.with_suffix(".lock"), seconds=_LOCK_SECONDS):
        try:
            known = {each.shape: each for each in _read(file)}
        except (FileNotFoundError, ValueError):
            known = {}
        known |= {each.shape: each for each in winners}
        text = json.dumps(
            {"format": _FORMAT, "winners": [dataclasses.asdict(each) for each in known.values()]},
            indent=1,
        )
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix="tuned-")
        with os.fdopen(descriptor, "w") as stream:
            stream.write(text)
        os.replace(temporary, file)
    load.cache_clear()
    best.cache_clear()
    return file


@functools.lru_cache(maxsize=1024)
def best(
    op: str, *, gpu: str, num_ranks: int, hidden_bytes: int = 0, num_tokens: int = 0
) -> Tuned | None:
    """The winner for a shape, or for the nearest one that was tuned.

    Args:
        op: ``"dispatch"`` or ``"combine"``.
        gpu: Product name.
        num_ranks: Size of the group.
        hidden_bytes: Bytes of one row; 0 = any.
        num_tokens: Tokens of each rank; 0 = the most that were tuned.

    Returns:
        None when nothing was tuned for this operation, GPU and number of ranks.
    """
    known = [e for e in load() if (e.op, e.gpu, e.num_ranks) == (op, gpu, num_ranks)]

    def distance(each: Tuned) -> tuple[float, float]:
        rows = abs(math.log2(each.hidden_bytes / hidden_bytes)) if hidden_bytes else 0.0
        tokens = abs(math.log2(each.num_tokens / num_tokens)) if num_tokens else -each.num_tokens
        return rows, tokens

    return min(known, key=distance, default=None)


def _read(file: Path) -> tuple[Tuned, ...]:
    content = json.loads(file.read_text())
    try:
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        winners = tuple(Tuned(**each) for each in content["winners"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not what `epjit tune` writes: {error}") from error
    for each in winners:
        numbers = (each.num_ranks, each.hidden_bytes, each.num_tokens, each.num_sms)
        if not all(isinstance(number, int) and number > 0 for number in numbers):
            raise ValueError(f"an entry has numbers that are not positive: {each}")
    return winners
