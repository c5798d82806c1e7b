"""`Config`: how many SMs an operation uses, and the buffer sizes that follow from V1's settings."""

from __future__ import annotations

from dataclasses import dataclass

# The limits of one call.
MAX_RANKS = 8  # of one NVLink domain
MAX_DOMAINS = 32
MAX_TOKENS = (1 << 24) - 2  # a word of the protocol has 24 bits for a position (sync.cuh)
MAX_TOPK = 32  # one lane of a warp a choice
MAX_ROW_BYTES = 32768
MAX_EXPERTS = 65536
MAX_LOCAL_EXPERTS = 8192  # of one rank
# The limits of one low-latency call.
MAX_LOW_LATENCY_EXPERTS = 8192
MAX_LOW_LATENCY_TOKENS = 65536  # of all ranks, at their maximum
MAX_LOW_LATENCY_CHOICES = 131072  # of one rank, at its maximum of tokens

_ALIGNMENT = 128
# V1's hint leaves room for this much beside each row, whatever is really sent.
_MAX_TOPK = 128
_MAX_SCALES = 128
_ROW_METADATA_BYTES = 8 + _MAX_TOPK * 8 + _MAX_TOPK * 4 + _MAX_SCALES * 4
# The least that the kernels work with: two windows of eight rows for each rank.
_MIN_ROWS_A_RANK = 16


@dataclass(frozen=True)
class Config:
    """Settings of dispatch and combine, as DeepEP V1 has them.

    epjit has no queues with chunks inside an NVLink domain: of these only `num_sms` changes what
    runs there. The chunk sizes are checked, and set the size hints as they do in V1.

    Args:
        num_sms: SMs (blocks) that a kernel takes; even when used.
        num_max_nvl_chunked_send_tokens: V1's NVLink send chunk, in tokens.
        num_max_nvl_chunked_recv_tokens: V1's NVLink receive queue, in tokens.
        num_max_rdma_chunked_send_tokens: V1's RDMA send chunk, in tokens.
        num_max_rdma_chunked_recv_tokens: V1's RDMA receive queue, in tokens; rounded up to a
            multiple of the send chunk.

    Raises:
        ValueError: A value that V1 refuses.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        """Checks the values; all reasons at once."""
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
        rounded = -(-rdma_recv // rdma_send) * rdma_send
        object.__setattr__(self, "num_max_rdma_chunked_recv_tokens", rounded)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for `num_nvl_bytes` that any dispatch or combine with this config can work with.

        The value is V1's: channels x ranks x receive chunk x (row and what travels with it). Any
        smaller or larger multiple of 128 is accepted too; a larger one saves waits.

        Args:
            hidden_bytes: Bytes of one row.
            num_ranks: Ranks of the group.

        Returns:
            A multiple of 128.
        """
        num_channels = max(self.num_sms // 2, 1)
        num_nvl_ranks = min(num_ranks, MAX_RANKS)
        rows = max(num_channels * self.num_max_nvl_chunked_recv_tokens, _MIN_ROWS_A_RANK)
        size = num_nvl_ranks * rows * (hidden_bytes + _ROW_METADATA_BYTES)
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for `num_rdma_bytes`: 0 for up to eight ranks, which share one NVLink domain.

        Args:
            hidden_bytes: Bytes of one row.
            num_ranks: Ranks of the group.

        Raises:
            NotImplementedError: More than eight ranks: there is no mode between nodes yet.
        """
        if num_ranks <= MAX_RANKS:
            return 0
        raise NotImplementedError(
            f"{num_ranks} ranks of {hidden_bytes}-byte rows need the mode between nodes, which "
            "this version of epjit does not have; use up to 8 ranks of one NVLink domain"
        )


def default_dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """V1's default settings for dispatch, for any number of ranks up to eight."""
    _check_num_ranks(num_ranks)
    return Config(num_sms, 24 if num_ranks <= 2 else 6, 256, 6, 128)


def default_combine_config(num_ranks: int, num_sms: int) -> Config:
    """V1's default settings for combine, for any number of ranks up to eight."""
    _check_num_ranks(num_ranks)
    return Config(num_sms, 10 if num_ranks <= 2 else 9 if num_ranks <= 4 else 4, 256, 6, 128)


def _check_num_ranks(num_ranks: int) -> None:
    if not 1 <= num_ranks <= MAX_RANKS:
        raise AssertionError(
            f"there is no config for {num_ranks} ranks; this version of epjit has 1 to 8"
        )
