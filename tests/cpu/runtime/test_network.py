"""The network under NVSHMEM: NICs that ranks find, settings they agree on, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epjit.runtime import network
from epjit.runtime.machine import mapped
from epjit.runtime.network import Network, Port

IB = Network(links=("InfiniBand",), has_gdrcopy=True)
NO_NIC = Network(no_ibgda="no mlx5 NIC has an active port")
VARIABLES = (
    "NVSHMEM_IB_ENABLE_IBGDA",
    "NVSHMEM_IBGDA_NUM_RC_PER_PE",
    "NVSHMEM_REMOTE_TRANSPORT",
    "NVSHMEM_IB_ENABLE_RELAXED_ORDERING",
    "NVSHMEM_HCA_LIST",
    "NVSHMEM_HCA_PE_MAPPING",
    "NVSHMEM_HCA_PREFIX",
    "NVSHMEM_GPUNETIO_ENABLE_GDAKI",
)
OLD, NEW = (3, 4, 5), (3, 8, 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(network, "can_load", lambda library: True)


def host(root: Path, *ports: Port, gdrcopy: bool = True) -> Path:
    """The files of a host with these ports."""
    for each in ports:
        nic = root / "sys/class/infiniband" / each.nic
        folder = nic / "ports" / str(each.number)
        kinds = folder / "gid_attrs/types"
        for made in (nic / "device", folder / "gids", kinds, root / each.driver, root / "dev"):
            made.mkdir(parents=True, exist_ok=True)
        if not (nic / "device/driver").exists():
            (nic / "device/driver").symlink_to(root / each.driver)
        if each.is_virtual:
            (nic / "device/physfn").mkdir(exist_ok=True)
        (folder / "state").write_text("4: ACTIVE\n" if each.active else "1: DOWN\n")
        (folder / "link_layer").write_text(f"{each.link}\n")
        (folder / "rate").write_text(f"{each.rate}\n")
        (folder / "gids/0").write_text("fe80:0000:0000:0000:0a00:27ff:fe00:0000\n")
        (kinds / "0").write_text("IB/RoCE v1\n")
        (folder / "gids/3").write_text("0000:0000:0000:0000:0000:ffff:0a00:0001\n")
        (kinds / "3").write_text("RoCE v2\n" if each.routable else "IB/RoCE v1\n")
    if gdrcopy:
        (root / "dev").mkdir(exist_ok=True)
        (root / "dev/gdrdrv").touch()
    return root


def test_ports_as_the_kernel_shows_them(tmp_path: Path) -> None:
    ports = [
        Port("ibp3s0", rate="400 Gb/sec (4X NDR)"),
        Port("mlx5_0", 1, link="Ethernet", is_virtual=True),
        Port("mlx5_0", 2, link="Ethernet", is_virtual=True, routable=True),
        Port("mlx5_1", active=False, driver="mlx5_core.sf"),
        Port("rdmap0s6", link="Unspecified", driver="efa"),
    ]
    assert network.ports(host(tmp_path, *ports)) == ports
    assert [port.is_mlx5 for port in ports] == [True, True, True, True, False]
    assert ports[2].name == "mlx5_0:2"


DOWN, ROCE = Port("mlx5_1", active=False), Port("mlx5_2", link="Ethernet")
PERSISTENT = (Port("rocep24s0", link="Ethernet"), Port("rocep41s0", link="Ethernet"))
BROADCOM = Port("bnxt_re0", link="Ethernet", driver="bnxt_en")
BY_NAME = (
    "NVSHMEM takes NICs by name, and here they are called rocep24s0, rocep41s0: set "
    "NVSHMEM_HCA_PREFIX to what these names begin with, or to nothing for any name"
)
NONE = "no mlx5 NIC has an active port"
IB_ALONE, ETHERNET_ALONE, BOTH = ("InfiniBand",), ("Ethernet",), ("Ethernet", "InfiniBand")


@pytest.mark.parametrize(
    ("ports", "variable", "version", "links", "reason"),
    [
        ((Port("mlx5_0"), DOWN), "", OLD, IB_ALONE, ""),
        ((Port("mlx5_0"), ROCE), "", OLD, BOTH, ""),
        ((DOWN,), "", OLD, (), NONE),
        ((BROADCOM,), "", OLD, ETHERNET_ALONE, NONE),
        ((BROADCOM,), "", NEW, ETHERNET_ALONE, NONE),
        ((), "", OLD, (), NONE),
        # Names that do not change with the order in which NICs are found.
        (PERSISTENT, "", OLD, ETHERNET_ALONE, BY_NAME),
        (PERSISTENT, "", NEW, ETHERNET_ALONE, ""),
        (PERSISTENT, "NVSHMEM_HCA_PREFIX=rocep", OLD, ETHERNET_ALONE, ""),
        (PERSISTENT, "NVSHMEM_HCA_PREFIX=", OLD, ETHERNET_ALONE, ""),
        (PERSISTENT, "NVSHMEM_HCA_PREFIX=ibp", NEW, ETHERNET_ALONE, BY_NAME),
        (PERSISTENT, "NVSHMEM_HCA_PREFIX=^roce", NEW, ETHERNET_ALONE, BY_NAME),
        # Ports that the user names.
        ((Port("mlx5_0"), ROCE), "NVSHMEM_HCA_LIST=mlx5_0", OLD, IB_ALONE, ""),
        ((Port("mlx5_0"), ROCE), "NVSHMEM_HCA_LIST=^mlx5_0:1,mlx5_3", OLD, ETHERNET_ALONE, ""),
        ((Port("mlx5_0"), ROCE), "NVSHMEM_HCA_LIST=mlx5_0:2", OLD, (), NONE),
        ((Port("mlx5_0"), ROCE), "NVSHMEM_HCA_PE_MAPPING=mlx5_2:1:4", OLD, ETHERNET_ALONE, ""),
    ],
)
def test_what_a_rank_finds(
    ports: tuple[Port, ...],
    variable: str,
    version: Any,
    links: tuple[str, ...],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable:
        monkeypatch.setenv(*variable.split("=", 1))
    found = network.look(host(tmp_path, *ports), version=version)
    assert found == Network(links=links, no_ibgda=reason, has_gdrcopy=True)


def test_what_a_rank_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host(tmp_path, Port("mlx5_0"), gdrcopy=False)
    assert not network.look(root, version=OLD).has_gdrcopy
    assert network.look(root, version=OLD, no_device_code="no code").no_ibgda == "no code"
    monkeypatch.setattr(network, "can_load", lambda library: False)
    assert network.look(root, version=OLD).no_ibgda.startswith("libmlx5.so.1 cannot")


def test_what_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "no")
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "UCX")
    found = network.look(tmp_path, version=OLD)
    assert found == Network(False, "ucx", no_ibgda=NONE)
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "")  # as unset, and written before NVSHMEM looks
    assert network.look(tmp_path, version=OLD).ibgda is None
    monkeypatch.setenv("NVSHMEM_GPUNETIO_ENABLE_GDAKI", "1")
    with pytest.raises(RuntimeError, match=r"NVSHMEM_GPUNETIO_ENABLE_GDAKI=1 lets .* unset it"):
        network.look(tmp_path, version=OLD)


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
        ({"num_qps": "4"}, "IBGDA_NUM_RC_PER_PE: unset on ranks 0, 1, 3; 4 on rank 2; give it"),
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
        (None, [True, False], "0"),  # asked for, and it is known that it will not begin
    ],
)
def test_relaxed_ordering(ibgda: bool | None, gdrcopy: list[bool], relaxed: str | None) -> None:
    """Off on all ranks where a signal is a plain write to any of them."""
    reason = "libmlx5.so.1 cannot be loaded" if ibgda is None else ""
    networks = [IB._replace(has_gdrcopy=each, no_ibgda=reason) for each in gdrcopy]
    ibgda = ibgda is not False
    found = network.settings(networks, ibgda=ibgda, version=OLD, may_lose_ranks=False)
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
def test_the_transport_that_is_loaded(
    libraries: list[str], got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = tmp_path / "maps"
    lines = [f"7f00-7f01 r-xp 0 00:1 5   /opt/lib/nvshmem_{each}\n" for each in libraries] * 2
    maps.write_text("".join(["7f00-7f01 r-xp 0 00:1 5   /lib/libc.so.6\n", *lines]))
    monkeypatch.setattr(network, "mapped", lambda name: mapped(name, maps))
    assert network.loaded() == got
    assert mapped("libc.so", maps) == [Path("/lib/libc.so.6").resolve()]
    maps.unlink()
    assert network.loaded() == ""


@pytest.mark.parametrize(
    ("got", "gdrcopy", "relaxed", "refused"),
    [
        ("ibrc", False, None, True),
        ("ibrc", False, "1", True),
        ("ibrc", False, "0", False),
        ("ibrc", True, None, False),
        ("ibgda", False, None, False),
        ("", False, None, False),
    ],
)
def test_signals_that_could_come_before_their_data(
    got: str, gdrcopy: bool, relaxed: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if relaxed is not None:
        monkeypatch.setenv(network.ORDERING, relaxed)
    said = network.why_unordered([IB, IB._replace(has_gdrcopy=gdrcopy)], got)
    assert ("NVSHMEM_IB_ENABLE_RELAXED_ORDERING=0 on all ranks" in said) == refused


def test_ranks_that_got_different_transports() -> None:
    network.check_got(["ibrc"] * 3)
    with pytest.raises(
        RuntimeError, match="different transports: ibgda on ranks 0, 1; none on rank 2; NVSHMEM_DEB"
    ):
        network.check_got(["ibgda", "ibgda", ""])
