"""Ranks in containers of one host: two network namespaces, each with a localhost of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.launch import script_environ

# Two namespaces and a cable between them; $1 is what each rank runs.
_HOST = """
ip link set lo up
unshare --net sleep 300 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
inside() { nsenter --target $other --net -- "$@"; }
ip link add name cable type veth peer name cable netns $other
ip address add 10.213.0.1/24 dev cable
inside ip address add 10.213.0.2/24 dev cable
ip link set cable up
inside ip link set lo up
inside ip link set cable up
inside "$PYTHON" -c "$1" 1 & first=$!
"$PYTHON" -c "$1" 0
wait $first
"""

_RANK = """
import os, sys
import torch
import torch.distributed as dist
from epjit import Buffer

rank = int(sys.argv[1])
dist.init_process_group(
    "gloo", init_method="file://" + os.environ["RENDEZVOUS"], rank=rank, world_size=2
)
buffer = Buffer(dist.group.WORLD, 1 << 20, explicitly_destroy=True)
layout = buffer.get_dispatch_layout(torch.tensor([[0, 1]]), 2)
rows, *_ = buffer.dispatch(
    torch.full((1, 8), rank, dtype=torch.bfloat16),
    num_tokens_per_rank=layout[0],
    is_token_in_rank=layout[3],
    num_tokens_per_expert=layout[2],
)
assert rows[:, 0].tolist() == [0, 1], rows
buffer.destroy()
sys.stdout.write(f"rank {rank} met\\n")
"""


def _unshare() -> list[str]:
    """A command that starts a program in a network of its own; skips where that is not allowed."""
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no `{tool}`; install {package}")
    reason = ""
    for command in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        check = "ip link add name one type veth peer name two && unshare --net true"
        tried = subprocess.run(
            [*command, "sh", "-c", check], check=False, capture_output=True, text=True
        )
        if tried.returncode == 0:
            return command
        reason = tried.stderr.strip()
    pytest.skip(f"network namespaces are not allowed: {reason}")


def test_ranks_in_two_containers_of_one_host(tmp_path: Path) -> None:
    done = subprocess.run(
        [*_unshare(), "sh", "-euc", _HOST, "sh", _RANK],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **script_environ(),
            "PYTHON": sys.executable,
            "RENDEZVOUS": str(tmp_path / "rendezvous"),
            "GLOO_SOCKET_IFNAME": "cable",
            "EPJIT_BACKEND": "cpu",
            "EPJIT_TIMEOUT_SECONDS": "20",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 met", "rank 1 met"]
