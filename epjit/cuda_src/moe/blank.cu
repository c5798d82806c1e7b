// Blank: zeros in the rows that nothing arrived for. With a static number of rows a cached dispatch
// leaves them as they were, but as a gradient they are zero: a product of zero and whatever lies
// there may be NaN.
//
//   rows[r] = 0 for r in [max(*count, 0), num_rows)
//
// Launch: any grid, blank_threads() threads. Where every row arrived it ends at once.
#include "epjit/ptx.cuh"

namespace epjit {

struct BlankConfig {
  int32_t row_bytes;
};

struct BlankParams {
  char* rows;            // [num_rows, row_bytes]
  const int32_t* count;  // [1]: rows that arrived
  int32_t num_rows;
};

constexpr int kBlankThreads = 512;

constexpr int blank_threads(BlankConfig) { return kBlankThreads; }
constexpr int blank_shared_bytes(BlankConfig) { return 0; }

template <BlankConfig kCfg>
__device__ void blank(const BlankParams& p) {
  constexpr int kVecs = kCfg.row_bytes / 16;
  static_assert(kCfg.row_bytes % 16 == 0);
  const int64_t last = static_cast<int64_t>(p.num_rows) * kVecs;
  const int64_t first = static_cast<int64_t>(max(*p.count, 0)) * kVecs + blockIdx.x * kBlankThreads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlankThreads;
  for (int64_t at = first + threadIdx.x; at < last; at += step)
    ptx::st_v4(p.rows + at * 16, Vec16{});
}

}  // namespace epjit
