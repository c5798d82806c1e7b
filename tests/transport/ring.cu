// Each warp sends its row to the next rank in both ways that transport.cuh knows, waits for those of
// the rank before, and hands out what has come. All six functions are called.
#include "epjit/ptx.cuh"
#include "epjit/transport.cuh"

namespace epjit {

struct RingConfig {
  int32_t num_warps;
};

// Symmetric memory of a rank, from `memory` on: rows to send, rows that came by epjit_put, rows that
// came by epjit_put_signal, each [num_warps, row_bytes]; then signals [2, num_warps] u64.
struct RingParams {
  uint64_t transport;
  char* memory;
  char* out;  // local: both kinds of rows
  uint32_t* failed;
  uint64_t epoch;
  uint64_t timeout_ns;
  int64_t row_bytes;
  int32_t next_pe;
};

constexpr int ring_threads(RingConfig config) { return config.num_warps * kWarpSize; }
constexpr int ring_shared_bytes(RingConfig) { return 0; }

__device__ inline bool ring_wait(const RingParams& p, const uint64_t* signal) {
  const uint64_t start = ptx::globaltimer();
  while (ptx::ld_acquire_sys(signal) < p.epoch)
    if (ptx::globaltimer() - start > p.timeout_ns) return false;
  return true;
}

template <RingConfig kCfg>
__device__ void ring(const RingParams& p) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t all = kCfg.num_warps * p.row_bytes, row = warp * p.row_bytes;
  auto* const signals = reinterpret_cast<uint64_t*>(p.memory + 3 * all);
  const char* const src = p.memory + row;

  epjit_put(p.transport, p.memory + all + row, src, p.row_bytes, p.next_pe);
  if (lane == 0) {
    epjit_fence(p.transport);
    epjit_signal(p.transport, signals + warp, p.epoch, p.next_pe);
  }
  __syncwarp();
  epjit_put_signal(p.transport, p.memory + 2 * all + row, src, p.row_bytes,
                   signals + kCfg.num_warps + warp, p.epoch, p.next_pe);

  for (int kind = 0; kind < 2; ++kind) {
    bool ok = true;
    if (lane == 0) ok = ring_wait(p, signals + kind * kCfg.num_warps + warp);
    ok = __all_sync(kFullMask, ok);
    __syncwarp();
    if (!ok) {
      if (lane == 0) *p.failed = 1;
      return;
    }
    warp_received(p.transport, lane);
    const char* const in = p.memory + (kind + 1) * all + row;
    for (int64_t at = lane * 16; at < p.row_bytes; at += kWarpSize * 16)
      ptx::st_v4(p.out + kind * all + row + at, ptx::ld_v4(in + at));
  }
  if (lane == 0) epjit_quiet(p.transport);
}

}  // namespace epjit
