// Layout: which ranks a token goes to, and how many tokens each rank and each expert gets.
//
//   is_token_in_rank[t, r]    = any k: topk_idx[t, k] / (num_experts / num_ranks) == r
//   num_tokens_per_rank[r]    = sum over t of is_token_in_rank[t, r]
//   num_tokens_per_expert[e]  = sum over t, k of (topk_idx[t, k] == e)
//
// An index outside [0, num_experts) is no selection. Everything is local: no peer is waited for.
// The shape is a run-time argument, so that the kernel is loaded with the Buffer: ranks need not
// meet for a compile that only some of them reach.
//
// A thread owns a token. Each block counts in shared memory and adds its counts to `counters` in
// global memory; the last block moves the sums to the outputs and leaves the counters zero, as it
// found them, so that no memset is launched.
//   counters  [1 + num_ranks + num_experts]  ticket, ranks, experts; zero on entry and on exit
//
// Launch: any grid, layout_threads() threads.
#include "epjit/ptx.cuh"

namespace epjit {

struct LayoutConfig {
  int32_t num_ranks;
  bool topk_is_int64;
};

struct LayoutParams {
  const void* topk_idx;            // [num_tokens, num_topk] int32 or int64
  int32_t* num_tokens_per_rank;    // [num_ranks]
  int32_t* num_tokens_per_expert;  // [num_experts]
  bool* is_token_in_rank;          // [num_tokens, num_ranks]
  uint32_t* counters;              // local [1 + num_ranks + num_experts]
  int32_t num_tokens;
  int32_t num_topk;
  int32_t num_experts;
};

// A token a thread; 64 a block, so that 4096 tokens spread over 64 SMs.
constexpr int layout_threads(LayoutConfig) { return 64; }

// Beyond this many counts they go straight to global memory.
constexpr int kMaxSharedCounts = 8192;

constexpr int layout_shared_bytes(LayoutConfig) { return kMaxSharedCounts * 4; }

template <LayoutConfig kCfg>
__device__ void layout(const LayoutParams& p) {
  static_assert(kCfg.num_ranks >= 1 && kCfg.num_ranks <= kMaxRanks);
  constexpr int kBatch = 8;  // selections in flight a thread
  const uint32_t experts_per_rank = p.num_experts / kCfg.num_ranks;
  const int num_counts = kCfg.num_ranks + p.num_experts;
  const bool counts_in_shared = num_counts <= kMaxSharedCounts;

  uint32_t* const sums = p.counters + 1;
  uint32_t* const shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());
  uint32_t* const counts = counts_in_shared ? shared : sums;
  if (counts_in_shared) {
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x) shared[i] = 0;
    __syncthreads();
  }

  const int num_threads = gridDim.x * blockDim.x;
  for (int t = blockIdx.x * blockDim.x + threadIdx.x; t < p.num_tokens; t += num_threads) {
    uint32_t in_rank = 0;  // bit r
    for (int first = 0; first < p.num_topk; first += kBatch) {
      int64_t expert[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int64_t i = static_cast<int64_t>(t) * p.num_topk + first + k;
        if (first + k >= p.num_topk)
          expert[k] = -1;
        else if constexpr (kCfg.topk_is_int64)
          expert[k] = static_cast<const int64_t*>(p.topk_idx)[i];
        else
          expert[k] = static_cast<const int32_t*>(p.topk_idx)[i];
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (expert[k] < 0 || expert[k] >= p.num_experts) continue;
        const uint32_t e = static_cast<uint32_t>(expert[k]);
        atomicAdd(counts + kCfg.num_ranks + e, 1u);
        in_rank |= 1u << (e / experts_per_rank);
      }
    }
#pragma unroll
    for (int r = 0; r < kCfg.num_ranks; ++r) {
      const bool in = in_rank >> r & 1;
      p.is_token_in_rank[static_cast<int64_t>(t) * kCfg.num_ranks + r] = in;
      if (in) atomicAdd(counts + r, 1u);
    }
  }

  __syncthreads();
  if (counts_in_shared) {
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x)
      if (shared[i] != 0) atomicAdd(sums + i, shared[i]);
    __syncthreads();
  }

  // The ticket's acq_rel makes the sums of all blocks visible to the last one.
  if (threadIdx.x == 0) shared[0] = ptx::atom_add_acq_rel_gpu(p.counters, 1);
  __syncthreads();
  if (shared[0] != gridDim.x - 1) return;
  for (int i = threadIdx.x; i < num_counts; i += blockDim.x) {
    const int sum = static_cast<int>(ptx::ld_relaxed_gpu(sums + i));
    if (i < kCfg.num_ranks)
      p.num_tokens_per_rank[i] = sum;
    else
      p.num_tokens_per_expert[i - kCfg.num_ranks] = sum;
    sums[i] = 0;
  }
  if (threadIdx.x == 0) p.counters[0] = 0;
}

}  // namespace epjit
