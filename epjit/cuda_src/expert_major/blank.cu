// Blank: zeros in the rows that nothing arrived for, or behind those of the last expert. With a static
// number of rows the other kernels leave them as they were, but where gradients flow they are zero: a
// product of zero and whatever lies there may be NaN.
//
//   rows[r] = 0 for r in [max(*count, 0), num_rows)
//
// Launch: any grid, blank_threads() threads. Where there are no such rows it ends at once.
#include "epjit/ptx.cuh"

namespace epjit {

struct BlankConfig {
  int32_t num_warps;
};

struct BlankParams {
  char* rows;            // [num_rows, row_bytes]
  const int32_t* count;  // [1]: rows that are left alone
  int32_t num_rows;
  int32_t row_bytes;  // a multiple of 16
};

constexpr int blank_threads(BlankConfig cfg) { return cfg.num_warps * kWarpSize; }
constexpr int blank_shared_bytes(BlankConfig) { return 0; }

template <BlankConfig kCfg>
__device__ void blank(const BlankParams& p) {
  constexpr int kThreads = blank_threads(kCfg);
  const int64_t vecs = p.row_bytes / 16;
  const int64_t last = p.num_rows * vecs;
  const int64_t first = max(*p.count, 0) * vecs + blockIdx.x * kThreads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = first + threadIdx.x; at < last; at += step)
    ptx::st_v4(p.rows + at * 16, Vec16{});
}

}  // namespace epjit
