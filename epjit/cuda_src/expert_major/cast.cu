// Cast: rows of bf16 or fp16 in a smaller format, with their scales (cast.cuh), before they cross.
//
//   rows[t], scales[t] = cast(x[t])
//
// Launch: any grid, cast_threads() threads. A warp takes a row at a time, a lane 16 elements.
#include "epjit/cast.cuh"

namespace epjit {

struct CastConfig {
  int32_t hidden;
  int32_t format;
  bool is_f16;  // else bf16
};

struct CastParams {
  const char* x;              // [num_tokens, hidden]
  const float* global_scale;  // [1]; kNvfp4
  char* rows;                 // [num_tokens, format_row_bytes()]
  char* scales;               // [num_tokens, format_row_scale_bytes()]
  int32_t num_tokens;
};

constexpr int kCastWarps = 16;

constexpr int cast_threads(CastConfig) { return kCastWarps * kWarpSize; }
constexpr int cast_shared_bytes(CastConfig) { return 0; }

template <CastConfig kCfg>
__device__ void cast(const CastParams& p) {
  constexpr int kFormat = kCfg.format, kItems = kCfg.hidden / kCastElements;
  constexpr int kLanes = format_block(kFormat, kCfg.hidden) / kCastElements;  // that share a scale
  constexpr int kRowBytes = format_row_bytes(kFormat, kCfg.hidden);
  constexpr int kScaleBytes = format_row_scale_bytes(kFormat, kCfg.hidden);
  static_assert(kCfg.hidden % format_block(kFormat, kCfg.hidden) == 0 && kRowBytes % 16 == 0);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float given = kFormat == kNvfp4 ? *p.global_scale : 0.0f;  // to cast_item
  for (int64_t token = blockIdx.x * kCastWarps + warp; token < p.num_tokens;
       token += gridDim.x * kCastWarps) {
    const char* const x = p.x + token * (2 * kCfg.hidden);
    char* const scales = p.scales + token * kScaleBytes;
    if constexpr (kFormat == kFp8Row) given = row_amax<kCfg.is_f16>(x, kItems, lane);
#pragma unroll 2
    for (int item = lane; item - lane < kItems; item += kWarpSize) {
      const bool is_one = item < kItems;
      Vec16 pieces[2] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (is_one) pieces[j] = ptx::ld_v4(x + item * 32 + j * 16);
      const CastItem cast = cast_item<kFormat, kCfg.is_f16>(pieces, given);
      if (!is_one) continue;
      store_cast<kFormat>(p.rows + token * kRowBytes, item, cast);
      if (item % kLanes == 0) store_cast_scale<kFormat>(scales, item / kLanes, cast.scale);
    }
  }
}

}  // namespace epjit
