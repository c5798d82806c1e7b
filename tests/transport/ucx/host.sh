#!/bin/sh
# Python ($PYTHON) on what NVSHMEM and UCX take for a host of its own: another name and another /dev/shm.
# NVSHMEM lies where torch loads it from ($NVSHMEM_DIR), for a process can have one only.
exec unshare --mount --uts sh -ec '
  mount -t tmpfs -o size=4g tmpfs /dev/shm
  mount --bind "$EPJIT_TEST_UCX/nvshmem" "$NVSHMEM_DIR"
  "$PYTHON" -c "import os, socket; socket.sethostname(f\"host{os.getppid()}\")"
  exec "$PYTHON" "$@"' "$0" "$@"
