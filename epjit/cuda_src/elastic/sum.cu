// Sum: what the choices of each token have brought back, in fp32, rounded once.
//
//   out[t] = round(bias_0[t] + bias_1[t] + rows[t, 0] + ... + rows[t, K - 1])
//
// from +0.0 and in this order, which does not depend on the ranks that the rows come from. A choice
// that brought nothing back has a row of zeros, and changes nothing.
//
// Launch: any grid, sum_threads() threads. A warp takes a piece of 2 KB of a token at a time, so that
// few tokens occupy all SMs too. Nobody waits for anybody.
#include "epjit/sum.cuh"

namespace epjit {

struct SumConfig {
  int32_t row_bytes;
  int32_t num_topk;
  bool is_f16;  // else bf16
};

struct SumParams {
  const char* rows;    // [num_tokens, num_topk, row_bytes]
  const char* bias_0;  // [num_tokens, row_bytes], or null, as is bias_1
  const char* bias_1;
  char* out;  // [num_tokens, row_bytes]
  int32_t num_tokens;
};

constexpr int kSumWarps = 16;
constexpr int kSumUnroll = 4;  // loads of 16 bytes in flight a thread and row

constexpr int sum_threads(SumConfig) { return kSumWarps * kWarpSize; }
constexpr int sum_shared_bytes(SumConfig) { return 0; }

template <SumConfig kCfg>
__device__ void sum(const SumParams& p) {
  constexpr int kVecs = kCfg.row_bytes / 16;
  constexpr int kPieceVecs = kSumUnroll * kWarpSize;
  constexpr int kPieces = ceil_div(kVecs, kPieceVecs);
  static_assert(kCfg.row_bytes % 16 == 0 && kCfg.num_topk >= 1);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t num_units = static_cast<int64_t>(p.num_tokens) * kPieces;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSumWarps;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kSumWarps + warp; unit < num_units;
       unit += step) {
    const int64_t token = unit / kPieces;
    const int first = static_cast<int>(unit % kPieces) * kPieceVecs + lane;
    Sum8<kCfg.is_f16> sums[kSumUnroll];
    const auto add = [&](const char* row) {
      Vec16 v[kSumUnroll];
#pragma unroll
      for (int i = 0; i < kSumUnroll; ++i)
        if (first + i * kWarpSize < kVecs) v[i] = ptx::ld_v4(row + (first + i * kWarpSize) * 16);
#pragma unroll
      for (int i = 0; i < kSumUnroll; ++i)
        if (first + i * kWarpSize < kVecs) sums[i].add(v[i]);
    };
    if (p.bias_0 != nullptr) add(p.bias_0 + token * kCfg.row_bytes);
    if (p.bias_1 != nullptr) add(p.bias_1 + token * kCfg.row_bytes);
    const char* const rows = p.rows + token * kCfg.num_topk * kCfg.row_bytes;
#pragma unroll 2
    for (int k = 0; k < kCfg.num_topk; ++k) add(rows + static_cast<int64_t>(k) * kCfg.row_bytes);
    char* const out = p.out + token * kCfg.row_bytes;
#pragma unroll
    for (int i = 0; i < kSumUnroll; ++i)
      if (first + i * kWarpSize < kVecs)
        ptx::st_v4(out + (first + i * kWarpSize) * 16, sums[i].rounded());
  }
}

}  // namespace epjit
