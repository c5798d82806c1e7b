#!/usr/bin/env bash
# Runs examples/two_nodes.py on two nodes, or on one that is cut in two. Arguments after these go to the program.
#   launch_two_nodes.sh 0 ADDRESS    on the first node; ADDRESS is its own, as the second reaches it
#   launch_two_nodes.sh 1 ADDRESS    on the second node
#   launch_two_nodes.sh try          on this host alone: two NVLink domains of half the ranks each
# RANKS is the number of ranks a node; by default that of its GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}  # what `make` uses
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
node=${1:?0, 1 or try}
shift

if [ "$node" = try ]; then
  ranks=${RANKS:-$((gpus > 1 ? gpus / 2 * 2 : 4))}
  export EPJIT_NVLINK_DOMAIN=$((ranks / 2))
  where=(--standalone)
else
  ranks=${RANKS:-$gpus}
  where=(--nnodes 2 --node-rank "$node" --master-addr "${1:?the address of the first node}" --master-port "${PORT:-29500}")
  shift
  ulimit -l unlimited 2>/dev/null || echo "locked memory: $(ulimit -l) KB, and NICs want it unlimited" >&2
  # What NVSHMEM may be told, the same on both nodes; docs/internode.md has the choices. Without a word IBGDA is taken
  # where every rank can, else IBRC.
  # export NVSHMEM_IB_ENABLE_IBGDA=0                     # IBRC
  # export NVSHMEM_DEBUG=INFO                            # what NVSHMEM found
  # export NVSHMEM_HCA_LIST=mlx5_0,mlx5_1                # the NICs to use, when not all
  # export NVSHMEM_IB_SL=0                               # service level
  # export NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME=eth0        # the interface of the start-up
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m torch.distributed.run --nproc-per-node "$ranks" "${where[@]}" examples/two_nodes.py "$@"
