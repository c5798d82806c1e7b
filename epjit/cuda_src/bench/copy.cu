// The link ceiling: every rank copies rows to (or from) all peers at once, by bulk copies, no
// flags.
//
//   memory of a rank, symmetric:
//     sent  [num_ranks, num_rows, row_bytes]  rows of this rank for each peer
//     taken [num_ranks, num_rows, row_bytes]  rows of each peer for this rank
//
// push: sent[peer] of this rank -> taken[rank] of the peer.  pull: sent[rank] of the peer ->
// taken[peer] of this rank. Both end the same on all ranks; the own row of either stays unused.
//
// Launch: any grid, copy_threads() threads. One lane of each warp drives the copies.
#include "epjit/sync.cuh"

namespace epjit {

struct CopyConfig {
  int32_t num_ranks;
  int32_t num_warps;
  int32_t row_bytes;
  bool pull;
};

struct CopyParams {
  uint64_t memory[kMaxRanks];  // symmetric, of each rank
  int32_t num_rows;            // a peer
  int32_t rank;
};

constexpr int kCopyStages = 2;

constexpr int copy_threads(CopyConfig cfg) { return cfg.num_warps * kWarpSize; }

constexpr int copy_shared_bytes(CopyConfig cfg) {
  return cfg.num_warps * kCopyStages * (cfg.row_bytes + static_cast<int>(sizeof(uint64_t)));
}

template <CopyConfig kCfg>
class LinkCopy {
  static_assert(kCfg.num_ranks >= 2 && kCfg.num_ranks <= 8);
  static_assert(kCfg.row_bytes % 128 == 0, "the second stage must be as aligned as the first");
  static constexpr int kPeers = kCfg.num_ranks - 1;

 public:
  __device__ LinkCopy(const CopyParams& params, char* shared, int warp)
      : p(params),
        rows(shared + warp * kCopyStages * kCfg.row_bytes),
        bars(reinterpret_cast<uint64_t*>(shared + kCfg.num_warps * kCopyStages * kCfg.row_bytes) +
             warp * kCopyStages) {
    for (int stage = 0; stage < kCopyStages; ++stage) ptx::mbarrier_init(bars + stage, 1);
    ptx::fence_mbarrier_init();
  }

  // Rows first, first + step, ... of all peers.
  __device__ void run(int first, int step) {
    const int num_units = p.num_rows * kPeers;
    if (first < num_units) load(first, 0);
    for (int unit = first, i = 0; unit < num_units; unit += step, ++i) {
      const int stage = i % kCopyStages;
      if (unit + step < num_units) {
        // The only store that may still read is that of the other stage, which is loaded next.
        ptx::bulk_wait_read();
        load(unit + step, (i + 1) % kCopyStages);
      }
      wait_bulk_loads(bars + stage, i / kCopyStages & 1);
      ptx::bulk_store(taken(unit), rows + stage * kCfg.row_bytes, kCfg.row_bytes);
      ptx::bulk_commit();
    }
    ptx::bulk_wait();
  }

 private:
  // Neighbouring units go to different peers, and each rank begins with another one.
  __device__ int peer(int unit) const { return (p.rank + 1 + unit % kPeers) % kCfg.num_ranks; }

  __device__ char* row(int owner, int half, int of_rank, int unit) const {
    const int64_t index =
        static_cast<int64_t>(half * kCfg.num_ranks + of_rank) * p.num_rows + unit / kPeers;
    return reinterpret_cast<char*>(p.memory[owner]) + index * kCfg.row_bytes;
  }

  __device__ const char* sent(int unit) const {
    return kCfg.pull ? row(peer(unit), 0, p.rank, unit) : row(p.rank, 0, peer(unit), unit);
  }

  __device__ char* taken(int unit) const {
    return kCfg.pull ? row(p.rank, 1, peer(unit), unit) : row(peer(unit), 1, p.rank, unit);
  }

  __device__ void load(int unit, int stage) {
    ptx::mbarrier_arrive_expect_tx(bars + stage, kCfg.row_bytes);
    ptx::bulk_load(rows + stage * kCfg.row_bytes, sent(unit), kCfg.row_bytes, bars + stage);
  }

  const CopyParams& p;
  char* const rows;
  uint64_t* const bars;
};

template <CopyConfig kCfg>
__device__ void copy(const CopyParams& p) {
  if (threadIdx.x % kWarpSize != 0) return;
  const int warp = threadIdx.x / kWarpSize;
  LinkCopy<kCfg>(p, ptx::dynamic_shared(), warp)
      .run(warp * gridDim.x + blockIdx.x, gridDim.x * kCfg.num_warps);
}

}  // namespace epjit
