// Unpermute: each token gets the sum of the rows of its selections, in fp32 and in the order of the
// selections, rounded once; zeros when it has none.
//
//   out[t] = sum over k of rows[row_of[t, k]], where row_of is not -1
//
// Launch: any grid, unpermute_threads() threads. A warp takes a piece of 2 KB of a token at a time,
// so that few tokens occupy all SMs too.
#include "epjit/sum.cuh"

namespace epjit {

struct UnpermuteConfig {
  int32_t row_bytes;
  int32_t num_topk;
  bool is_f16;  // else bf16
};

struct UnpermuteParams {
  const char* rows;       // [num_rows, row_bytes]
  const int32_t* row_of;  // [num_tokens, num_topk], from place
  char* out;              // [num_tokens, row_bytes]
  int32_t num_tokens;
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
    const int first = static_cast<int>(unit % kPieces) * kPieceVecs + lane;
    const int my_row = lane < kCfg.num_topk ? p.row_of[token * kCfg.num_topk + lane] : -1;
    Sum8<kCfg.is_f16> sums[kUnpermuteUnroll];
    uint32_t left = __ballot_sync(kFullMask, my_row >= 0);
    for (; left != 0; left &= left - 1) {
      const int row = __shfl_sync(kFullMask, my_row, __popc((left & (0u - left)) - 1));
      const char* const src = p.rows + static_cast<int64_t>(row) * kCfg.row_bytes;
      Vec16 v[kUnpermuteUnroll];
#pragma unroll
      for (int i = 0; i < kUnpermuteUnroll; ++i)
        if (first + i * kWarpSize < kVecs) v[i] = ptx::ld_v4(src + (first + i * kWarpSize) * 16);
#pragma unroll
      for (int i = 0; i < kUnpermuteUnroll; ++i)
        if (first + i * kWarpSize < kVecs) sums[i].add(v[i]);
    }
    char* const out = p.out + token * kCfg.row_bytes;
#pragma unroll
    for (int i = 0; i < kUnpermuteUnroll; ++i)
      if (first + i * kWarpSize < kVecs)
        ptx::st_v4(out + (first + i * kWarpSize) * 16, sums[i].rounded());
  }
}

}  // namespace epjit
