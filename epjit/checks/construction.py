"""The preconditions of a Buffer, checked before any memory is allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epjit import env
from epjit.checks.low_latency import check_variants
from epjit.config import MAX_GROUP, MAX_RANKS
from epjit.sizes import ALIGNMENT

if TYPE_CHECKING:
    from epjit.calls import Settings
    from epjit.runtime.group import Group
    from epjit.runtime.topology import Topology


def check_settings(settings: Settings, num_ranks: int, nvlink_domain: int | None) -> None:
    """Sizes and ranks, all reasons at once.

    Raises:
        ValueError: Some cannot work.
    """
    sizes = {
        "num_nvl_bytes": settings.num_nvl_bytes,
        "num_rdma_bytes": settings.num_rdma_bytes,
    }
    reasons = [
        f"{name} is {value}, but must be a multiple of {ALIGNMENT} and not negative"
        for name, value in sizes.items()
        if value < 0 or value % ALIGNMENT
    ]
    if num_ranks > MAX_GROUP:
        reasons.append(f"the group has {num_ranks} ranks, but may have up to {MAX_GROUP}")
    if nvlink_domain is not None and nvlink_domain < 0:
        reasons.append(f"nvlink_domain is {nvlink_domain}, but must be a number of ranks, or 0")
    if reasons:
        raise ValueError("Buffer: " + "; ".join(reasons))


def check_topology(settings: Settings, topology: Topology) -> None:
    """Whether the settings suit the NVLink domains, all reasons at once.

    Raises:
        ValueError: They do not.
    """
    num_rdma_bytes, num_qps = settings.num_rdma_bytes, settings.num_qps_per_rank
    reasons = []
    if topology.num_local > MAX_RANKS:
        reasons.append(
            f"all {topology.num_local} ranks are in one NVLink domain, which may have up to "
            f"{MAX_RANKS}; cut it with nvlink_domain (EPJIT_NVLINK_DOMAIN), a number of ranks"
        )
    if not topology.spans_domains and num_rdma_bytes > 0 and not settings.low_latency_mode:
        reasons.append(
            f"num_rdma_bytes is {num_rdma_bytes}, but {topology.num_local} ranks share one NVLink "
            "domain and use none; pass 0 (Config.get_rdma_buffer_size_hint does), or "
            "low_latency_mode=True, which uses it"
        )
    if num_qps < 1 and (topology.spans_domains or settings.low_latency_mode):
        reasons.append(
            f"num_qps_per_rank is {num_qps}, but must be at least 1 (V1 takes the number "
            "of SMs, in low-latency mode that of local experts)"
        )
    if reasons:
        raise ValueError("Buffer: " + "; ".join(reasons))
    if settings.low_latency_mode:
        check_variants(num_domains=topology.num_domains, enable_shrink=settings.enable_shrink)


def agree_on_settings(settings: Settings, topology: Topology, group: Group) -> None:
    """All ranks make the same Buffer; collective.

    Raises:
        RuntimeError: They do not; says what each has.
    """
    variants = (env.low_latency_dispatch_variant, env.low_latency_combine_variant)
    values = {
        **settings._asdict(),
        "NVLink domains": topology.domains,
        **{each.name: each() for each in variants if settings.low_latency_mode},
    }
    del values["timeout_seconds"]  # which may differ
    group.agree(
        {f"values of {name}": value for name, value in values.items()},
        remedy="make Buffers with the same arguments and environment on all ranks",
    )
