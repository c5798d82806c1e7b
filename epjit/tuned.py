"""Winners of `python -m epjit tune`: the fastest settings for a GPU, a group size and a shape.

One JSON file in the cache folder, written under a lock. It is read once a process, when a config
or a variant is first asked for; without the file nothing else happens.

A winner holds for shapes like the one it was measured with: rows of half to twice the size, and a
quarter to four times the tokens. For all others there are V1's defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from epjit.runtime.cache import cache_folder, lock, publish

MOST_ROWS_FACTOR = 2.0
"""How many times longer or shorter rows may be than those that were measured."""
MOST_TOKENS_FACTOR = 4.0
"""The same for the number of tokens."""

_log = logging.getLogger(__name__)
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
        us: Its time in microseconds.
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
        """Key of a winner: there is one for each."""
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
        everything = [dataclasses.asdict(each) for each in known.values()]
        text = json.dumps({"format": _FORMAT, "winners": everything}, indent=1)
        publish(file, text.encode())
    _forget()
    return file


def clear() -> bool:
    """Deletes the file.

    Returns:
        Whether there was one.

    Raises:
        OSError: The cache folder cannot be written.
    """
    file = path()
    found = file.exists()
    if found:
        with lock(file.with_suffix(".lock"), seconds=_LOCK_SECONDS):
            file.unlink(missing_ok=True)
    _forget()
    return found


@functools.lru_cache(maxsize=1024)
def best(
    op: str, *, gpu: str, num_ranks: int, hidden_bytes: int, num_tokens: int = 0
) -> Tuned | None:
    """The winner for a shape, or for the nearest one that is like it.

    Args:
        op: ``"dispatch"`` or ``"combine"``.
        gpu: Product name.
        num_ranks: Size of the group.
        hidden_bytes: Bytes of one row.
        num_tokens: Tokens of each rank; 0 = any number: the most that were tuned decide.

    Returns:
        None when nothing like it was tuned for this operation, GPU and number of ranks.
    """

    def distance(each: Tuned) -> tuple[float, float]:
        rows = abs(math.log2(each.hidden_bytes / hidden_bytes)) if hidden_bytes else math.inf
        tokens = abs(math.log2(each.num_tokens / num_tokens)) if num_tokens else -each.num_tokens
        return rows, tokens

    limits = math.log2(MOST_ROWS_FACTOR), math.log2(MOST_TOKENS_FACTOR)
    like = [
        each
        for each in load()
        if (each.op, each.gpu, each.num_ranks) == (op, gpu, num_ranks)
        and all(found <= most for found, most in zip(distance(each), limits, strict=True))
    ]
    found = min(like, key=distance, default=None)
    if found is not None:
        _say(found)
    return found


@functools.cache  # once for each winner
def _say(used: Tuned) -> None:
    _log.info(
        "%s of %d ranks takes what was tuned for %d tokens of %d bytes: %d SMs, variant %s (%s)",
        used.op,
        used.num_ranks,
        used.num_tokens,
        used.hidden_bytes,
        used.num_sms,
        used.variant,
        path(),
    )


def _forget() -> None:
    """Drops what this process has read: the file says something else now."""
    load.cache_clear()
    best.cache_clear()


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
