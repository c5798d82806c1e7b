// Permute: copies received rows into the order of the experts: one load, a store for each selection,
// with scales and weights. Padding becomes zeros if asked, so that a grouped GEMM may read it (and
// its gradients sum over it).
//
//   rows[row_of[t, k]] = x[t]; row_scales likewise; row_weights[row_of[t, k]] = weights[t, k]
//   rows[r] = row_scales[r] = 0 with zero_padding, where source[r] is -1;  r < *end
//   row_weights[r] = 0 where source[r] is -1
//
// All else is left alone. A selection whose row is outside [0, num_rows) has none.
//
// Launch: any grid, permute_threads() threads; one block an SM is enough. A warp takes rows_per_warp
// tokens at a time.
#include "epjit/copy.cuh"

namespace epjit {

struct PermuteConfig {
  int32_t row_bytes;
  int32_t num_topk;
  bool tma;
  int32_t num_warps;
  int32_t rows_per_warp;
};

struct PermuteParams {
  const char* x;           // [num_tokens, row_bytes]
  const uint32_t* scales;  // [num_tokens, num_scales], rows scale_token_stride apart
  const float* weights;    // [num_tokens, num_topk], rows weight_stride apart
  const int32_t* row_of;   // [num_tokens, num_topk], rows row_of_stride apart, from place
  const int32_t* source;   // [num_rows], from place
  const int32_t* end;      // [1]: the end of the last expert, from place
  char* rows;              // [num_rows, row_bytes]
  uint32_t* row_scales;    // [num_rows, num_scales], of these strides
  float* row_weights;      // [num_rows]; null: none
  int64_t scale_token_stride;
  int64_t weight_stride;
  int64_t row_of_stride;
  int64_t scale_row_stride;
  int64_t scale_stride;
  int32_t num_tokens;
  int32_t num_rows;
  int32_t num_scales;  // words; 0: none
  bool zero_padding;
};

constexpr int permute_threads(PermuteConfig cfg) { return cfg.num_warps * kWarpSize; }

constexpr int permute_shared_bytes(PermuteConfig cfg) {
  return copier_shared_bytes(cfg.tma, cfg.num_warps, cfg.rows_per_warp, cfg.row_bytes);
}

template <PermuteConfig kCfg>
__device__ void permute(const PermuteParams& p) {
  constexpr int kRows = kCfg.rows_per_warp, kTopk = kCfg.num_topk;
  constexpr int kPadding = 4;  // rows that a warp may have to fill at a time
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int number = blockIdx.x * kCfg.num_warps + warp, num_warps = gridDim.x * kCfg.num_warps;
  RowCopier<kCfg.tma, kCfg.num_warps, kRows, kCfg.row_bytes> copier(ptx::dynamic_shared(), warp,
                                                                    lane);
  __syncwarp();
  const auto row = [&](int token, int k) {
    const int at = p.row_of[token * p.row_of_stride + k];
    return static_cast<uint32_t>(at) < static_cast<uint32_t>(p.num_rows) ? at : -1;
  };
  for (int first = number * kRows; first < p.num_tokens; first += num_warps * kRows) {
    const int num_tokens = min(kRows, p.num_tokens - first);
    const auto target = [&](int k) -> char* {
      const int64_t at = lane < num_tokens ? row(first + lane, k) : -1;
      return at >= 0 ? p.rows + at * kCfg.row_bytes : nullptr;
    };
    bool is_used = false;
    for (int k = 0; k < kTopk; ++k) is_used |= target(k) != nullptr;
    copier.load(0, is_used ? p.x + static_cast<int64_t>(first + lane) * kCfg.row_bytes : nullptr);
    for (int i = lane; p.row_weights != nullptr && i < num_tokens * kTopk; i += kWarpSize) {
      const int token = first + i / kTopk, k = i % kTopk, at = row(token, k);
      if (at >= 0) p.row_weights[at] = p.weights[token * p.weight_stride + k];
    }
    for (int i = lane; i < num_tokens * p.num_scales; i += kWarpSize) {
      const int token = first + i / p.num_scales, column = i % p.num_scales;
      const uint32_t scale = p.scales[token * p.scale_token_stride + column];
      for (int k = 0; k < kTopk; ++k) {
        const int64_t at = row(token, k);
        if (at >= 0) p.row_scales[at * p.scale_row_stride + column * p.scale_stride] = scale;
      }
    }
    copier.template store_each<kTopk>(0, target);
  }

  const int end = min(*p.end, p.num_rows);
  for (int first = number * kPadding; first < p.num_rows; first += num_warps * kPadding) {
    const int mine = first + lane;
    const bool is_none = lane < kPadding && mine < p.num_rows && p.source[mine] < 0;
    if (is_none && p.row_weights != nullptr) p.row_weights[mine] = 0.0f;
    uint32_t padding = __ballot_sync(kFullMask, is_none && mine < end && p.zero_padding);
    for (; padding != 0; padding &= padding - 1) {
      const int64_t at = first + __ffs(padding) - 1;
      for (int i = lane * 16; i < kCfg.row_bytes; i += kWarpSize * 16)
        ptx::st_v4(p.rows + at * kCfg.row_bytes + i, Vec16{});
      for (int i = lane; i < p.num_scales; i += kWarpSize)
        p.row_scales[at * p.scale_row_stride + i * p.scale_stride] = 0;
    }
  }
  copier.drain();
}

}  // namespace epjit
