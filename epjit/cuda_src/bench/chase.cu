// How long one load takes: a thread follows a chain of addresses, each load needing the one before.
//
//   chain  words in this GPU's memory or a peer's; each holds the address of the next
//   out    [1] where the chain ended
//
// Launch: one block of chase_threads() threads; one thread works.
#include "epjit/ptx.cuh"

namespace epjit {

struct ChaseConfig {
  int32_t num_steps;
};

struct ChaseParams {
  const uint64_t* chain;
  uint64_t* out;
};

constexpr int chase_threads(ChaseConfig) { return kWarpSize; }
constexpr int chase_shared_bytes(ChaseConfig) { return 0; }

template <ChaseConfig kCfg>
__device__ void chase(const ChaseParams& p) {
  if (threadIdx.x != 0) return;
  const uint64_t* next = p.chain;
  for (int i = 0; i < kCfg.num_steps; ++i)
    next = reinterpret_cast<const uint64_t*>(ptx::ld_acquire_sys(next));
  *p.out = reinterpret_cast<uint64_t>(next);
}

}  // namespace epjit
