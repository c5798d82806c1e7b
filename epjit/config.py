"""`Config`: how many SMs an operation uses, and the buffer sizes that follow from V1's settings."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from epjit import env
from epjit.numbers import as_int
from epjit.runtime import topology
from epjit.sizes import align

# The limits of one call.
MAX_RANKS = topology.MAX_LOCAL  # of one NVLink domain
MAX_DOMAINS = topology.MAX_DOMAINS
MAX_GROUP = MAX_RANKS * MAX_DOMAINS
MAX_EXPERTS_BY_EXPERT = (
    2048  # of all ranks, in calls on rows by expert (layout.cu: masks in shared)
)
MAX_TOKENS = (1 << 24) - 2  # a word of the protocol has 24 bits for a position (sync.cuh)
MAX_TOPK = 32  # one lane of a warp a choice
MAX_ROW_BYTES = 32768
MAX_EXPERTS = 65536
MAX_LOCAL_EXPERTS = 8192  # of one rank
MAX_LOCAL_EXPERTS_BETWEEN_DOMAINS = 1024  # bounds what the ranks tell each other before a dispatch
# The limits of one low-latency call.
MAX_LOW_LATENCY_EXPERTS = 8192
MAX_LOW_LATENCY_TOKENS = 262144  # of all ranks, at their maximum
# Of one rank, at its maximum of tokens; kPositionBits of low_latency/dispatch.cu counts as far.
MAX_LOW_LATENCY_CHOICES = 131072

# V1's hint leaves room for this much beside each row, whatever is really sent.
_V1_MAX_TOPK = 128
_V1_MAX_SCALES = 128
_ROW_METADATA_BYTES = 8 + _V1_MAX_TOPK * (8 + 4) + _V1_MAX_SCALES * 4
_RDMA_METADATA_BYTES = 16
# The least that the kernels work with: two windows of eight rows for each rank.
_MIN_ROWS_A_RANK = 16
_SLOT_EXTRA_BYTES = 512  # what a low-latency slot may have beside the 2 * H bytes of a row


def check_row_bytes(what: str, row_bytes: int, *, most: int | None = MAX_ROW_BYTES) -> None:
    """Checks the length of rows, which are moved in pieces of 16 bytes.

    Args:
        what: Says whose rows have how many bytes, for the message.
        row_bytes: The length.
        most: The greatest that is allowed; None allows all.

    Raises:
        ValueError: No rows have this length.
    """
    if row_bytes <= 0 or row_bytes % 16 or (most is not None and row_bytes > most):
        limit = "" if most is None else f", at most {most}"
        raise ValueError(f"{what}, but must have a multiple of 16{limit}")


@dataclass(frozen=True)
class Config:
    """Settings of dispatch and combine, as DeepEP V1 has them.

    epjit has no queues with chunks: of these only `num_sms` changes what runs. The chunk sizes are
    checked, and set the size hints as they do in V1.

    Args:
        num_sms: SMs (blocks) that a kernel takes; even when used.
        num_max_nvl_chunked_send_tokens: V1's NVLink send chunk, in tokens.
        num_max_nvl_chunked_recv_tokens: V1's NVLink receive queue, in tokens.
        num_max_rdma_chunked_send_tokens: V1's RDMA send chunk, in tokens.
        num_max_rdma_chunked_recv_tokens: V1's RDMA receive queue, in tokens; rounded up to a
            multiple of the send chunk.

    Raises:
        TypeError: A value that is no int.
        ValueError: A value that V1 refuses.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        """Checks the values; all reasons at once."""
        for field in fields(self):
            number = as_int(f"Config: {field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, number)
        nvl_send, nvl_recv = (
            self.num_max_nvl_chunked_send_tokens,
            self.num_max_nvl_chunked_recv_tokens,
        )
        rdma_send, rdma_recv = (
            self.num_max_rdma_chunked_send_tokens,
            self.num_max_rdma_chunked_recv_tokens,
        )
        reasons = []
        if self.num_sms < 0:
            reasons.append(f"num_sms is {self.num_sms}, but must not be negative")
        if nvl_send <= 0 or nvl_recv <= nvl_send:
            reasons.append(
                f"the NVLink chunks are {nvl_send} (send) and {nvl_recv} (receive), "
                "but must satisfy 0 < send < receive"
            )
        if rdma_send <= 0 or rdma_send > rdma_recv // 2 or rdma_send >= rdma_recv:
            reasons.append(
                f"the RDMA chunks are {rdma_send} (send) and {rdma_recv} (receive), "
                "but must satisfy 0 < send <= receive / 2"
            )
        if reasons:
            raise ValueError("Config: " + "; ".join(reasons))
        rounded = align(rdma_recv, rdma_send)
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", rounded)

    def get_nvl_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int, *, ranks_per_domain: int | None = None
    ) -> int:
        """Bytes for `num_nvl_bytes` that any dispatch or combine with this config can work with.

        The value is V1's: channels x ranks of a domain x receive chunk x (row and what travels with
        it). Any smaller or larger multiple of 128 is accepted too; a larger one saves waits.

        Args:
            hidden_bytes: Bytes of one row.
            num_ranks: Ranks of the group.
            ranks_per_domain: Ranks that share NVLink; None is ``EPJIT_NVLINK_DOMAIN``, else 8.

        Returns:
            A multiple of 128.
        """
        hidden_bytes, num_ranks = _sizes(hidden_bytes, num_ranks)
        num_channels = max(self.num_sms // 2, 1)
        num_nvl_ranks = min(num_ranks, _ranks_per_domain(ranks_per_domain))
        rows = max(num_channels * self.num_max_nvl_chunked_recv_tokens, _MIN_ROWS_A_RANK)
        return align(num_nvl_ranks * rows * (hidden_bytes + _ROW_METADATA_BYTES))

    def get_rdma_buffer_size_hint(
        self, hidden_bytes: int, num_ranks: int, *, ranks_per_domain: int | None = None
    ) -> int:
        """Bytes for `num_rdma_bytes`: 0 for ranks that share one NVLink domain.

        Else the value is V1's: twice (rows that leave and rows that come) channels x domains x
        receive chunk x (row and what travels with it). Other multiples of 128 are accepted too.

        Args:
            hidden_bytes: Bytes of one row.
            num_ranks: Ranks of the group.
            ranks_per_domain: Ranks that share NVLink; None is ``EPJIT_NVLINK_DOMAIN``, else 8.

        Returns:
            A multiple of 128.
        """
        hidden_bytes, num_ranks = _sizes(hidden_bytes, num_ranks)
        a_domain = _ranks_per_domain(ranks_per_domain)
        if num_ranks <= a_domain:
            return 0
        num_domains = -(-num_ranks // a_domain)
        rows = max(self.num_sms // 2, 1) * num_domains * self.num_max_rdma_chunked_recv_tokens
        return align(2 * rows * (hidden_bytes + _ROW_METADATA_BYTES + _RDMA_METADATA_BYTES))


def low_latency_size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes that dispatch and combine need for these sizes, in any format and for any top-k.

    Half of them hold rows that arrive, for calls with even and odd numbers; the other half is the
    buffer of `get_next_low_latency_combine_buffer`. Between NVLink domains a Buffer takes as much
    again, where rows are staged that leave.

    Args:
        max_tokens: `M`.
        hidden: `H`.
        num_ranks: `R`.
        num_experts: `E`.

    Returns:
        A multiple of 128 that grows with each argument.
    """
    row_bytes = 2 * hidden
    arriving = max(
        num_ranks * max_tokens * (row_bytes + _SLOT_EXTRA_BYTES), max_tokens * MAX_TOPK * row_bytes
    )
    return max(2 * align(num_experts * max_tokens * row_bytes), 4 * align(arriving))


# V1's defaults, (NVLink send, NVLink receive, RDMA send, RDMA receive) by ranks: of a number that
# is not here, those of the next smaller one.
_DISPATCH_CHUNKS = {
    1: (24, 256, 6, 128),
    3: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE_CHUNKS = {
    1: (10, 256, 6, 128),
    3: (9, 256, 6, 128),
    5: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
}


@functools.lru_cache(maxsize=1024)  # callers ask in every call
def default_dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """V1's default settings for dispatch, for any number of ranks up to 256."""
    return Config(num_sms, *_chunks(_DISPATCH_CHUNKS, num_ranks))


@functools.lru_cache(maxsize=1024)
def default_combine_config(num_ranks: int, num_sms: int) -> Config:
    """V1's default settings for combine, for any number of ranks up to 256."""
    return Config(num_sms, *_chunks(_COMBINE_CHUNKS, num_ranks))


def _chunks(table: dict[int, tuple[int, int, int, int]], num_ranks: int) -> tuple[int, ...]:
    if not 1 <= num_ranks <= MAX_GROUP:
        raise AssertionError(
            f"there is no config for {num_ranks} ranks; epjit has 1 to {MAX_GROUP}"
        )
    return table[max(ranks for ranks in table if ranks <= num_ranks)]


def _sizes(hidden_bytes: int, num_ranks: int) -> tuple[int, int]:
    return as_int("hidden_bytes", hidden_bytes, least=0), as_int("num_ranks", num_ranks, least=1)


def _ranks_per_domain(given: int | None) -> int:
    if given is None:
        given = min(env.nvlink_domain() or MAX_RANKS, MAX_RANKS)
    value = as_int("ranks_per_domain", given)
    if not 1 <= value <= MAX_RANKS:
        raise ValueError(
            f"ranks_per_domain is {value}, but an NVLink domain has 1 to {MAX_RANKS} ranks"
        )
    return value
