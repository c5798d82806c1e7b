// A rank between two operations: it writes to memory that the one before has let go.
#include "epjit/types.cuh"

namespace epjit {

struct WriteConfig {
  int32_t num_warps;
};

struct WriteParams {
  uint64_t* dst;
  const uint64_t* src;
  int64_t num_words;
};

constexpr int write_threads(WriteConfig cfg) { return cfg.num_warps * kWarpSize; }
constexpr int write_shared_bytes(WriteConfig) { return 0; }

template <WriteConfig kCfg>
__device__ void write(const WriteParams& p) {
  for (int64_t i = threadIdx.x; i < p.num_words; i += blockDim.x) p.dst[i] = p.src[i];
}

}  // namespace epjit
