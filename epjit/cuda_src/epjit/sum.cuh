// Sums of rows of bf16 or fp16 in fp32, plain and weighted: eight elements, 16 bytes, at a time.
#pragma once
#include "epjit/work.cuh"

namespace epjit {

template <bool kIsF16>
class Sum8 {
 public:
  // bias_0 keeps its sign of zero: the sum starts from it, not from +0.0.
  __device__ __forceinline__ void start(Vec16 v) {
    each(v, [](float&, float y) { return y; });
  }

  __device__ __forceinline__ void start(Vec16 v, float weight) {
    each(v, [weight](float, float y) { return __fmul_rn(weight, y); });
  }

  __device__ __forceinline__ void add(Vec16 v) {
    each(v, [](float& x, float y) { return x + y; });
  }

  // The product is rounded, then the sum.
  __device__ __forceinline__ void add(Vec16 v, float weight) {
    each(v, [weight](float x, float y) { return __fadd_rn(x, __fmul_rn(weight, y)); });
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

// Adds the products of eight elements one by one; each product and each sum is rounded.
template <bool kIsF16>
__device__ __forceinline__ float add_products(float sum, Vec16 a, Vec16 b) {
  const uint32_t of_a[4] = {a.x, a.y, a.z, a.w}, of_b[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Float2 x = kIsF16 ? ptx::f16x2_to_float2(of_a[i]) : ptx::bf16x2_to_float2(of_a[i]);
    const Float2 y = kIsF16 ? ptx::f16x2_to_float2(of_b[i]) : ptx::bf16x2_to_float2(of_b[i]);
    sum = __fadd_rn(sum, __fmul_rn(x.x, y.x));
    sum = __fadd_rn(sum, __fmul_rn(x.y, y.y));
  }
  return sum;
}

// Adds rows to the sums of kUnroll pieces: those rows whose bit in `rows` is set, ascending; lane k has
// the weight of row k. load(v, k) gets the pieces of row k, of which valid(i) says whether there is one;
// the loads of kBatch rows are in flight at once. By a whole warp.
template <int kBatch, bool kWeighted, bool kIsF16, int kUnroll, typename Valid, typename Load>
__device__ __forceinline__ void add_rows(Sum8<kIsF16> (&sums)[kUnroll], float weight, uint32_t rows,
                                         Valid valid, Load load) {
  while (rows != 0) {
    Vec16 v[kBatch][kUnroll];
    uint32_t loaded = rows;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (rows == 0) break;
      load(v[j], __ffs(rows) - 1);
      rows &= rows - 1;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (loaded == 0) break;
      const float w = kWeighted ? __shfl_sync(kFullMask, weight, __ffs(loaded) - 1) : 0.0f;
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (!valid(i)) continue;
        if constexpr (kWeighted)
          sums[i].add(v[j][i], w);
        else
          sums[i].add(v[j][i]);
      }
      loaded &= loaded - 1;
    }
  }
}

// The same for rows in global memory: lane k has row k. The first of the pieces is `vec`, each lies a
// warp's width behind the one before, up to `last`.
template <int kBatch, bool kWeighted, bool kIsF16, int kUnroll>
__device__ __forceinline__ void add_rows(Sum8<kIsF16> (&sums)[kUnroll], const char* row,
                                         float weight, uint32_t rows, int vec, int last) {
  const auto valid = [&](int i) { return vec + i * kWarpSize < last; };
  add_rows<kBatch, kWeighted>(sums, weight, rows, valid, [&](Vec16(&v)[kUnroll], int k) {
    const char* const from = of_lane(row, k);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (valid(i)) v[i] = ptx::ld_v4(from + (vec + i * kWarpSize) * 16);
  });
}

// Adds weight * y: the product is rounded, then the sum.
__device__ __forceinline__ void add_weighted(float& sum, float weight, float y) {
  sum = __fadd_rn(sum, __fmul_rn(weight, y));
}

// The same for eight bf16.
__device__ __forceinline__ void add_weighted(float (&sum)[8], float weight, Vec16 v) {
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Float2 y = ptx::bf16x2_to_float2(pairs[i]);
    add_weighted(sum[2 * i], weight, y.x);
    add_weighted(sum[2 * i + 1], weight, y.y);
  }
}

__device__ __forceinline__ Vec16 to_bf16(const float (&v)[8]) {
  return {ptx::float2_to_bf16x2({v[0], v[1]}), ptx::float2_to_bf16x2({v[2], v[3]}),
          ptx::float2_to_bf16x2({v[4], v[5]}), ptx::float2_to_bf16x2({v[6], v[7]})};
}

// bf16(sum over k of weight * row), k ascending from +0.0; lane k has row and weight of selection k,
// of those whose bit in `rows` is set. Each lane gets the eight elements of its piece `vec`. The loads
// of kBatch rows are in flight at once.
template <int kBatch>
__device__ __forceinline__ Vec16 weighted_sum(const char* row, float weight, uint32_t rows, int vec,
                                              bool valid) {
  float sum[8] = {};
  while (rows != 0) {
    Vec16 v[kBatch];
    uint32_t loaded = rows;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (rows == 0) break;
      const char* const src = of_lane(row, __ffs(rows) - 1);
      if (valid) v[i] = ptx::ld_v4(src + vec * 16);
      rows &= rows - 1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (loaded == 0) break;
      add_weighted(sum, __shfl_sync(kFullMask, weight, __ffs(loaded) - 1), v[i]);
      loaded &= loaded - 1;
    }
  }
  return to_bf16(sum);
}

}  // namespace epjit
