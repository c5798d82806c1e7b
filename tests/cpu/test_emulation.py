"""The emulation of CUDA on the CPU: what it gives kernels, and that it catches wrong ones."""

from __future__ import annotations

import ctypes
import re
import shutil
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tests.emulation import build
from tests.emulation.build import EmulationError, Launch, emulate, guarded

pytestmark = pytest.mark.skipif(shutil.which(build.COMPILER) is None, reason="needs g++")

NUM_WARPS = 4
ROW_BYTES = 96
SOURCE = (build.HERE / "selftest.cu").read_text()
CASES = re.findall(r"\bk\w+", re.search(r"enum Case[^{]*{([^}]*)}", SOURCE)[1])  # type: ignore[index]


class SelftestParams(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("dst", ctypes.c_uint64),
        ("own", ctypes.c_uint64),
        ("next", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_uint64),
        ("transport", ctypes.c_uint64),
        ("num_rows", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("pe", ctypes.c_int32),
    )


@dataclass(frozen=True)
class SelftestConfig:
    source: ClassVar[str] = "selftest.cu"
    op: ClassVar[str] = "selftest"
    num_warps: int = NUM_WARPS
    row_bytes: int = ROW_BYTES

    @property
    def threads(self) -> int:
        return self.num_warps * 32

    @property
    def shared_bytes(self) -> int:
        return self.num_warps * (self.row_bytes + 16)


def selftest(
    kind: str, *, rank: int = 0, grid: int = 1, num_warps: int = NUM_WARPS, **values: Any
) -> Launch:
    params = SelftestParams(kind=CASES.index(kind), rank=rank)
    for name, value in values.items():
        setattr(params, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
    config = SelftestConfig(num_warps=num_warps)
    return Launch(config, params, grid=grid, rank=rank, include=build.HERE)


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def test_indices_of_two_ranks() -> None:
    outs = [words(3 * 128) for _ in range(2)]
    emulate([selftest("kIndices", rank=r, grid=3, out=outs[r]) for r in range(2)])
    for rank, out in enumerate(outs):
        expected = [rank * 1000000 + 3 * 10000 + b * 1000 + t for b in range(3) for t in range(128)]
        assert out.tolist() == expected


@pytest.mark.parametrize("seed", range(9))
def test_collectives(seed: int) -> None:
    out = words(32, 16)
    emulate([selftest("kCollectives", num_warps=1, out=out)], seed=seed)
    for lane, row in enumerate(out.tolist()):
        assert row[:13] == [
            105,
            100 + lane // 8 * 8 + (lane + 1) % 8,
            100 + (lane - 3 if lane >= 3 else lane),
            100 + (lane + 3 if lane < 29 else lane),
            100 + (lane ^ 9),
            sum(1 << i for i in range(0, 32, 3)),
            1,
            0,
            sum(100 + i for i in range(32)),
            0xAAAA if lane < 16 else 0x11110000,
            102 if lane < 16 else 120,
            7,
            7,
        ]
        if lane < 24:
            assert row[13] == 0xFFFFFF


@pytest.mark.parametrize("seed", range(3))
def test_atomics(seed: int) -> None:
    out = words(3)
    emulate([selftest("kAtomics", grid=5, out=out)], seed=seed)
    assert out[0] == 5 * 128
    assert out[1] == 2 * 5 * 128
    assert 100 <= out[2] < 228


def test_seed_decides_the_order_and_only_the_seed() -> None:
    winners = []
    for seed in [0, 3, 6, 9, 0]:
        out = words(3)
        emulate([selftest("kAtomics", grid=2, out=out)], seed=seed)
        winners.append(int(out[2]))
    assert winners[0] == winners[-1]
    assert len(set(winners)) > 1


def test_plain_accesses_interleave() -> None:
    out = words(1)
    emulate([selftest("kPlainIncrement", out=out)], seed=1, basic_blocks=20)
    assert 20 <= out[0] < 20 * 128  # increments are lost
    out = words(1)
    emulate([selftest("kPlainIncrement", out=out)], seed=1, basic_blocks=0)
    assert out[0] == 20 * 128


def run_copy(kind: str, seed: int) -> tuple[bool, int]:
    """(rows are right at the end, bytes that the consumer saw wrong)."""
    num_rows = 37
    src = guarded(num_rows, ROW_BYTES, dtype=torch.uint8)
    src.random_(generator=torch.Generator().manual_seed(seed))
    dst, out = guarded(num_rows, ROW_BYTES, dtype=torch.uint8), words(1)
    own = torch.zeros(num_rows, dtype=torch.int64)
    own[2:] = 1
    shared = {"src": src, "dst": dst, "own": own, "out": out, "num_rows": num_rows}
    producer = selftest(kind, rank=0, grid=2, **shared)
    consumer = selftest(kind, rank=1, grid=1, **shared)
    emulate([producer, consumer], seed=seed)
    return torch.equal(dst, src ^ 0x5A), int(out[0])


@pytest.mark.parametrize("seed", range(6))
def test_bulk_copy(seed: int) -> None:
    assert run_copy("kCopy", seed) == (True, 0)


@pytest.mark.parametrize("seed", range(3))
def test_bulk_copy_without_waits_is_seen(seed: int) -> None:
    with pytest.raises(EmulationError, match="more arrivals than the 1 of a phase"):
        run_copy("kCopyNoLoadWait", seed)
    is_right, num_wrong = run_copy("kCopyNoStoreWait", seed)
    assert is_right  # at the end of the kernel
    assert num_wrong > 0  # but not when it was published
    is_right, _ = run_copy("kCopyNoReadWait", seed)
    assert not is_right


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("kCopyNoCommit", "ends while a bulk store still reads"),
        ("kCopyMisaligned", "not 16-byte aligned"),
        ("kCopyOddSize", "not a multiple of 16"),
        ("kCopyOutside", "not within the block's shared memory"),
        ("kNoBarrierInit", "not initialised"),
    ],
)
def test_misuse_of_bulk_copies_is_named(kind: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message) as caught:
        run_copy(kind, 0)
    assert "rank 0, selftest, block" in str(caught.value)


def run_put(kind: str, seed: int, **options: Any) -> int:
    """Bytes that the second rank saw wrong when their signals were there; pes are 1 and 0."""
    num_rows, out = 17, words(1)
    rows = [guarded(num_rows, ROW_BYTES, dtype=torch.uint8) for _ in range(2)]
    sources = [guarded(NUM_WARPS, ROW_BYTES, dtype=torch.uint8) for _ in range(2)]
    signals = [guarded(num_rows, dtype=torch.int64, fill=0) for _ in range(2)]
    records = build.transport([rows, sources, signals], pes=[1, 0])
    launches = [
        selftest(
            kind,
            rank=rank,
            src=sources[rank],
            dst=rows[rank],
            own=signals[rank],
            out=out,
            num_rows=num_rows,
            transport=records[rank],
            pe=rank,
        )
        for rank in range(2)
    ]
    emulate(launches, seed=seed, **options)
    assert signals[1].tolist() == [1] * num_rows
    return int(out[0])


@pytest.mark.parametrize("seed", range(6))
def test_put_and_what_it_promises(seed: int) -> None:
    assert run_put("kPut", seed) == 0
    assert run_put("kPutFence", seed) == 0
    assert run_put("kPut", seed, latest_message=0) == 0


@pytest.mark.parametrize("kind", ["kPutNoQuiet", "kPutFillsLate", "kPutNoFence", "kPutOtherThread"])
def test_put_without_what_it_needs_is_seen(kind: str) -> None:
    """A source that changes too early or is filled too late, a signal that no fence holds back."""
    wrong = [run_put(kind, seed, is_lossy=True) for seed in range(6)]
    assert max(wrong) > 0
    again = [run_put(kind, seed, is_lossy=True) for seed in range(6)]
    assert wrong == again  # the seed decides all of it


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("kPutNoQuiet", "epjit_put_signal of rank 0, selftest: its source, .* was written before"),
        ("kPutFillsLate", "its source, .* was written before it was read"),
        ("kPutTwice", "what was sent before to signal .* of pe 0 has not come"),
        ("kPutNotReceived", "rank 1, selftest, .* reads .* has put, before epjit_received"),
    ],
)
def test_put_that_needs_luck_is_an_error(kind: str, message: str) -> None:
    for seed in range(6):
        with pytest.raises(EmulationError, match=message):
            run_put(kind, seed)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("kPutUnequal", "lane 7 does not call it with the arguments of lane"),
        ("kPutOutside", "does not lie in symmetric memory of this rank"),
        ("kPutMisaligned", "all must be multiples of 16"),
    ],
)
def test_misuse_of_put_is_named(kind: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message) as caught:
        run_put(kind, 0)
    assert "rank 0, selftest, block 0, thread" in str(caught.value)
    assert "epjit_put_signal" in str(caught.value)
    if shutil.which("addr2line"):
        assert re.search(r"selftest\.cu:\d+", str(caught.value))


def ring(size: int, present: list[int], *, timeout_ns: int, **options: Any) -> list[int]:
    signals = torch.zeros(size, dtype=torch.int64)
    outs = [words(1) + 7 for _ in range(size)]
    launches = [
        selftest(
            "kRing",
            rank=r,
            grid=1,
            own=signals[r : r + 1],
            next=signals[(r + 1) % size :],
            timeout_ns=timeout_ns,
            out=outs[r],
        )
        for r in present
    ]
    emulate(launches, **options)
    return [int(out[0]) for out in outs]


@pytest.mark.parametrize("seed", range(6))
def test_ranks_meet(seed: int) -> None:
    assert ring(4, [0, 1, 2, 3], timeout_ns=10**9, seed=seed) == [0] * 4


def test_delayed_rank_is_waited_for() -> None:
    options = {"seed": 1, "delay": {2: 50_000}}
    assert ring(4, [0, 1, 2, 3], timeout_ns=10**9, **options) == [0] * 4
    assert ring(4, [0, 1, 2, 3], timeout_ns=100_000, **options)[0] == 1  # 10 ns a pass


def test_withheld_rank_runs_into_the_timeout() -> None:
    assert ring(4, [0, 1, 3], timeout_ns=50_000) == [1, 1, 7, 1]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("kWarpAgainstBlock", "deadlock: threads of rank 0, selftest, block 0 can never go on"),
        ("kDivergentShuffle", "a shuffle with mask 0xffffffff meets lane"),
        ("kShuffleFromOutside", "shuffle reads lane 20, which mask 0xffff does not name"),
        ("kPollForever", "not finished after 20000 passes"),
        ("kBarrierOfHalf", "waits in __syncthreads at"),
        ("kOverrun", "which is not mapped"),
        ("kBadShift", "undefined behaviour"),
        ("kMisalignedVector", "not 16-byte aligned"),
    ],
)
def test_wrong_kernels_are_named(kind: str, message: str) -> None:
    out = guarded(128, dtype=torch.int32)
    signal = torch.zeros(1, dtype=torch.int64)
    buffer = torch.zeros(64, dtype=torch.uint8)
    launch = selftest(kind, out=out, own=signal, src=buffer, dst=buffer, num_rows=128)
    with pytest.raises(EmulationError, match=message) as caught:
        emulate([launch], max_passes=20_000)
    if shutil.which("addr2line"):
        assert re.search(r"selftest\.cu:\d+", str(caught.value))


@pytest.mark.parametrize("seed", range(6))
def test_barriers_order_shared_memory(seed: int) -> None:
    out = words(128)
    emulate([selftest("kExchange", out=out)], seed=seed)
    expected = [t // 32 * 32 + (t + 1) % 32 + (t + 32) % 128 + 128 for t in range(128)]
    assert out.tolist() == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["kReadRace", "kWriteRace", "kWarpRace", "kAtomicRace"])
def test_races_in_shared_memory_are_named(kind: str, seed: int) -> None:
    with pytest.raises(EmulationError, match=r"race: (reads|writes) byte \d+ of shared") as caught:
        emulate([selftest(kind, out=words(128))], seed=seed)
    if shutil.which("addr2line"):
        assert re.search(r"selftest\.cu:\d+", str(caught.value))


def test_after_a_failure_the_next_run_is_clean() -> None:
    signal = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(EmulationError):
        emulate([selftest("kPollForever", own=signal)], max_passes=1000)
    out = words(128)
    emulate([selftest("kIndices", out=out)])
    assert out[5] == 10005


def test_conversions_round_to_nearest_even() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64, generator=generator)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    between = (halves[:-1].float() + halves[1:].float()) / 2
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0, 1e-8])
    values = torch.cat([bits.to(torch.int32).view(torch.float32), halves.float(), between, special])
    values = torch.cat([values, torch.tensor([2.0**-25, 1.5 * 2.0**-25, 3.39e38])])
    values = values[: values.numel() // 2 * 2].contiguous()
    pairs = values.numel() // 2
    out = words(pairs, 6)
    emulate([selftest("kConvert", out=out, src=values, num_rows=pairs)])

    bf16 = out[:, 0].contiguous().view(torch.bfloat16)
    f16 = out[:, 1].contiguous().view(torch.float16)
    widened = out[:, 2:].contiguous().view(torch.float32)
    for got, expected in [
        (bf16, values.to(torch.bfloat16)),
        (f16, values.to(torch.float16)),
        (widened[:, :2].flatten(), values.to(torch.bfloat16).float()),
        (widened[:, 2:].flatten(), values.to(torch.float16).float()),
    ]:
        is_nan = expected.isnan()
        assert torch.equal(got.isnan(), is_nan)
        integer = torch.int16 if got.dtype.itemsize == 2 else torch.int32
        assert torch.equal(got.view(integer)[~is_nan], expected.view(integer)[~is_nan])
