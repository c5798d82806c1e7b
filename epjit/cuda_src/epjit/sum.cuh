// Sums of rows of bf16 or fp16 in fp32: eight elements, 16 bytes, at a time.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

template <bool kIsF16>
class Sum8 {
 public:
  // bias_0 keeps its sign of zero: the sum starts from it, not from +0.0.
  __device__ __forceinline__ void start(Vec16 v) {
    each(v, [](float&, float y) { return y; });
  }

  __device__ __forceinline__ void add(Vec16 v) {
    each(v, [](float& x, float y) { return x + y; });
  }

  // To nearest even.
  __device__ __forceinline__ Vec16 rounded() const {
    return {pack(sum_[0]), pack(sum_[1]), pack(sum_[2]), pack(sum_[3])};
  }

 private:
  template <typename Combine>
  __device__ __forceinline__ void each(Vec16 v, Combine combine) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Float2 y = kIsF16 ? ptx::f16x2_to_float2(pairs[i]) : ptx::bf16x2_to_float2(pairs[i]);
      sum_[i] = {combine(sum_[i].x, y.x), combine(sum_[i].y, y.y)};
    }
  }

  __device__ __forceinline__ static uint32_t pack(Float2 v) {
    return kIsF16 ? ptx::float2_to_f16x2(v) : ptx::float2_to_bf16x2(v);
  }

  Float2 sum_[4] = {};
};

}  // namespace epjit
