// Scales and selections, which travel beside a row of a dispatch. Params has the fields of the
// dispatch kernels' parameters that are named here.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

template <int kScales, int kTopk, bool kTopkIsInt64, typename Params>
class Payload {
 public:
  __device__ explicit Payload(const Params& params) : p(params) {}

  __device__ uint32_t load_scale(int token, int i) const {
    return p.scales[token * p.scale_token_stride + i * p.scale_stride];
  }

  // Global expert of selection k, -1 for whatever is no int32 (such an index is no selection
  // either).
  __device__ int load_expert(int token, int k) const {
    const int64_t i = static_cast<int64_t>(token) * kTopk + k;
    if constexpr (kTopkIsInt64) {
      const int64_t expert = static_cast<const int64_t*>(p.topk_idx)[i];
      return expert == static_cast<int32_t>(expert) ? static_cast<int32_t>(expert) : -1;
    } else {
      return static_cast<const int32_t*>(p.topk_idx)[i];
    }
  }

  __device__ float load_weight(int token, int k) const {
    return p.topk_weights[static_cast<int64_t>(token) * kTopk + k];
  }

  __device__ void store_scale(int64_t row, int i, uint32_t scale) const {
    p.recv_scales[row * kScales + i] = scale;
  }

  // Expert and weight of selection k: local experts, -1 and 0 for those of other ranks.
  __device__ void store_selection(int64_t row, int k, int expert, float weight) const {
    const int64_t first = static_cast<int64_t>(p.rank) * p.experts_per_rank;
    const bool mine = expert >= first && expert < first + p.experts_per_rank;
    store_topk_idx(row * kTopk + k, mine ? static_cast<int>(expert - first) : -1);
    p.recv_topk_weights[row * kTopk + k] = mine ? weight : 0.0f;
  }

  // Worst-case outputs are longer than the `num_rows` that arrive. By all threads of the grid.
  __device__ void fill_unused_rows(int num_rows) const {
    if constexpr (kTopk > 0) {
      const int64_t last = static_cast<int64_t>(p.num_recv_rows) * kTopk;
      const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
      const int64_t first = static_cast<int64_t>(max(num_rows, 0)) * kTopk;
      for (int64_t i = first + blockIdx.x * blockDim.x + threadIdx.x; i < last; i += num_threads)
        store_topk_idx(i, -1);
    }
  }

 private:
  __device__ void store_topk_idx(int64_t i, int expert) const {
    if constexpr (kTopkIsInt64)
      static_cast<int64_t*>(p.recv_topk_idx)[i] = expert;
    else
      static_cast<int32_t*>(p.recv_topk_idx)[i] = expert;
  }

  const Params& p;
};

// Whether a dispatch that was launched with guessed room for its rows has to leave at once, as
// another number of rows comes (intranode/dispatch.cu, "guessed room").
template <typename Params>
__device__ __forceinline__ bool is_wrong_guess(const Params& p, int num_rows) {
  return p.least_rows >= 0 && (num_rows < p.least_rows || num_rows > p.num_recv_rows);
}

// Calls visit(row, item, whether there is one) for each of kItems items of `num_rows` rows, all
// lanes in step.
template <int kItems, typename Visit>
__device__ __forceinline__ void for_each_item(int num_rows, int lane, Visit visit) {
  if constexpr (kItems > 0)
    for (int first = 0; first < num_rows * kItems; first += kWarpSize) {
      const int i = first + lane;
      visit(i / kItems, i % kItems, i < num_rows * kItems);
    }
}

}  // namespace epjit
