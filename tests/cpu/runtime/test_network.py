"""The network under NVSHMEM: NICs that ranks find, settings they agree on, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epjit.runtime import network
from epjit.runtime.network import Network

IB = Network(links=("InfiniBand",), has_gdrcopy=True)
NO_NIC = Network(no_ibgda="no mlx5 NIC has an active port")
VARIABLES = (
    "NVSHMEM_IB_ENABLE_IBGDA",
    "NVSHMEM_REMOTE_TRANSPORT",
    "NVSHMEM_HCA_LIST",
    "NVSHMEM_GPUNETIO_ENABLE_GDAKI",
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def host(root: Path, *ports: tuple[str, str, str], gdrcopy: bool = True) -> Path:
    """The files of a host with these ports: NIC, state, kind of link."""
    for number, (nic, state, link) in enumerate(ports, 1):
        folder = root / "sys/class/infiniband" / nic / "ports" / str(number)
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
        (folder / "link_layer").write_text(f"{link}\n")
    (root / "dev").mkdir(parents=True, exist_ok=True)
    if gdrcopy:
        (root / "dev" / "gdrdrv").touch()
    return root


UP, DOWN = "4: ACTIVE", "1: DOWN"
BOTH = ("Ethernet", "InfiniBand")


@pytest.mark.parametrize(
    ("ports", "loads", "links", "reason"),
    [
        ([("mlx5_0", UP, "InfiniBand"), ("mlx5_1", DOWN, "Ethernet")], True, ("InfiniBand",), ""),
        ([("mlx5_1", UP, "InfiniBand"), ("mlx5_2", UP, "Ethernet")], True, BOTH, ""),
        ([("mlx5_0", DOWN, "InfiniBand")], True, (), "no mlx5 NIC has an active port"),
        ([("bnxt_re0", UP, "Ethernet")], True, ("Ethernet",), "no mlx5 NIC has an active port"),
        ([("mlx5_0", UP, "Ethernet")], False, ("Ethernet",), "libmlx5.so.1 cannot be loaded"),
        ([], True, (), "no mlx5 NIC has an active port"),
    ],
)
def test_what_a_rank_finds(
    ports: Any, loads: bool, links: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    found = network.look(host(tmp_path, *ports), loads=lambda library: loads)
    assert found == Network(links=links, no_ibgda=reason, has_gdrcopy=True)


def test_what_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host(tmp_path, ("mlx5_0", UP, "InfiniBand"), gdrcopy=False)
    for name, value in zip(VARIABLES, ("no", "UCX", "mlx5_0", "0"), strict=True):
        monkeypatch.setenv(name, value)
    found = network.look(root, no_device_code="no code", loads=lambda library: True)
    assert found == Network(False, "ucx", None, "no code", has_gdrcopy=False)
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "")  # as unset, and written before NVSHMEM looks
    assert network.look(root).ibgda is None
    monkeypatch.setenv("NVSHMEM_GPUNETIO_ENABLE_GDAKI", "1")
    with pytest.raises(RuntimeError, match=r"NVSHMEM_GPUNETIO_ENABLE_GDAKI=1 lets .* unset it"):
        network.look(root)


# ---- what all agree on


@pytest.mark.parametrize(
    ("networks", "num_hosts", "ibgda"),
    [
        ([IB] * 4, 2, True),
        ([IB] * 4, 1, False),  # nothing needs a NIC
        ([IB, IB, IB, IB._replace(no_ibgda="libmlx5.so.1 cannot be loaded")], 2, False),
        ([IB._replace(transport="ibrc")] * 4, 2, False),
        ([IB._replace(ibgda=False)] * 4, 2, False),
        ([NO_NIC._replace(ibgda=True)] * 4, 2, True),
        ([NO_NIC] * 4, 2, False),
    ],
)
def test_ibgda_is_begun_where_every_rank_can(
    networks: list[Network], num_hosts: int, ibgda: bool
) -> None:
    network.check(networks, num_hosts=num_hosts)
    assert network.use_ibgda(networks, num_hosts=num_hosts) is ibgda


@pytest.mark.parametrize(
    ("third", "message"),
    [
        ({"ibgda": True}, "disagree on NVSHMEM_IB_ENABLE_IBGDA: unset on ranks 0, 1, 3; 1 on rank"),
        ({"transport": "ucx"}, "NVSHMEM_REMOTE_TRANSPORT: unset on ranks 0, 1, 3; ucx on rank 2;"),
        ({"links": ("Ethernet",)}, "active ports: InfiniBand on ranks 0, 1, 3; Ethernet on rank 2"),
        ({"links": ()}, r"InfiniBand on ranks 0, 1, 3; none on rank 2; bring .*TRANSPORT=none"),
    ],
)
def test_what_ranks_disagree_on(third: dict[str, Any], message: str) -> None:
    networks = [IB] * 4
    networks[2] = IB._replace(**third)
    with pytest.raises(RuntimeError, match=message):
        network.check(networks, num_hosts=2)


def test_ibgda_on_some_ranks_only_is_refused() -> None:
    """The others would wait for ever for those."""
    networks = [IB._replace(ibgda=True)] * 4
    networks[3] = networks[3]._replace(no_ibgda="libmlx5.so.1 cannot be loaded")
    with pytest.raises(
        RuntimeError,
        match=r"it can begin on ranks 0, 1, 2; libmlx5\.so\.1 cannot .* rank 3; .*ENABLE_IBGDA=0",
    ):
        network.check(networks, num_hosts=2)
    network.check(networks, num_hosts=1)


def test_ports_that_nobody_uses_may_differ() -> None:
    chosen = [IB._replace(links=None), IB._replace(links=("Ethernet",))]
    network.check(chosen, num_hosts=2)
    over_efa = [IB._replace(transport="libfabric"), Network(transport="libfabric")]
    network.check(over_efa, num_hosts=2)
    network.check([NO_NIC] * 2, num_hosts=2)


@pytest.mark.parametrize(
    ("ibgda", "gdrcopy", "relaxed"),
    [
        (True, [True, True], None),
        (True, [False, False], None),
        (False, [True, True], None),
        (False, [True, False], "0"),
        (False, [False, False], "0"),
    ],
)
def test_relaxed_ordering(ibgda: bool, gdrcopy: list[bool], relaxed: str | None) -> None:
    """Off on all ranks where a signal is a plain write to any of them."""
    networks = [IB._replace(has_gdrcopy=each) for each in gdrcopy]
    found = network.settings(networks, ibgda=ibgda, version=(3, 4, 5), may_lose_ranks=False)
    assert found.get("NVSHMEM_IB_ENABLE_RELAXED_ORDERING") == relaxed
    assert found["NVSHMEM_IB_ENABLE_IBGDA"] == str(int(ibgda))
    assert found["NVSHMEM_IBGDA_NUM_FETCH_SLOTS_PER_RC"] == "32"


@pytest.mark.parametrize(
    ("version", "ibgda", "may_lose_ranks", "told"),
    [
        ((3, 8, 0), True, True, ("16", "3")),
        ((3, 7, 9), True, True, (None, None)),  # has no such variables
        ((3, 8, 0), True, False, (None, None)),
        ((3, 8, 0), False, True, (None, None)),
    ],
)
def test_a_rank_that_is_gone_is_given_up_early(
    version: Any, ibgda: bool, may_lose_ranks: bool, told: tuple[str | None, ...]
) -> None:
    found = network.settings([IB] * 2, ibgda=ibgda, version=version, may_lose_ranks=may_lose_ranks)
    assert (found.get("NVSHMEM_IB_TIMEOUT"), found.get("NVSHMEM_IB_RETRY_CNT")) == told


# ---- what was got


@pytest.mark.parametrize(
    ("libraries", "got"),
    [
        ([], ""),
        (["transport_ibrc.so.3"], "ibrc"),
        (["transport_ibgda.so.7", "transport_ibrc.so.7"], "ibgda"),
        (["bootstrap_uid.so.3", "transport_libfabric.so.7"], "libfabric"),
    ],
)
def test_the_transport_that_is_loaded(libraries: list[str], got: str, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    lines = [f"7f00-7f01 r-xp 0 00:1 5   /opt/lib/nvshmem_{each}\n" for each in libraries] * 2
    maps.write_text("".join(["7f00-7f01 r-xp 0 00:1 5   /lib/libc.so.6\n", *lines]))
    assert network.loaded(maps) == got
    assert network.loaded(tmp_path / "none") == ""


def test_ranks_that_got_different_transports() -> None:
    network.check_got(["ibrc"] * 3)
    with pytest.raises(
        RuntimeError, match="different transports: ibgda on ranks 0, 1; none on rank 2; NVSHMEM_DEB"
    ):
        network.check_got(["ibgda", "ibgda", ""])
