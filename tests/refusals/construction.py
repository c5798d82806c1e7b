"""A `Buffer` and a `Config` that are not made."""

from __future__ import annotations

from typing import Any

from epjit import Buffer, Config
from tests.refusals.table import Refusal, StubComm, assertion_error, value_error


def _buffer(size: int, *args: Any, **kwargs: Any) -> Buffer:
    """Refused for what every rank knows by itself."""
    return Buffer(None, *args, comm=StubComm(size), **kwargs)


def _placed(size: int, *args: Any, **kwargs: Any) -> Buffer:
    """Refused once it is known that all ranks are on one host."""
    return Buffer(None, *args, comm=StubComm(size, answers=1), **kwargs)


CONSTRUCTION: dict[str, Refusal] = {
    "no group": value_error(lambda _: Buffer(None), r"group is None.*comm="),
    "nvl size": value_error(lambda _: _buffer(2, 100), r"num_nvl_bytes is 100.*multiple of 128"),
    "negative nvl size": value_error(
        lambda _: _buffer(2, -128), r"num_nvl_bytes is -128.*not negative"
    ),
    "rdma size": value_error(lambda _: _buffer(2, 0, 77), r"num_rdma_bytes is 77.*multiple of 128"),
    "negative rdma size": value_error(
        lambda _: _buffer(2, 0, -256), r"num_rdma_bytes is -256.*not negative"
    ),
    "both sizes": value_error(
        lambda _: _buffer(2, 1, 2), r"num_nvl_bytes is 1\b.*num_rdma_bytes is 2\b"
    ),
    "rdma in one domain": value_error(
        lambda _: _placed(2, 0, 128),
        r"num_rdma_bytes is 128, but 2 ranks share.*pass 0.*low_latency_mode=True",
    ),
    "low latency size": value_error(
        lambda _: _buffer(2, 0, 100, low_latency_mode=True),
        r"num_rdma_bytes is 100.*multiple of 128",
    ),
    "low latency of nine ranks": value_error(
        lambda _: _placed(9, 0, 128, low_latency_mode=True),
        r"9 ranks are in one NVLink domain.*up to 8.*EPJIT_NVLINK_DOMAIN",
    ),
    "nine ranks": value_error(lambda _: _placed(9, 0), r"9 ranks are in one.*nvlink_domain"),
    "sixteen ranks and rdma": value_error(
        lambda _: _placed(16, 0, 128), r"16 ranks are in one.*num_rdma_bytes is 128"
    ),
    "257 ranks": value_error(lambda _: _buffer(257, 0), r"257 ranks.*up to 256"),
    "negative domain": value_error(
        lambda _: _buffer(2, 0, nvlink_domain=-1), r"nvlink_domain is -1.*number of ranks"
    ),
    "uneven domains": value_error(
        lambda _: _placed(5, 0, nvlink_domain=2), r"different sizes.*divides.*domain 2: ranks 4"
    ),
    "33 domains": value_error(
        lambda _: _placed(33, 0, nvlink_domain=1), r"are 33, but 32 is the most"
    ),
    "no queue pair between domains": value_error(
        lambda _: _placed(2, 0, nvlink_domain=1, num_qps_per_rank=0),
        r"num_qps_per_rank is 0.*at least 1",
    ),
    "no queue pair in low latency": value_error(
        lambda _: _placed(2, 0, 128, low_latency_mode=True, num_qps_per_rank=-3),
        r"num_qps_per_rank is -3.*at least 1",
    ),
}


CONFIG: dict[str, Refusal] = {
    "negative sms": value_error(lambda _: Config(-2), r"num_sms is -2.*not be negative"),
    "nvl send 0": value_error(
        lambda _: Config(20, 0, 256), r"0 \(send\) and 256.*0 < send < receive"
    ),
    "nvl send = receive": value_error(
        lambda _: Config(20, 8, 8), r"8 \(send\) and 8.*send < receive"
    ),
    "rdma send 0": value_error(
        lambda _: Config(20, 6, 256, 0, 128), r"0 \(send\) and 128.*receive / 2"
    ),
    "rdma send > half": value_error(
        lambda _: Config(20, 6, 256, 6, 11), r"6 \(send\) and 11.*receive / 2"
    ),
    "several": value_error(lambda _: Config(-2, 9, 9), r"num_sms is -2.*9 \(send\) and 9"),
    "odd sms": assertion_error(lambda _: Buffer.set_num_sms(7), r"even, got 7"),
    "dispatch config": assertion_error(
        lambda _: Buffer.get_dispatch_config(257), r"257 ranks.*1 to 256"
    ),
    "combine config": assertion_error(lambda _: Buffer.get_combine_config(0), r"0 ranks.*1 to 256"),
    "rdma hint": value_error(
        lambda _: Config().get_rdma_buffer_size_hint(14336, 16, ranks_per_domain=9),
        r"ranks_per_domain is 9.*1 to 8",
    ),
    "nvl hint": value_error(
        lambda _: Config().get_nvl_buffer_size_hint(14336, 16, ranks_per_domain=0),
        r"ranks_per_domain is 0.*1 to 8",
    ),
    "low latency hint": value_error(
        lambda _: Buffer.get_low_latency_rdma_size_hint(0, 7168, 2, -8),
        r"num_max_dispatch_tokens_per_rank is 0, num_experts is -8.*at least 1",
    ),
}
