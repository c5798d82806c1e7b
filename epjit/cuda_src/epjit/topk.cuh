// Choices in topk_idx, read and held against the number of experts.
#pragma once
#include "epjit/ptx.cuh"

namespace epjit {

// Expert of entry i of a topk_idx of int64 or int32; -1 for what is none of [0, num_experts).
template <bool kIsInt64>
__device__ __forceinline__ int load_choice(const void* topk_idx, int64_t i, int num_experts) {
  if constexpr (kIsInt64) {
    const int64_t expert = static_cast<const int64_t*>(topk_idx)[i];
    return expert >= 0 && expert < num_experts ? static_cast<int>(expert) : -1;
  } else {
    const int32_t expert = static_cast<const int32_t*>(topk_idx)[i];
    return expert >= 0 && expert < num_experts ? expert : -1;
  }
}

}  // namespace epjit
