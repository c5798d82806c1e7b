// Unpermute: each token gets the sum of the rows of its selections, in fp32 and in the order of the
// selections, rounded once; zeros when it has none. Weights go back as they are.
//
//   out[t] = sum over k of row_weights[row_of[t, k]] * rows[row_of[t, k]]
//   weights[t, k] = topk_weights[row_of[t, k]], 0 where there is no row
//
// A selection whose row is outside [0, num_rows) has none; products are rounded before they are added.
//
// Launch: any grid, unpermute_threads() threads. A warp takes a piece of 2 KB of a token at a time,
// so that few tokens occupy all SMs too.
#include "epjit/sum.cuh"

namespace epjit {

struct UnpermuteConfig {
  int32_t row_bytes;
  int32_t num_topk;
  bool is_f16;       // else bf16
  bool is_weighted;  // rows are multiplied with row_weights
};

struct UnpermuteParams {
  const char* rows;           // [num_rows, row_bytes]
  const float* row_weights;   // [num_rows]; is_weighted
  const float* topk_weights;  // [num_rows]
  const int32_t* row_of;      // [num_tokens, num_topk], rows row_of_stride apart, from place
  int64_t row_of_stride;
  char* out;       // [num_tokens, row_bytes]
  float* weights;  // [num_tokens, num_topk]; null: none go back
  int32_t num_tokens;
  int32_t num_rows;
};

constexpr int kUnpermuteWarps = 16;
constexpr int kUnpermuteUnroll = 4;  // loads of 16 bytes in flight a thread

constexpr int unpermute_threads(UnpermuteConfig) { return kUnpermuteWarps * kWarpSize; }
constexpr int unpermute_shared_bytes(UnpermuteConfig) { return 0; }

template <UnpermuteConfig kCfg>
__device__ void unpermute(const UnpermuteParams& p) {
  constexpr int kVecs = kCfg.row_bytes / 16;
  constexpr int kPieceVecs = kUnpermuteUnroll * kWarpSize;
  constexpr int kPieces = ceil_div(kVecs, kPieceVecs);
  static_assert(kCfg.row_bytes % 16 == 0 && kCfg.num_topk >= 1 && kCfg.num_topk <= kMaxTopk);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t num_units = static_cast<int64_t>(p.num_tokens) * kPieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kUnpermuteWarps;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kUnpermuteWarps + warp; unit < num_units;
       unit += step) {
    const int64_t token = unit / kPieces;
    const int piece = static_cast<int>(unit % kPieces), first = piece * kPieceVecs + lane;
    int row = lane < kCfg.num_topk ? p.row_of[token * p.row_of_stride + lane] : -1;
    if (static_cast<uint32_t>(row) >= static_cast<uint32_t>(p.num_rows)) row = -1;
    const char* src = nullptr;
    float weight = 0.0f;
    if (row >= 0) {
      src = p.rows + static_cast<int64_t>(row) * kCfg.row_bytes;
      if constexpr (kCfg.is_weighted) weight = p.row_weights[row];
    }
    Sum8<kCfg.is_f16> sums[kUnpermuteUnroll];
    add_rows<1, kCfg.is_weighted>(sums, src, weight, __ballot_sync(kFullMask, row >= 0), first,
                                  kVecs);
    char* const out = p.out + token * kCfg.row_bytes;
#pragma unroll
    for (int i = 0; i < kUnpermuteUnroll; ++i)
      if (first + i * kWarpSize < kVecs)
        ptx::st_v4(out + (first + i * kWarpSize) * 16, sums[i].rounded());
    if (piece == 0 && lane < kCfg.num_topk && p.weights != nullptr)
      p.weights[token * kCfg.num_topk + lane] = row >= 0 ? p.topk_weights[row] : 0.0f;
  }
}

}  // namespace epjit
