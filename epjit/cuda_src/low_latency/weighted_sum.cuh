// What the kernels of low-latency combine share: who is chosen, sums of rows, the meeting of ranks.
#pragma once
#include "epjit/copy.cuh"

namespace epjit {

// Global expert of a selection, -1 for what is none.
template <bool kIsInt64, int kExperts>
__device__ __forceinline__ int selected_expert(const void* topk_idx, int64_t selection) {
  int64_t expert;
  if constexpr (kIsInt64)
    expert = static_cast<const int64_t*>(topk_idx)[selection];
  else
    expert = static_cast<const int32_t*>(topk_idx)[selection];
  return expert >= 0 && expert < kExperts ? static_cast<int>(expert) : -1;
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

// One warp waits until all peers have begun, so that none of them is in an earlier operation when
// this one ends; it adds the cycles that it waited for each to `wait_cost`, if there is one. Then it
// lets the next kernel in.
template <int kRanks>
__device__ __forceinline__ bool meet_peers(const Waiter& waiter, int64_t* wait_cost, int lane) {
  bool ok = true;
  for (int peer = lane; peer < kRanks && ok; peer += kWarpSize) {
    if (peer == waiter.rank || is_masked(waiter, peer)) continue;
    const uint64_t start = ptx::clock64();
    uint64_t seen;
    ok = wait_until(waiter, waiter.start_tag, peer, 0, stamp(waiter.epoch, 0),
                    entered_signal(waiter.signals, peer), seen,
                    [&](uint64_t value) { return has_started(value, waiter.epoch); }) ||
         is_masked(waiter, peer);
    if (wait_cost != nullptr) wait_cost[peer] += static_cast<int64_t>(ptx::clock64() - start);
  }
  ok = all_lanes(ok);
  if (ok) ptx::griddepcontrol_launch_dependents();
  return ok;
}

}  // namespace epjit
