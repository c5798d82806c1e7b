// Permute: copies received rows into the order of the experts, a copy for each selection; padding
// rows become zeros, so that a grouped GEMM may read them (and its gradients sum over them).
//
//   rows[r] = x[source[r] / num_topk], 0 where source[r] is -1;  r < *end, the rest is left alone
//
// Launch: any grid, permute_threads() threads; one block an SM is enough. A warp takes rows_per_warp
// rows at a time.
#include "epjit/copy.cuh"

namespace epjit {

struct PermuteConfig {
  int32_t row_bytes;
  bool tma;
  int32_t num_warps;
  int32_t rows_per_warp;
};

struct PermuteParams {
  const char* x;          // [num_tokens, row_bytes]
  const int32_t* source;  // [num_rows], from place
  const int32_t* end;     // [1]: the end of the last expert, from place
  char* rows;             // [num_rows, row_bytes]
  int32_t num_topk;
};

constexpr int permute_threads(PermuteConfig cfg) { return cfg.num_warps * kWarpSize; }

constexpr int permute_shared_bytes(PermuteConfig cfg) {
  return copier_shared_bytes(cfg.tma, cfg.num_warps, cfg.rows_per_warp, cfg.row_bytes);
}

template <PermuteConfig kCfg>
__device__ void permute(const PermuteParams& p) {
  constexpr int kRows = kCfg.rows_per_warp;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  RowCopier<kCfg.tma, kCfg.num_warps, kRows, kCfg.row_bytes> copier(ptx::dynamic_shared(), warp,
                                                                    lane);
  __syncwarp();
  const int num_rows = *p.end;
  const int step = gridDim.x * kCfg.num_warps * kRows;
  for (int first = (blockIdx.x * kCfg.num_warps + warp) * kRows; first < num_rows; first += step) {
    const bool has_row = lane < kRows && first + lane < num_rows;
    const int source = has_row ? p.source[first + lane] : -1;
    const char* src = nullptr;
    char* dst = nullptr;
    if (source >= 0) {
      src = p.x + static_cast<int64_t>(source / p.num_topk) * kCfg.row_bytes;
      dst = p.rows + static_cast<int64_t>(first + lane) * kCfg.row_bytes;
    }
    copier.load(0, src);
    uint32_t padding = __ballot_sync(kFullMask, has_row && source < 0);
    for (; padding != 0; padding &= padding - 1) {
      const int row = first + __popc((padding & (0u - padding)) - 1);
      char* const zeros = p.rows + static_cast<int64_t>(row) * kCfg.row_bytes;
      for (int at = lane * 16; at < kCfg.row_bytes; at += kWarpSize * 16)
        ptx::st_v4(zeros + at, Vec16{});
    }
    copier.store(0, dst);
  }
  copier.drain();
}

}  // namespace epjit
